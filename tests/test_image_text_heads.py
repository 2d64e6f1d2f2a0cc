"""Image-text heads: parity with zero-shot, masks, saving beside a CLIP, labelled pairs, the command's refusals."""

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_image_text import write_tar
from tiny_recipes import write_pictures
from typer.testing import CliRunner

from genpipe.clip.image_text import (
    HEADS,
    ImageTextClassifier,
    MLPClassifier,
    PairFeatures,
    SumClassifier,
    build_head,
    build_sum_classifier,
    encode_pairs,
    load_head,
    load_image_text_classifier,
)
from genpipe.clip.model import CLIP, ImageEncoding
from genpipe.clip.zero_shot import build_classifier
from genpipe.data.labelled_pairs import LabelledPairs
from genpipe.errors import InputError
from genpipe.evaluation.image_text import classify_pairs, inverse_frequencies, label_figures, tabulate
from genpipe.parts import load_part, save_part
from pipelines.cli import app, main

NAMES = ["red things", "Blue things", "others"]
TEXTS = ["a cat on a red background", "two dogs", "the dog", "three strawberries below a cat"]


@pytest.fixture(scope="module")
def clip(tiny_folder: Path) -> CLIP:
    return load_part(CLIP, tiny_folder / "clip")


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def head_of(kind: str, clip: CLIP, seed: int = 0, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_head(
            kind, clip, NAMES, **({"linear": True} if kind == "sum" else {"width": 16}), **settings
        ).eval()


def test_the_sum_is_classified_as_zero_shot_classifies_a_picture(clip: CLIP, pixels: torch.Tensor) -> None:
    with torch.no_grad():
        image, text = clip.encode_image(pixels).normalized, clip.encode_text(TEXTS).normalized
        expected = build_classifier(clip, NAMES, "simple").probabilities(image + text)
        classifier = ImageTextClassifier(clip, build_sum_classifier(clip, NAMES, "simple"))
        found = classifier.probabilities(pixels, TEXTS)
    assert found.shape == (4, 3) and classifier.head.names == tuple(NAMES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))


def test_the_mlp_worked_out(clip: CLIP, pixels: torch.Tensor) -> None:
    head = head_of("mlp", clip)
    with torch.no_grad():
        pairs = encode_pairs(clip, pixels, TEXTS, states=False)
        first, _, _, last = head.layers
        both = torch.cat([pairs.image_embedding, pairs.text_embedding], dim=1) * 4  # the root of D = 16
        torch.testing.assert_close(head(pairs), last(F.gelu(first(both))))
    assert pairs.image_states is None and first.in_features == 32
    torch.testing.assert_close(pairs.image_embedding.norm(dim=1), torch.ones(4))


def test_a_linear_layer_on_the_sum_worked_out(clip: CLIP, pixels: torch.Tensor) -> None:
    head = head_of("sum", clip)
    pairs = encode_pairs(clip, pixels, TEXTS, states=False)
    total = F.normalize(pairs.image_embedding + pairs.text_embedding, dim=1)
    torch.testing.assert_close(head(pairs), head.layer(4 * total))


@torch.no_grad()
def test_padding_changes_nothing_and_everything_else_counts(clip: CLIP, pixels: torch.Tensor) -> None:
    head = head_of("transformer", clip)
    pairs = encode_pairs(clip, pixels, TEXTS)
    assert pairs.image_states is not None and pairs.text_states is not None and pairs.text_mask is not None
    logits = head(pairs)
    noise = torch.randn(pairs.text_states.shape, generator=torch.Generator().manual_seed(1))
    garbled = torch.where(pairs.text_mask[..., None], pairs.text_states, 100 * noise)
    torch.testing.assert_close(head(pairs._replace(text_states=garbled)), logits, rtol=1e-4, atol=1e-5)
    for row in range(4):  # alone, a short text has less padding behind it
        alone = PairFeatures(*(x[row : row + 1] for x in pairs if x is not None))
        torch.testing.assert_close(head(alone), logits[row : row + 1], rtol=1e-4, atol=1e-5)
    last = pairs.text_mask.sum(dim=1) - 1
    touched = pairs.text_states.clone()
    touched[torch.arange(4), last] += 1
    assert not torch.allclose(head(pairs._replace(text_states=touched)), logits, atol=1e-3)
    moved = pairs.image_states.clone()
    moved[:, 5] += 1
    assert not torch.allclose(head(pairs._replace(image_states=moved)), logits, atol=1e-3)
    with pytest.raises(InputError, match="states=True"):
        head(pairs._replace(text_states=None))


@torch.no_grad()
def test_modalities_are_told_apart(clip: CLIP) -> None:
    """The same state as a patch and as a word, with the same projection: only the modality embedding differs."""
    head = head_of("transformer", clip)
    head.text_projection.load_state_dict(head.image_projection.state_dict())
    state, other = torch.randn(2, 1, 1, 48, generator=torch.Generator().manual_seed(0))
    embedding, mask = torch.zeros(1, 16), torch.ones(1, 1, dtype=torch.bool)
    one, two = (PairFeatures(embedding, embedding, a, b, mask) for a, b in ((state, other), (other, state)))
    head.modality.copy_(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(head(one), head(two), atol=1e-4)
    head.modality.zero_()
    torch.testing.assert_close(head(one), head(two), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sum", "mlp", "transformer"])
def test_saved_and_loaded_a_head_answers_the_same(clip: CLIP, pixels: torch.Tensor, tmp_path: Path, kind: str) -> None:
    head, kept = head_of(kind, clip), pixels.clone()
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), head_of(kind, clip).parameters(), strict=True))
    before = ImageTextClassifier(clip, head).probabilities(pixels, TEXTS)
    assert torch.equal(before, ImageTextClassifier(clip, head).probabilities(pixels, TEXTS))
    assert torch.equal(pixels, kept)
    save_part(head, tmp_path / "head")
    loaded = load_image_text_classifier(tmp_path / "head", clip)
    assert type(loaded.head) is HEADS[kind] and loaded.head.names == tuple(NAMES)
    assert torch.equal(loaded.probabilities(pixels, TEXTS), before)


def test_a_ready_sum_classifier_is_saved_with_its_directions(clip: CLIP, pixels: torch.Tensor, tmp_path: Path) -> None:
    head = build_sum_classifier(clip, NAMES)
    save_part(head, tmp_path / "head")
    loaded = load_image_text_classifier(tmp_path / "head", clip)
    expected = ImageTextClassifier(clip, head).probabilities(pixels, TEXTS)
    assert torch.equal(loaded.probabilities(pixels, TEXTS), expected)


def test_a_tuned_clip_travels_with_its_head(tiny_folder: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    clip = load_part(CLIP, tiny_folder / "clip")
    classifier = ImageTextClassifier(clip, head_of("transformer", clip)).eval()
    with torch.no_grad():  # as training would
        for parameter in classifier.parameters():
            parameter.add_(0.01)
    before = classifier.probabilities(pixels, TEXTS)
    save_part(classifier, tmp_path / "head")
    loaded = load_image_text_classifier(tmp_path / "head")
    assert torch.equal(loaded.probabilities(pixels, TEXTS), before)
    with pytest.raises(InputError, match="has a CLIP of its own"):
        load_image_text_classifier(tmp_path / "head", clip)
    shutil.rmtree(tmp_path / "head" / "clip")
    with pytest.raises(InputError, match="needs the CLIP that it was trained beside"):
        load_image_text_classifier(tmp_path / "head")
    with pytest.raises(InputError, match="made with another CLIP"):
        load_image_text_classifier(tmp_path / "head", load_part(CLIP, tiny_folder / "clip"))


def test_names_and_counts_are_checked(clip: CLIP, pixels: torch.Tensor) -> None:
    with pytest.raises(InputError, match="there twice"):
        MLPClassifier(["a", "A"], "", 16)
    with pytest.raises(InputError, match="at least two classes"):
        SumClassifier(["a"], "", 16, 1.0)
    with pytest.raises(InputError, match="4 pictures need as many texts"):
        encode_pairs(clip, pixels, TEXTS[:3])
    with pytest.raises(InputError, match=r"pixels in \[0, 1\]"):
        encode_pairs(clip, 2 * pixels, TEXTS, states=False)
    with pytest.raises(InputError, match="no token states"):  # a tower whose states cannot be had
        ImageEncoding(pixels, None).states  # noqa: B018
    broken = head_of("mlp", clip)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        ImageTextClassifier(clip, broken).probabilities(pixels, TEXTS)


# labelled pairs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """pairs.csv with four sound pairs of two classes, one without text and one without label."""
    pictures = write_pictures(tmp_path / "pictures")
    rows = [(f"{i:02}.png", f"text  {i}", "odd one" if i % 2 else "Even") for i in range(4)]
    rows += [("04.png", " ", "Even"), ("05.png", "text", "")]
    with open(pictures / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Image", "caption", "class"), *rows])
    return pictures / "pairs.csv"


def test_pairs_of_a_list(listed: Path) -> None:
    pairs = LabelledPairs(listed)
    assert pairs.names == ("Even", "odd one") and pairs.labels == [0, 1, 0, 1] and pairs.texts[1] == "text 1"
    assert pairs.left_out.skipped == {"no text": 1, "no label": 1}
    picture, text, label = pairs[3]
    assert (picture.size, text, label) == ((20, 24), "text 3", 1)
    assert LabelledPairs(listed, names=["new", "Odd_One", "even"]).labels == [2, 1, 2, 1]
    (listed.parent / "01.png").write_bytes(b"no picture")
    assert [pairs[i][1] for i in range(4)] == ["text 0", "text 2", "text 2", "text 3"]
    assert pairs[1][2] == 0 and (pairs.report().read, pairs.report().skipped) == (6, {"picture cannot be read": 1})


def test_pairs_of_json_lines_and_shards_are_the_same(listed: Path, tmp_path: Path) -> None:
    rows = [("00.png", "one", 1), ("01.png", "two", 0), ("02.png", "three", 1)]
    data = [(listed.parent / picture).read_bytes() for picture, _, _ in rows]
    lines = [json.dumps({"image": picture, "text": text, "label": label}) for picture, text, label in rows]
    (listed.parent / "pairs.jsonl").write_text("\n".join(lines))
    from_lines = LabelledPairs(listed.parent / "pairs.jsonl")
    files = []
    for number, (_, text, label) in enumerate(rows):
        record = {"label": label} if number else {"label": label, "caption": text}
        files += [
            (f"{number}.png", data[number]),
            (f"{number}.json", json.dumps(record).encode()),
        ]
        files += [(f"{number}.txt", text.encode())] if number else []
    files += [("3.png", b"?"), ("3.txt", b"text"), ("4.png", b"?"), ("4.txt", b"text"), ("4.json", b"{")]
    write_tar(tmp_path / "0.tar", files)
    from_shards = LabelledPairs(tmp_path / "0.tar")
    assert from_shards.names == from_lines.names == ("0", "1") and from_shards.labels == from_lines.labels == [1, 0, 1]
    assert from_shards.texts == from_lines.texts == ["one", "two", "three"]
    assert from_shards.left_out.skipped == {"no label": 1, "JSON cannot be read": 1}
    for i in range(3):
        assert from_shards[i].picture.tobytes() == from_lines[i].picture.tobytes()


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("image,label", "00.png,a", "a column text, caption for its text"),
        ("image,text", "00.png,a", "a column label, class for its label"),
        ("image,text,label", "00.png,t,a\nnone.png,t,b", "1 pictures named in .* are missing"),
        ("image,text,label", "00.png,t,a\n01.png,t,a", "at least two classes, only 'a'"),
        ("image,text,label", "00.png,t,hot dog\n01.png,t,Hot_dog", "is there twice"),
        ("image,text,label", "00.png,,a", "has no picture with a text and a label"),
    ],
)
def test_lists_that_cannot_be_used(listed: Path, header: str, rows: str, message: str) -> None:
    listed.write_text(f"{header}\n{rows}\n")
    with pytest.raises(InputError, match=message):
        LabelledPairs(listed)


def test_labels_never_seen_and_places_without_pairs(listed: Path) -> None:
    with pytest.raises(InputError, match=r"'Even' \(line 2 of .*\) is not among the 2 classes, nor are 1 other"):
        LabelledPairs(listed, names=["cat", "dog"])
    for place in (listed.parent, listed.parent / "00.txt", listed.parent / "none.csv"):
        with pytest.raises(InputError, match="no labelled pairs in"):
            LabelledPairs(place)


def test_figures_worked_out_by_hand(clip: CLIP, listed: Path) -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0, 0, 1])
    figures = label_figures(logits, labels)
    assert figures["accuracy"] == 0.75 and figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    losses = torch.tensor([-2.0, 1.0, -1.0, -3.0]).exp().add(1).log()
    assert figures["loss"] == pytest.approx(float(losses.mean()))
    weights = inverse_frequencies(labels.tolist(), 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0])
    weighted = (4 / 9 * losses[:3].sum() + 4 / 3 * losses[3]) / (4 / 9 * 3 + 4 / 3)
    assert label_figures(logits, labels, weights[:2])["loss"] == pytest.approx(float(weighted))

    pairs = LabelledPairs(listed)
    classifier = ImageTextClassifier(clip, build_head("mlp", clip, pairs.names).eval())
    table = tabulate(clip, pairs, [3, 0], states=False)
    found, true = classify_pairs(classifier, pairs, [3, 0])
    assert true.tolist() == table.labels.tolist() == [1, 0]
    torch.testing.assert_close(found, classifier.head(table.at(torch.tensor([0, 1]), clip.device)).log_softmax(dim=1))


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory, clip: CLIP) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "head"
    save_part(head_of("transformer", clip), folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path


def test_classify_with_a_head(tiny_folder: Path, head_folder: Path, picture: Path, clip: CLIP) -> None:
    command = ["classify", "--head", str(head_folder), "--clip", str(tiny_folder), "--text", "the  dog", "--json"]
    done = CliRunner().invoke(app, [*command, str(picture), str(picture.parent)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["text"] == "the dog" and document["classes"] == NAMES and len(document["pictures"]) == 1
    from genpipe.clip.retrieval import read_for_clip

    expected = load_image_text_classifier(head_folder, clip).probabilities(
        read_for_clip(clip, picture)[None], ["the dog"]
    )
    found = {entry["name"]: entry["probability"] for entry in document["pictures"][0]["classes"]}
    assert [found[name] for name in NAMES] == pytest.approx(expected[0].tolist(), abs=1e-5)
    best = max(found, key=found.__getitem__)
    plain = CliRunner().invoke(app, [*command[:-1], "--top", "1", str(picture)])
    assert plain.stdout.splitlines() == [
        str(picture),
        f"  {found[best]:6.1%}  {best}",
    ]


def test_a_text_beyond_the_context_is_said_once(tiny_folder: Path, head_folder: Path, picture: Path) -> None:
    clip = load_part(CLIP, tiny_folder / "clip")
    classifier = load_image_text_classifier(head_folder, clip)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        classifier.probabilities(torch.zeros(2, 3, 16, 16), ["a cat " * 40, "a dog " * 40])
        classifier.probabilities(torch.zeros(1, 3, 16, 16), ["a cat " * 40])
    assert len([warning for warning in said if "30 tokens that fit" in str(warning.message)]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head", "HEAD"], 'give the text with --text "..."'),
        (["--text", "a dog"], "--text needs a head that reads it"),
        (["--head", "HEAD", "--text", "a dog", "--classes", "a,b"], "leave out --classes"),
        (["--head", "HEAD", "--text", " "], "is empty"),
        (["--head", "HEAD", "--text", "a dog", "--clip", "nano"], "made with another CLIP"),
        (["--head", "none", "--text", "a dog"], "'none' is not the folder of an image-text head"),
    ],
)
def test_what_the_command_refuses(
    head_folder: Path, picture: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["classify", str(picture), *(str(head_folder) if flag == "HEAD" else flag for flag in flags)])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and message in said[0]


def test_damaged_heads(head_folder: Path, clip: CLIP, tmp_path: Path) -> None:
    for name, damage in {
        "weights": lambda folder: (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 100),
        "config": lambda folder: (folder / "config.json").write_text("{"),
        "other": lambda folder: save_part(clip, folder),
    }.items():
        folder = tmp_path / name
        shutil.copytree(head_folder, folder)
        damage(folder)
        with pytest.raises(InputError):
            load_head(folder)
    broken = head_of("mlp", clip)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    save_part(broken, tmp_path / "nan")
    with pytest.raises(InputError, match="not finite"):
        load_head(tmp_path / "nan")
