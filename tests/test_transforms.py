"""transforms.py: the crops of DALL-E 1's two stages, exact where they are exact, within their bounds where random."""

import numpy as np
import pytest
from PIL import Image

from genpipe import images
from genpipe.data.transforms import CropConfig, centre_crop, crop, stage_1_crop, stage_2_crop
from genpipe.errors import InputError


def coordinates(width: int, height: int) -> Image.Image:
    """Each pixel holds its own place: red is x, green is y."""
    levels = np.zeros((height, width, 3), np.uint8)
    levels[:, :, 0], levels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(levels)


def test_centre_crop_without_resizing_is_exact():
    square = crop(coordinates(20, 8), centre_crop(8))
    assert square.shape == (3, 8, 8) and square.dtype == np.uint8 and square.flags["C_CONTIGUOUS"]
    assert square[0, 0].tolist() == list(range(6, 14))
    assert square[1, :, 0].tolist() == list(range(8))
    assert crop(coordinates(8, 21), centre_crop(8))[1, :, 0].tolist() == list(range(6, 14))


def test_centre_crop_shrinks_by_area():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    means = np.asarray(picture, dtype=np.float64).reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
    difference = crop(picture, centre_crop(4)).transpose(1, 2, 0) - means
    assert np.abs(difference).max() <= 1  # rounded twice, once along each side


def test_small_pictures_are_enlarged_smoothly():
    enlarged = crop(coordinates(4, 4), centre_crop(16))
    assert enlarged.shape == (3, 16, 16)
    expected = images.to_levels(images.resize(images.to_unit([coordinates(4, 4)]), 16))[0].transpose(2, 0, 1)
    assert np.abs(enlarged.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("config", [stage_1_crop(32), stage_2_crop(32), centre_crop(32)])
@pytest.mark.parametrize("size", [(200, 90), (32, 32), (5, 70), (1, 1)])
def test_every_crop_has_its_size_and_follows_its_generator(config, size):
    picture = Image.effect_noise(size, 80).convert("RGB")
    before = picture.tobytes()
    first, again = (crop(picture, config, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (3, 32, 32) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert picture.tobytes() == before


def offsets(config: CropConfig, picture: Image.Image, draws: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.array([crop(picture, config, generator)[0, 0, 0] for _ in range(draws)])


def test_the_first_square_lies_where_the_stage_says():
    wide = coordinates(96, 16)  # 80 pixels of room
    anywhere = offsets(CropConfig(16, spread=1.0), wide, 3000)
    assert (anywhere.min(), anywhere.max()) == (0, 80)
    near = offsets(CropConfig(16, spread=1 / 4), wide, 1000)
    assert (near.min(), near.max()) == (30, 50)  # 3/8 and 5/8 of the room
    assert stage_1_crop(16).spread == 1.0 and stage_2_crop(16).spread == 1 / 4


def test_the_zoom_stays_within_the_papers_bounds():
    def sides(config: CropConfig) -> list[int]:
        # Red grows by one per pixel of the picture, so by 240 / side per pixel of the crop; flips change the sign.
        generator = np.random.default_rng(1)
        rows = [crop(coordinates(240, 240), config, generator)[0, 0].astype(float) for _ in range(400)]
        return [round(240 / abs(row[-1] - row[0]) * (len(row) - 1)) for row in rows]

    first, second = sides(stage_1_crop(64)), sides(stage_2_crop(64))
    assert 70 <= min(first) <= 74 and 92 <= max(first) <= 98  # 9/8 * 64 = 72, 12/8 * 64 = 96
    assert 63 <= min(second) <= 65 and 70 <= max(second) <= 74  # 64, 72


def test_no_enlarging_for_the_zoom():
    exact = coordinates(32, 32)
    stage = CropConfig(32, spread=1.0, zoom_min=9 / 8, zoom_max=12 / 8)
    assert np.array_equal(crop(exact, stage, np.random.default_rng(0)), np.asarray(exact).transpose(2, 0, 1))


def test_only_stage_1_flips_and_half_of_the_time():
    picture = coordinates(32, 32)
    flipped = [crop(picture, stage_1_crop(32), np.random.default_rng(seed))[0, 0, 0] == 31 for seed in range(400)]
    assert 150 < sum(flipped) < 250
    assert not any(crop(picture, stage_2_crop(32), np.random.default_rng(seed))[0, 0, 0] for seed in range(50))


def test_pictures_of_other_modes_are_flattened():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (crop(clear, centre_crop(4)) == 255).all()


def test_bad_arguments_are_refused():
    for arguments in (
        {"size": 0},
        {"size": 8, "spread": 1.5},
        {"size": 8, "zoom_min": 0.5},
        {"size": 8, "zoom_min": 2},
        {"size": 8, "mode": "x"},
    ):
        with pytest.raises(InputError):
            CropConfig(**arguments)
    with pytest.raises(ValueError, match="generator"):
        crop(coordinates(8, 8), stage_1_crop(8))
