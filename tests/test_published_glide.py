"""GLIDE's files: names and shapes of the published ones, values through their containers, refusals, a drawing."""

import dataclasses
import gzip
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from glide_reference import CONFIGS, tensors_of
from PIL import Image
from published_files import MemoryPeak
from torch import Tensor

from genpipe.clip.noise_aware import NoiseAwareCLIP
from genpipe.dalle2.glide import GLIDE, GLIDEUpsampler
from genpipe.errors import InputError
from genpipe.images import read_recipe, to_unit
from genpipe.published import glide, glide_parts
from genpipe.published.fitting import assign, give_back, on_meta
from genpipe.published.guided_diffusion import applied
from pipelines.cli import main
from pipelines.dalle2 import DALLE2Pipeline
from pipelines.family import save_family
from pipelines.steering import Filling

MANIFEST = Path(__file__).parent / "manifests" / "glide.json.gz"
SIZES = {  # bytes of the published files as far as they are tensors, from the address they are fetched from
    "base": 1.54e9, "upsample": 1.59e9, "base-inpaint": 1.54e9, "upsample-inpaint": 1.59e9, "clip-image-enc": 346e6,
    "clip-text-enc": 287e6,
}  # fmt: skip
FILES = ("base.pt", "upsample.pt", "base_inpaint.pt", "upsample_inpaint.pt", *glide.GUIDE)
FEW = {"num_inference_steps": 3, "upsampler_steps": 3}
MERGES = "\n".join(["#version: 0.2", *(f"{a} {b}" for a in "abcd" for b in "abcdefghij"), ""])  # 40 of them


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, list[int]]]:
    return json.loads(gzip.decompress(MANIFEST.read_bytes()))


def write(folder: Path, *names: str, legacy: bool = False) -> Path:
    """Tiny files of these names, and the merges."""
    folder.mkdir(exist_ok=True)
    for name in names:
        torch.save(tensors_of(name), folder / name, _use_new_zipfile_serialization=not legacy)
    (folder / "vocab.bpe").write_text(MERGES, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("glide"), *FILES)


def parts_of(source: Path, **options: Any) -> dict[str, Any]:
    return {name: build() for name, build in glide.read(source, configs=CONFIGS, **options).parts.items()}


def given_back(rules: Mapping[str, tuple[str, tuple[str, ...]]], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the published names: the inverse of what the reader does."""
    pieces: dict[str, list[tuple[tuple[str, ...], Tensor]]] = defaultdict(list)
    for name, (theirs, operations) in rules.items():
        pieces[theirs].append((operations, ours[name]))
    whole = {}
    for theirs, parts in pieces.items():
        tensor = give_back([(operations[-1] if operations else "copy", part) for operations, part in parts])
        for operation in reversed(parts[0][0][:-1]):
            tensor = give_back([(operation, tensor)])
        whole[theirs] = tensor
    return whole


# Names and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "upsample", "base-inpaint", "upsample-inpaint"])
def test_published_names_and_shapes_of_the_networks(manifest: dict[str, Any], name: str) -> None:
    part, kind = ("decoder", GLIDE) if name.startswith("base") else ("upsampler", GLIDEUpsampler)
    model: Any = on_meta(lambda: kind(**glide.CONFIGS[part], inpaint="inpaint" in name))
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest[name].items()}
    rules = glide_parts.rules_of(model)
    assert {theirs for theirs, _ in rules.values()} == set(tensors)
    assign(model, applied(rules, tensors), name)  # nothing missing, nothing unexpected, equal shapes
    assert sum(4 * p.numel() for p in model.parameters()) == pytest.approx(SIZES[name], rel=0.01)
    back = given_back(rules, model.state_dict())
    assert {key: list(tensor.shape) for key, tensor in back.items()} == manifest[name]


def test_published_names_and_shapes_of_the_guide(manifest: dict[str, Any]) -> None:
    model = on_meta(lambda: NoiseAwareCLIP(**glide.CONFIGS["guide"]))
    for name, tower in (("clip-image-enc", model.image), ("clip-text-enc", model.text)):
        rules = glide_parts.tower_rules(tower)
        tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest[name].items()}
        assert {theirs for theirs, _ in rules.values()} == set(tensors)
        assign(tower, applied(rules, tensors), name)
        assert sum(4 * p.numel() for p in tower.parameters()) == pytest.approx(SIZES[name], rel=0.01)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_values_go_through_both_containers_and_back(tmp_path: Path, legacy: bool) -> None:
    for pair, names in (("drawing", FILES[:2]), ("filling", FILES[2:4])):
        parts = parts_of(write(tmp_path / pair, *names, *glide.GUIDE, legacy=legacy))
        assert set(parts) == {"decoder", "upsampler", "guide"}
        for part, name in zip(("decoder", "upsampler"), names, strict=True):
            model, published = parts[part], tensors_of(name)
            assert not model.training and model.fills == (pair == "filling")
            back = given_back(glide_parts.rules_of(model), model.state_dict())
            assert back.keys() == published.keys()
            assert all(torch.equal(back[key], published[key]) for key in published)
            rules = glide_parts.rules_of(model)
            again = applied(rules, back)
            assert all(torch.equal(again[key], tensor) for key, tensor in model.state_dict().items())
        for tower, name in ((parts["guide"].image, glide.GUIDE[0]), (parts["guide"].text, glide.GUIDE[1])):
            back = given_back(glide_parts.tower_rules(tower), tower.state_dict())
            assert all(torch.equal(back[key], tensor) for key, tensor in tensors_of(name).items())
    half = parts_of(tmp_path / "drawing", dtype=torch.float16)["decoder"]
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert torch.equal(half.text.positional_embedding, tensors_of("base.pt")["positional_embedding"].half())


def test_full_size_is_mapped_not_copied(manifest: dict[str, Any], tmp_path: Path) -> None:
    """base.pt and upsample.pt at full size, without their bytes; only what is fused in the files is copied."""
    for name in ("base", "upsample"):
        with torch.serialization.skip_data():
            torch.save({key: torch.empty(shape) for key, shape in manifest[name].items()}, tmp_path / f"{name}.pt")
        assert os.stat(tmp_path / f"{name}.pt").st_blocks * 512 < 20e6
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    pairs = [f"{a} {b}" for a in letters for b in letters] + [f"{a} {chr(256 + i)}" for a in letters for i in range(68)]
    pairs += [f"{chr(256 + i)} {a}" for a in letters for i in range(20)]
    with gzip.open(tmp_path / "vocab.bpe.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *pairs[:50000], ""]))
    with MemoryPeak() as memory:
        read = glide.read(tmp_path)
        models = [read.parts[part]() for part in ("decoder", "upsampler")]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [385030726, 398361286]
    assert [model.tokenizer.vocab_size for model in models] == [50257, 50257]  # type: ignore[attr-defined]
    assert memory.rise < 600e6, f"{memory.rise / 1e6:.0f} MB beside 3.1 GB of weights"


# Which files, and refusals --------------------------------------------------------------------------------------------


def test_recognised_by_names_and_told_what_is_missing(tmp_path: Path, folder: Path) -> None:
    assert not glide.recognises(tmp_path) and not glide.recognises(Path("\0")) and not glide.recognises(tmp_path / "x")
    (tmp_path / "base.pt").touch()
    assert not glide.recognises(tmp_path)  # a name that many files have
    (tmp_path / "upsample_inpaint.pt").touch()
    (tmp_path / "clip_text_enc.pt").touch()
    assert glide.recognises(tmp_path)
    assert glide.missing(tmp_path) == ["upsample.pt", "clip_image_enc.pt", "vocab.bpe"]
    with pytest.raises(InputError, match="has no vocab.bpe: GLIDE reads texts with GPT-2's byte BPE"):
        glide.read(tmp_path)
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    with pytest.raises(InputError, match="lacks upsample.pt, clip_image_enc.pt; get the rest from https://"):
        glide.read(tmp_path)
    (tmp_path / "base_inpaint.pt").touch()  # now that pair is complete and the other is not
    assert glide.chosen(tmp_path) == glide.FILLING
    assert glide.missing(folder) == [] and glide.recognises(folder) and glide.chosen(folder) == glide.DRAWING
    assert glide.chosen(folder / "base_inpaint.pt") == glide.FILLING and glide.recognises(folder / "base_inpaint.pt")
    drawing, filling = glide.read(folder, configs=CONFIGS), glide.read(folder / "base_inpaint.pt", configs=CONFIGS)
    assert (drawing.name, filling.name) == ("glide-filtered", "glide-filtered-inpaint")
    assert [file.name for file in filling.files] == [*glide.FILLING, *glide.GUIDE, "vocab.bpe"]
    assert any("base_inpaint.pt" in note for note in drawing.notes) and drawing.resolution == 8


class Command:
    """What a pickle makes run where it is not refused."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path, *FILES[:2], *glide.GUIDE)
    read = glide.read(tmp_path, configs=CONFIGS)
    good = tensors_of("base.pt")
    qkv = "middle_block.1.qkv.weight"
    faults = {
        "missing unet.mid_block.attentions.0.to_k.weight": {k: v for k, v in good.items() if k != qkv},
        "unexpected out.3.weight": {**good, "out.3.weight": torch.zeros(2)},
        "mis-shaped text.transformer_proj.weight [16, 32] instead of [32, 16]": {
            **good, "transformer_proj.weight": good["transformer_proj.weight"].T.contiguous()
        },
        "mis-shaped unet.mid_block.attentions.0.to_k.weight [47, 16, 1]": {**good, qkv: good[qkv][:47].clone()},
    }  # fmt: skip
    for fault, tensors in faults.items():
        torch.save(tensors, tmp_path / "base.pt")
        with pytest.raises(InputError) as caught:
            read.parts["decoder"]()
        assert fault in str(caught.value) and "base.pt" in str(caught.value)
    torch.save({**good, "out.2.bias": Command(f"touch {tmp_path}/ran")}, tmp_path / "base.pt")
    with pytest.raises(InputError, match="system"):
        read.parts["decoder"]()
    assert not (tmp_path / "ran").exists()
    whole = (tmp_path / "upsample.pt").read_bytes()
    (tmp_path / "upsample.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="upsample.pt"):
        read.parts["upsampler"]()
    torch.save(
        {**tensors_of(glide.GUIDE[0]), "blocks.block_0.f_attn.f_k.b": torch.zeros(12)}, tmp_path / glide.GUIDE[0]
    )
    with pytest.raises(InputError, match="clip_image_enc.pt does not fit .*unexpected blocks.block_0.f_attn.f_k.b"):
        read.parts["guide"]()
    (tmp_path / "vocab.bpe").write_text("a b\n", encoding="utf-8")
    torch.save(good, tmp_path / "base.pt")
    with pytest.raises(InputError, match="takes a ByteBPE of 297 tokens"):
        read.parts["decoder"]()
    (tmp_path / "vocab.bpe").rename(tmp_path / "vocab.bpe.gz")
    with pytest.raises(InputError, match="vocab.bpe.gz cannot be read"):
        glide.read(tmp_path, configs=CONFIGS).parts["decoder"]()


# A drawing ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> DALLE2Pipeline:
    read = glide.read(folder, configs=CONFIGS)
    return DALLE2Pipeline(None, **parts_of(folder), defaults={**read.defaults["dalle2"], **FEW})


def test_pipeline_draws_with_its_own_text_and_is_led_by_the_guide(pipeline: DALLE2Pipeline) -> None:
    with pytest.warns(UserWarning, match="Not ranked"):
        plain = pipeline(["abc", "a bag"], keep=2, seed=5)
    assert [len(images) for images in plain.images] == [2, 2] and plain.scores == [[None, None]] * 2
    assert plain.images[0][0].size == (16, 16) and plain.images[0][0] != plain.images[1][0]
    sampling = pipeline.resolve_sampling({"clip_guidance_scale": 3.0, "guidance_scale": 1.0})
    assert sampling.mode == "caption" and sampling.scheduler == "unclip" and sampling.upsampler_steps == 3
    plainly = DALLE2Pipeline(None, pipeline.decoder, upsampler=pipeline.upsampler, defaults=glide.SAMPLING)
    assert plainly.resolve_sampling() == dataclasses.replace(
        plainly.resolve_sampling(), num_inference_steps=100, guidance_scale=3.0, upsampler_steps=27, mode="caption"
    )
    led, unled = (
        pipeline(["abc"], keep=2, seed=5, sampling=each)
        for each in (sampling, pipeline.resolve_sampling({"guidance_scale": 1.0}))
    )
    assert led.images != unled.images
    alone = pipeline(["abc"], keep=1, seed=6, sampling=sampling, chunk_size=1)
    assert alone.images[0][0] == led.images[0][1]  # whatever was drawn beside it
    without = DALLE2Pipeline(None, pipeline.decoder, defaults=pipeline.config.defaults)
    with pytest.raises(InputError, match="no CLIP that knows noise"):
        without.resolve_sampling({"clip_guidance_scale": 3.0})
    with pytest.raises(InputError, match="cannot fill holes"):
        pipeline("abc", image=Image.new("RGB", (9, 9)), fill=Image.new("L", (9, 9), 255))
    other = NoiseAwareCLIP(**{**CONFIGS["guide"], "image_size": 4})
    with pytest.raises(InputError, match="sees pixels 4x4"):
        DALLE2Pipeline(None, pipeline.decoder, guide=other)


def test_pipeline_fills_holes_and_keeps_the_rest(folder: Path) -> None:
    read = glide.read(folder / "base_inpaint.pt", configs=CONFIGS)
    assert read.defaults["dalle2"]["guidance_scale"] == 5.0
    parts = {name: build() for name, build in read.parts.items()}
    pipeline = DALLE2Pipeline(None, **parts, defaults={**read.defaults["dalle2"], **FEW})
    picture = Image.effect_noise((20, 16), 90).convert("RGB")
    fill = Image.new("L", (20, 16))
    fill.paste(255, (2, 8, 18, 16))  # the lower half of the square in the middle
    drawn = pipeline("abc", keep=2, image=picture, fill=fill).images[0]
    given = to_unit([picture.crop((2, 0, 18, 16))])
    for result in drawn:
        assert result.size == (16, 16)
        torch.testing.assert_close(to_unit([result])[:, :, :8], given[:, :, :8], rtol=0, atol=1.01 / 255)
    assert drawn[0] != drawn[1] and not torch.allclose(to_unit([drawn[0]])[:, :, 8:], given[:, :, 8:], atol=0.05)
    speck = Image.new("L", (20, 16))
    speck.putpixel((5, 1), 200)
    filling = Filling.of(picture, speck, 8)
    assert (~filling.kept).nonzero().tolist() == [[0, 0, 0, 1]]  # one of the decoder's pixels, wholly
    assert int((~filling.at(16, torch.device("cpu"))["kept"]).sum()) == 4
    with pytest.raises(InputError, match="both need the same size"):
        pipeline("abc", image=picture, fill=fill.resize((16, 16)))
    with pytest.raises(InputError, match="nowhere white"):
        pipeline("abc", image=picture, fill=Image.new("L", (20, 16)))
    with pytest.raises(InputError, match="give a mask too"):
        pipeline("abc", image=picture)
    with pytest.raises(InputError, match="takes a picture, and a mask"):
        pipeline("abc", fill=fill)


def test_command_fills_holes_and_does_it_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = {**glide.SAMPLING, **FEW}
    info = {"name": "tiny-glide", "license": "MIT", "resolution": 8, "defaults": {"dalle2": defaults}}
    save_family(tmp_path / "family", parts_of(folder / "base_inpaint.pt"), info, dtype=torch.float32)
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "picture.png")
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out + shown.err

    given = ["--family", "family", "--image", "picture.png", "--fill", "mask.png"]
    code, shown = run("generate", "abc", *given, "--candidates", "1", "--clip-guidance", "2", "--out", "out")
    assert code == 0, shown
    (drawn,) = [path for path in (tmp_path / "out").glob("*.png")]
    assert read_recipe(drawn)["settings"]["clip_guidance_scale"] == 2.0
    code, shown = run("reproduce", str(drawn), *given)
    assert code == 0 and "identical" in shown, shown
    code, shown = run("reproduce", str(drawn), *given[:4])
    assert code == 2 and "give their mask with --fill" in shown
    code, shown = run("reproduce", str(drawn), *given[:5], "picture.png")
    assert code == 2 and "other holes than those of --fill" in shown
    code, shown = run("generate", "abc", *given[:2], *given[4:], "--out", "out")
    assert code == 2 and "give it with --image" in shown
