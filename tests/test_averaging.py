"""Averages of parts: the mean itself, what may not be averaged, and the verb, up to the family made of its result."""

import json

import pytest
import torch

from genpipe.averaging import average_parts
from genpipe.dalle1.dvae import DVAE
from genpipe.dalle1.transformer import DALLE1Transformer
from genpipe.errors import InputError
from genpipe.parts import load_part, save_part
from genpipe.tokenizer import CaptionTokenizer
from pipelines.assembly import recorded_data

CAPTIONS = ["a red circle", "two blue squares", "a green star"]


def small_dvae(seed: int, widths: tuple[int, ...] = (8,)) -> DVAE:
    torch.manual_seed(seed)
    return DVAE(num_codes=16, widths=widths, blocks_per_group=1, resolution=16)


def small_transformer(captions: list[str], dropout: float = 0.0) -> DALLE1Transformer:
    tokenizer = CaptionTokenizer.train(captions, vocab_size=300)
    model = DALLE1Transformer(
        vocab_size=tokenizer.vocab_size, num_image_tokens=16, text_length=8, grid_size=4, width=16, num_layers=1,
        num_heads=2, dropout=dropout,
    )  # fmt: skip
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def folders(tmp_path):
    for seed in range(3):
        save_part(small_dvae(seed), tmp_path / f"run{seed}" / "dvae")
        recipe = {"data": {"source": "scenes" if seed < 2 else "cats", "styles": True}}
        (tmp_path / f"run{seed}" / "recipe.json").write_text(json.dumps(recipe))
    return [tmp_path / f"run{seed}" / "dvae" for seed in range(3)]


def test_the_average_is_the_weighted_mean_and_the_files_stay_as_they_were(folders) -> None:
    before = [folder.joinpath("diffusion_pytorch_model.safetensors").read_bytes() for folder in folders]
    averaged = average_parts(DVAE, folders, [2, 1, 1]).state_dict()
    a, b, c = (load_part(DVAE, folder).state_dict() for folder in folders)
    for name, mean in averaged.items():
        torch.testing.assert_close(mean, a[name] * 0.5 + b[name] * 0.25 + c[name] * 0.25)
    assert before == [folder.joinpath("diffusion_pytorch_model.safetensors").read_bytes() for folder in folders]


def test_without_shares_all_count_the_same_and_of_equal_parts_the_average_is_that_part(folders) -> None:
    mean, halves = average_parts(DVAE, folders[:2]), average_parts(DVAE, folders[:2], [0.5, 0.5])
    for name, tensor in mean.state_dict().items():
        assert torch.equal(tensor, halves.state_dict()[name])
    same, start = average_parts(DVAE, [folders[0], folders[0]]), load_part(DVAE, folders[0])
    for name, tensor in same.state_dict().items():
        torch.testing.assert_close(tensor, start.state_dict()[name])


@pytest.mark.parametrize(
    ("count", "shares", "said"),
    [
        (1, None, "at least two parts, 1 was given"),
        (2, [1.0], "2 parts need 2 shares, 1 were given"),
        (2, [1.0, 0.0], "a share is 0.0"),
        (2, [1.0, float("nan")], "a share is nan"),
        (2, [float("inf"), 1.0], "a share is inf"),
    ],
)
def test_shares_that_make_no_mean_are_refused(folders, count, shares, said) -> None:
    with pytest.raises(InputError, match=said):
        average_parts(DVAE, folders[:count], shares)


def test_parts_of_another_size_or_tokenizer_are_refused_by_name(folders, tmp_path) -> None:
    save_part(small_dvae(0, widths=(12,)), tmp_path / "wide")
    with pytest.raises(InputError, match=r"wide cannot be averaged with .*dvae: widths is \[12\] there"):
        average_parts(DVAE, [folders[0], tmp_path / "wide"])
    for name, captions in (("a", CAPTIONS), ("b", [caption[::-1] for caption in CAPTIONS])):
        save_part(small_transformer(captions), tmp_path / name)
    with pytest.raises(InputError, match="has another tokenizer"):
        average_parts(DALLE1Transformer, [tmp_path / "a", tmp_path / "b"])
    own = average_parts(DALLE1Transformer, [tmp_path / "a", tmp_path / "a"]).tokenizer
    assert own.to_json() == load_part(DALLE1Transformer, tmp_path / "a").tokenizer.to_json()


def test_dropout_makes_no_difference_and_the_average_has_that_of_the_first(tmp_path) -> None:
    for name, dropout in (("with", 0.1), ("without", 0.0)):
        save_part(small_transformer(CAPTIONS, dropout), tmp_path / name)
    assert average_parts(DALLE1Transformer, [tmp_path / "with", tmp_path / "without"]).config.dropout == 0.1
    assert average_parts(DALLE1Transformer, [tmp_path / "without", tmp_path / "with"]).config.dropout == 0.0


def test_the_verb_writes_a_part_that_knows_what_it_was_trained_on(run, folders, tmp_path) -> None:
    out = tmp_path / "mean"
    done = run("average", folders[0], folders[1], "--share", 3, "--share", 1, "--out", out)
    assert done.code == 0 and done.out.strip() == str(out)
    expected = average_parts(DVAE, folders[:2], [3, 1]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_part(DVAE, out).state_dict().items())
    assert recorded_data(out) == {"source": "scenes", "styles": True}
    again = run("average", *folders, "--out", out)
    assert again.code == 2 and "--replace" in again.err
    assert run("average", *folders, "--out", out, "--replace").code == 0
    assert recorded_data(out)["source"] == "cats, scenes"
    assert run("average", out, folders[0], "--out", out, "--replace").code == 0  # in the place of one of them
    assert recorded_data(out)["source"] == "cats, scenes"


def test_the_verb_refuses_what_is_no_part(run, folders, tmp_path) -> None:
    done = run("average", tmp_path, folders[0], "--out", tmp_path / "mean")
    assert done.code == 2 and "holds no trained part" in done.err and "Traceback" not in done.err
    assert not (tmp_path / "mean").exists()
