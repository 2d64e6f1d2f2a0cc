"""Distances of sets of pictures: values worked out by hand, what looks at pictures, `genpipe evaluate distance`."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run, picture, refused
from conftest import tiny_dvae
from PIL import Image

import genpipe.evaluation.composition as composition
import genpipe.evaluation.distribution as distribution
from genpipe.data.scenes import EmojiScenes
from genpipe.errors import InputError
from genpipe.evaluation.detector import SceneDetector
from genpipe.evaluation.distribution import cmmd, distribution_figures, frechet_distance, precision_recall
from genpipe.evaluation.feature_distance import feature_distance, map_distance
from genpipe.evaluation.features import centre_square, clip_eye, features, features_of_files, inception_eye, judge_eye
from genpipe.evaluation.reconstruction import reconstruction_figures
from genpipe.evaluation.upsampling import upsampling_figures
from genpipe.images import save_png
from pipelines.family import Family


@pytest.fixture(scope="module")
def detector() -> SceneDetector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SceneDetector(["cat", "dog"], size=32, width=8).eval()


def normal(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: torch.Tensor, root: torch.Tensor, rows: int = 50, seed: int = 0) -> torch.Tensor:
    """Rows whose mean is exactly `mean` and whose covariance exactly root @ root.T."""
    x = normal(rows, len(mean), seed)
    x = x - x.mean(dim=0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return white @ root.T + mean


# frechet_distance -----------------------------------------------------------------------------------------------------


def test_frechet_distance_of_known_moments() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    one, two = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    # Diagonal covariances: the sum of (s - s_w)^2 over the deviations, and the distance of the means squared.
    a, b = with_moments(zero, one), with_moments(zero + 2, two, seed=1)
    assert frechet_distance(a, b) == pytest.approx(3 * 4 + 0 + 1 + 16)
    assert frechet_distance(b, a) == pytest.approx(29)
    # C = [[2, 1], [1, 2]] with eigenvalues 3 and 1, C_w = 4: 4 + 8 - 2 * 2 (sqrt 3 + 1).
    c = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    c_w = 2 * torch.eye(2, dtype=torch.float64)
    distance = frechet_distance(with_moments(zero[:2], c), with_moments(zero[:2], c_w, seed=1))
    assert distance == pytest.approx(12 - 4 * (math.sqrt(3) + 1))


def test_frechet_distance_is_0_for_equal_sets_even_of_fewer_pictures_than_features() -> None:
    a = normal(10, 200)
    assert 0 <= frechet_distance(a, a.flip(0)) < 1e-8
    assert frechet_distance(a, a + 3) == pytest.approx(200 * 9)
    assert frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [5.0]])) == pytest.approx(16 + 2)
    kept = a.clone()
    frechet_distance(a, a)
    assert torch.equal(a, kept)


# cmmd -----------------------------------------------------------------------------------------------------------------


def test_cmmd_of_tiny_sets_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # 2 apart, squared
    y = torch.tensor([[-1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    # x: k(2). y: pairs 0, 2, 2. Between: 4, 4, 2 of the first row, 2, 2, 0 of the second; all squared, over 200.
    two, four = math.exp(-2 / 200), math.exp(-4 / 200)
    by_hand = 1000 * (two + (1 + 2 * two) / 3 - 2 * (2 * four + 3 * two + 1) / 6)
    assert cmmd(x, y) == pytest.approx(by_hand, rel=1e-9)
    monkeypatch.setattr(distribution, "_PAIRS", 3)  # a row at a time
    assert cmmd(x, y) == pytest.approx(by_hand, rel=1e-9)


def test_cmmd_is_about_0_for_one_distribution_and_grows_with_a_shift() -> None:
    def some(seed: int, shift: float) -> torch.Tensor:
        return torch.nn.functional.normalize(normal(300, 16, seed) + shift, dim=1)

    same, near, far = (cmmd(some(0, 0), some(1, shift)) for shift in (0, 0.2, 1))
    assert abs(same) < 0.1 < near < far
    with pytest.raises(InputError, match="of length 1"):
        cmmd(normal(5, 3), normal(5, 3))


# precision_recall -----------------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # with k = 1 their radii are 1, 1, 1, 8
    drawn = torch.tensor([[3.0], [4.0], [100.0]])  # 1, 1, 96
    assert precision_recall(real, drawn, k=1) == (2 / 3, 2 / 4)  # 3, 4 within; 2 and 10 within the manifold of drawn
    monkeypatch.setattr(distribution, "_PAIRS", 5)
    assert precision_recall(real, drawn, k=1) == (2 / 3, 2 / 4)


def test_precision_and_recall_of_equal_disjoint_and_narrow_sets() -> None:
    a = normal(40, 8)
    assert precision_recall(a, a) == precision_recall(a.float() + 1000, a.float() + 1000) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)
    copies = a[:1].repeat(40, 1)  # always the same good picture, and a manifold without extent
    assert precision_recall(a, copies) == (1, 1 / 40)


def test_all_figures_and_what_is_refused() -> None:
    a, b = normal(20, 4), normal(30, 4, seed=1) + 5
    figures = distribution_figures(a, b)
    assert set(figures) == {"frechet_distance", "cmmd", "precision", "recall"}
    assert figures["frechet_distance"] == frechet_distance(a, b) and (figures["precision"], figures["recall"]) == (0, 0)
    for wrong, sentence in [
        ((a, b[:, :3]), "of one width"), ((a[0], b[0]), "of one width"), ((a[:1], b), "At least 2"),
        ((a, b * torch.nan), "not a finite number"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            frechet_distance(*wrong)
    with pytest.raises(InputError, match="At least 4 pictures of each set are needed, got 3 and 30"):
        precision_recall(a[:3], b)
    with pytest.raises(InputError, match="neighbours"):
        precision_recall(a, b, k=0)


# feature_distance -----------------------------------------------------------------------------------------------------


def test_the_distance_of_maps_by_hand() -> None:
    y = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    y_0 = torch.tensor([0.0, 5.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone()
    y_0[0, :, 0, 0] = torch.tensor([7.0, 0.0])  # one place of four is alike
    other = -torch.ones(1, 4, 3, 3)
    # First layer: 2 at three of four places; second: opposite directions, 4.
    assert map_distance([y, -other], [y_0, other]).tolist() == pytest.approx([(1.5 + 4) / 2])


@pytest.mark.parametrize("side", [16, 32, 40, 64])
def test_feature_distance_of_pictures(detector: SceneDetector, side: int) -> None:
    pixels = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    other = torch.cat([pixels[:1], 1 - pixels[1:]])
    kept = pixels.clone()
    distance = feature_distance(detector, pixels, other)
    assert distance.shape == (3,) and distance[0] == 0 and bool((distance[1:] > 0.01).all())
    assert torch.allclose(feature_distance(detector, pixels, other, chunk_size=2), distance, atol=1e-6)
    assert torch.equal(pixels, kept)
    with pytest.raises(InputError, match="Two sets of pixels"):
        feature_distance(detector, pixels, other[:1])


def test_figures_of_parts_have_it_where_a_detector_is_given(detector: SceneDetector, tiny_family: Family) -> None:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dvae = tiny_dvae(num_codes=8).eval()
    plain, seen = reconstruction_figures(dvae, pixels), reconstruction_figures(dvae, pixels, 2, detector)
    assert set(seen) - set(plain) == {"feature_distance"} and seen["psnr"] == pytest.approx(plain["psnr"])
    assert tiny_family.dalle1 is not None
    upsampler = tiny_family.dalle1.upsampler
    figures = upsampling_figures(upsampler, pixels, range(4), detector=detector)
    added = set(figures) - set(upsampling_figures(upsampler, pixels, range(4)))
    assert added == {"feature_distance", f"feature_distance_{upsampler.config.resize_mode}"}


# features -------------------------------------------------------------------------------------------------------------


def test_the_detectors_inner_maps_and_features(detector: SceneDetector) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shapes = [tuple(each.shape) for each in detector.maps(pixels)]
    assert shapes == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 16, 2, 2), (2, 8, 8, 8)]
    last = detector.maps(pixels)[-1]
    assert torch.equal(detector.features(pixels), torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1))
    assert torch.equal(detector(pixels)[0], detector.centre(last)[:, 0])


def test_features_of_pictures_of_any_size_in_chunks(detector: SceneDetector, tiny_family: Family) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, *sides, generator=generator) for sides in [(20, 20), (32, 48), (70, 33)]]
    seen = features(judge_eye(detector), pictures)
    assert seen.shape == (3, 16) and seen.dtype == torch.float32
    assert torch.allclose(features(judge_eye(detector), pictures, chunk_size=2), seen, atol=1e-5)
    assert tiny_family.clip is not None
    embedded = features(clip_eye(tiny_family.clip), pictures)
    assert embedded.shape == (3, 16) and torch.allclose(embedded.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="no picture"):
        features(judge_eye(detector), [])


def test_the_centre_square() -> None:
    pixels = torch.zeros(1, 3, 4, 10)
    pixels[..., 3:7] = 1
    assert torch.equal(centre_square(pixels, 2), torch.ones(1, 3, 2, 2))


def test_broken_files_are_skipped_and_listed(detector: SceneDetector, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    files = [picture(tmp_path / "a.png"), broken, picture(tmp_path / "b.png", 50)]
    told: list[tuple[int, int]] = []
    found = features_of_files(judge_eye(detector), files, lambda *numbers: told.append(numbers))
    assert found.features.shape == (2, 16) and [path for path, _ in found.skipped] == [broken]
    assert told == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(InputError, match="None of the 1 pictures found can be read"):
        features_of_files(judge_eye(detector), [broken])


def test_inception_is_refused_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="pip install.*weights-inception-2015-12-05-6726825d.pth.*--inception"):
        inception_eye()


def test_inception_with_weights_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError, match="There are no weights of InceptionV3"):
        inception_eye(path)
    for content in ({"a": torch.zeros(1)}, Path("run")):  # other tensors; a pickled object
        torch.save(content, path)
        with pytest.raises(InputError, match="does not hold the weights"):
            inception_eye(path)
    network = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)  # random ones: the real are not at hand
        torch.manual_seed(0)
        torch.save(network("random", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    seen = features(inception_eye(path), [torch.rand(3, 20, 30), torch.rand(3, 300, 280)])
    assert seen.shape == (2, 2048) and bool(torch.isfinite(seen).all())


# genpipe evaluate distance --------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, detector: SceneDetector, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders of six scenes each, in the judge's place a tiny one."""
    monkeypatch.setattr(composition, "load_detector", lambda: detector)
    for name, first in (("drawn", 0), ("real", 6)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for number, levels in enumerate(EmojiScenes(size=32).batch(first, 6)[0]):
            Image.fromarray(np.moveaxis(levels, 0, 2)).save(tmp_path / name / "deeper" / f"{number}.png")
    return tmp_path / "drawn", tmp_path / "real"


def test_the_command_on_two_folders(run: Run, folders: tuple[Path, Path]) -> None:  # noqa: F811
    drawn, real = folders
    (drawn / "broken.png").write_bytes(b"no")
    result = run("evaluate", "distance", drawn, real, "--k", 2, "--json")
    assert result.code == 0 and "skipped: " in result.err and "6 pictures are few for 16 features" in result.err
    told = json.loads(result.out)
    assert told["pictures"] == {"drawn": 6, "real": 6} and told["skipped"] == {"drawn": 1, "real": 0}
    assert (told["features"], told["width"], told["k"]) == ("judge", 16, 2)
    assert told["frechet_distance"] > 0 and 0 <= told["precision"] <= 1 and 0 <= told["recall"] <= 1
    same = run("evaluate", "distance", real, real)
    assert "6 drawn, 6 real pictures; 16 features each (judge)" in same.out
    assert same.out.splitlines()[-2:] == ["precision         1.000", "recall            1.000"]


def test_the_command_on_scenes(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    told = json.loads(run("evaluate", "distance", folders[0], "scenes", "--json").out)
    assert told["pictures"] == {"drawn": 6, "real": 256} and told["real"] == "scenes"


def test_the_command_warns_of_the_clip_that_ranked(
    run: Run,  # noqa: F811
    folders: tuple[Path, Path],
    tiny_folder: Path,
) -> None:
    drawn, real = folders
    command = ("evaluate", "distance", drawn, real, "--features", tiny_folder)
    unknown = run(*command)
    assert unknown.code == 0 and "independent" not in unknown.err
    save_png(Image.new("RGB", (32, 32)), drawn / "0.png", {"family": {"name": "tiny"}})
    assert "the CLIP of tiny" in run(*command).err
    (drawn / "settings.json").write_text(json.dumps({"family": "other", "pipeline": "dalle1"}))
    assert "independent" not in run(*command).err
    (drawn / "settings.json").write_text(json.dumps({"family": "tiny", "pipeline": "dalle1"}))
    assert "the CLIP of tiny" in run(*command).err


def test_one_unranked_picture_of_each_prompt_of_a_report(run: Run, tiny_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from pipelines.distance_command import first_of_each

    file = tmp_path / "prompts.txt"
    file.write_text("a cat\ntwo dogs\n", encoding="utf-8")
    out = tmp_path / "out"
    run("evaluate", tiny_folder, "--pipeline", "dalle1", "--prompts", file, "--candidates", 1, "--out", out)
    report = json.loads((out / "dalle1-1" / "report.json").read_text())
    first = [next(each["file"] for each in row["pictures"] if each["seed"] == 0) for row in report["pictures"]]
    assert first_of_each(out / "dalle1-1") == [out / "dalle1-1" / name for name in first]
    assert "--one-each" in refused(run("evaluate", "distance", out, "scenes", "--one-each"))
    verdicts = out / "dalle1-1" / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text().replace('"seed": 0', '"seed": 9'))
    assert "only the best" in refused(run("evaluate", "distance", out / "dalle1-1", "scenes", "--one-each"))


def test_what_the_command_refuses(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    drawn, real = folders
    empty = tmp_path / "empty"
    empty.mkdir()
    file = picture(tmp_path / "file.png")
    command = ("evaluate", "distance")
    assert "No pictures were found" in refused(run(*command, empty, real))
    assert "No pictures were found" in refused(run(*command, drawn, empty))
    assert "is a file" in refused(run(*command, file, real))
    assert "no file or folder" in refused(run(*command, drawn, tmp_path / "none"))
    assert "neighbours" in refused(run(*command, drawn, real, "--k", 0))
    assert "At least 10 pictures" in refused(run(*command, drawn, real, "--k", 9))
    assert "no CLIP" in refused(run(*command, drawn, real, "--features", "nobody"))
    assert "--inception" in refused(run(*command, drawn, real, "--inception", file))
    (empty / "broken.png").write_bytes(b"no")
    assert "None of the 1 pictures" in refused(run(*command, empty, real))
