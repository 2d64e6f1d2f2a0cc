"""A published CLIP as a family of one part: recognised by names, described, converted, of use as --clip."""

import json
from pathlib import Path

import pytest
import torch
from command_line import Run, picture, refused
from test_published_clip import archive, original, write_hugging_face

from genpipe.clip.model import CLIP
from genpipe.errors import InputError
from genpipe.parts import load_part
from genpipe.published import clip_family
from genpipe.published.clip import read_clip
from genpipe.published.registry import recognised


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    model = original()
    (folder / "hugging").mkdir()
    write_hugging_face(folder / "hugging", model)
    archive(folder / "ViT-tiny.pt", model)
    return {"folder": folder / "hugging", "archive": folder / "ViT-tiny.pt"}


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_clip_is_converted_whole(run: Run, sources: dict[str, Path], tmp_path: Path, kind: str) -> None:  # noqa: F811
    found = recognised(sources[kind])
    assert found is not None and found[0] == "clip_family" and clip_family.missing(sources[kind]) == []
    result = run("import", sources[kind], tmp_path / "out", "--json")
    assert result.code == 0 and json.loads(result.out)["parts"] == ["clip"]
    ours, theirs = load_part(CLIP, tmp_path / "out" / "clip"), read_clip(sources[kind])
    tokens = theirs.tokenize(["a cat"])
    assert torch.equal(ours.encode_text(tokens).embedding, theirs.encode_text(tokens).embedding)
    shown = run("rerank", "a cat", picture(tmp_path / "a.png"), "--clip", tmp_path / "out")
    assert shown.code == 0 and "a.png" in shown.out
    assert "no parts that make a pipeline" in refused(run("generate", "a cat", "--family", tmp_path / "out"))


def test_what_is_no_clip_or_only_described(sources: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "config.json"
    other.write_text('{"model_type": "bert"}')
    assert not clip_family.recognises(tmp_path)
    other.write_text("[")
    assert not clip_family.recognises(tmp_path) and not clip_family.recognises(other)
    other.write_text('{"model_type": "clip"}')
    assert clip_family.recognises(tmp_path) and clip_family.missing(tmp_path) == ["model.safetensors"]
    with pytest.raises(InputError, match="is a CLIP itself"):
        clip_family.read(sources["folder"], clip=sources["archive"])
