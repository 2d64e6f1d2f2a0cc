"""The judge's detector: shapes, the loss by hand, what is read from its maps, saving, its training stage."""

import math

import numpy as np
import pytest
import torch

from genpipe.data.scenes import EmojiScenes, Placement
from genpipe.errors import InputError
from genpipe.evaluation.detector import Detection, SceneDetector, detector_loss
from genpipe.parts import load_part, save_part
from genpipe.training.detector_stage import DetectorStage, exact_share, noise, strewn, worsened
from genpipe.training.recipes import recipe

NAMES = ["cat", "dog", "boot"]


@pytest.fixture(scope="module")
def detector() -> SceneDetector:
    torch.manual_seed(0)
    return SceneDetector(NAMES, size=32, width=8).eval()


def test_maps_have_a_cell_for_every_four_pixels(detector: SceneDetector) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = pixels.clone()
    centres, kinds = detector(pixels)
    assert centres.shape == (2, 8, 8) and kinds.shape == (2, 3, 8, 8)
    assert torch.equal(pixels, before)


def test_the_loss_of_one_cell_by_hand() -> None:
    centres, kinds = torch.zeros(1, 1, 2), torch.zeros(1, 3, 1, 2)  # p = 1 / 2, and a third for each kind
    heat, labels = torch.tensor([[[1.0, 0.5]]]), torch.tensor([[[2, -1]]])
    total, focal, kind = detector_loss(centres, kinds, heat, labels)
    # At the centre (1 - p)^2 ln p, beside it (1 - 0.5)^4 p^2 ln(1 - p); one centre.
    assert float(focal) == pytest.approx(0.25 * math.log(2) + 0.5**4 * 0.25 * math.log(2))
    assert float(kind) == pytest.approx(math.log(3))
    assert float(total) == pytest.approx(float(focal) + float(kind))


def test_what_is_read_from_the_maps(detector: SceneDetector) -> None:
    heat, sure = torch.zeros(8, 8), torch.full((8, 8), 0.9)
    index = torch.zeros(8, 8, dtype=torch.long)
    heat[2, 1], index[2, 1] = 0.8, 2
    heat[2, 2], index[2, 2] = 0.7, 1  # touches the surer one
    heat[6, 5], index[6, 5] = 1.0, 0
    found = detector._read(heat, sure, index, [[2, 1], [2, 2], [6, 5]])
    assert [each.name for each in found] == ["cat", "boot"]
    assert (found[1].x, found[1].y) == (1.5 / 8, 2.5 / 8)
    assert found[0].confidence == pytest.approx(0.9)


def test_any_size_is_looked_at_and_nothing_else(detector: SceneDetector) -> None:
    assert detector.detect(torch.rand(1, 3, 50, 40), threshold=0.0)[0]
    assert detector.detect(torch.rand(1, 3, 32, 32), threshold=1.1) == [[]]
    with pytest.raises(InputError, match="pixels"):
        detector.detect(torch.rand(3, 32, 32))
    with pytest.raises(InputError, match="multiple of 16"):
        SceneDetector(NAMES, size=30)


def test_saved_and_loaded_it_sees_the_same(detector: SceneDetector, tmp_path) -> None:
    save_part(detector, tmp_path / "detector")
    again = load_part(SceneDetector, tmp_path / "detector")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(again(pixels), detector(pixels), strict=True))


@pytest.fixture(scope="module")
def stage() -> DetectorStage:
    small = recipe("detector")
    small.model |= {"size": 32, "width": 8}
    small.data.size = 32
    return DetectorStage(small, None)


def test_strewn_objects_are_where_they_are_said_to_be() -> None:
    scenes = EmojiScenes(32, split="all")
    counts = set()
    for seed in range(60):
        pixels, there = strewn(scenes, np.random.default_rng(seed), scrambled=0.0)
        counts.add(len(there))
        blank = pixels.copy()
        for p in there:
            half = p.size / 2 + 2 / 32
            x, y = (slice(max(int((c - half) * 32), 0), math.ceil((c + half) * 32)) for c in (p.x, p.y))
            assert (pixels[y, x] != pixels[0, 0]).any() or (pixels[y, x] != pixels[-1, -1]).any()
            blank[y, x] = 0
        if there:
            rest = blank.reshape(-1, 3)
            assert len(np.unique(rest[rest.any(axis=1)], axis=0)) <= 1  # outside of all objects the background alone
    assert counts >= {0, 1, 2, 3}
    _, none = strewn(scenes, np.random.default_rng(3), scrambled=1.0)
    assert none == []


def test_noise_has_any_grain_and_holds_nothing() -> None:
    pictures = [noise(32, np.random.default_rng(seed)) for seed in range(40)]
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in pictures)
    assert np.array_equal(pictures[3], noise(32, np.random.default_rng(3)))
    steps = [np.abs(np.diff(p.astype(float), axis=0)).mean() / max(p.std(), 1) for p in pictures]
    assert min(steps) < 0.2 < 0.7 < max(steps)  # from halves of the picture to single pixels
    scenes = EmojiScenes(32, split="all")
    there = [strewn(scenes, np.random.default_rng(seed), scrambled=1.0)[1] for seed in range(8)]
    assert there == [[]] * 8  # noise, or objects of which none can be recognised


def test_targets_mark_the_centre(stage: DetectorStage) -> None:
    name = stage.model.config.names[7]
    heat, labels = stage.target([Placement(name, 0.55, 0.3, 0.4)])
    assert heat.shape == labels.shape == (8, 8)
    assert np.argwhere(heat == 1).tolist() == [[2, 4]] and labels[2, 4] == 7
    assert (labels >= 0).sum() == 9 and heat[2, 5] > heat[2, 7]


def test_worsened_pictures_stay_pictures() -> None:
    pixels = EmojiScenes(32).example(0).pixels
    before = pixels.copy()
    worse = [worsened(pixels, np.random.default_rng(seed)) for seed in range(20)]
    assert all(w.shape == pixels.shape and w.dtype == np.uint8 for w in worse)
    assert any(not np.array_equal(w, pixels) for w in worse) and np.array_equal(pixels, before)
    assert np.array_equal(worse[3], worsened(pixels, np.random.default_rng(3)))


def test_a_batch_is_learned(stage: DetectorStage) -> None:
    batch = stage.collate(np.zeros((8, 3, 32, 32), np.uint8), [""] * 8, np.random.default_rng(0))
    model = stage.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(30):
        loss, logs = stage.loss(model, batch, step, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0] and set(logs) == {"focal", "kind", "right"}


def test_exact_share_counts_pictures(detector: SceneDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = EmojiScenes(32, split="heldout")
    drawn = [scenes.scene(i) for i in range(12)]
    seen = [[Detection(p.object, p.x, p.y, 1.0) for p in scene.placements] for scene in drawn]
    first = next(i for i, scene in enumerate(drawn) if scene.kind == "pair")
    seen[first] = seen[first][:1]
    monkeypatch.setattr(SceneDetector, "detect", lambda self, pixels: seen)
    share = exact_share(detector, scenes, 12)
    pairs = sum(scene.kind == "pair" for scene in drawn)
    assert share["pair"] == pytest.approx(1 - 1 / pairs)
    assert all(value == 1 for kind, value in share.items() if kind != "pair")


def test_other_sources_are_refused() -> None:
    other = recipe("detector")
    other.data.source = "pictures"
    with pytest.raises(InputError, match="emoji scenes"):
        DetectorStage(other, None)
