"""images.py: exact value ranges, one resize, every kind of picture file, PNG recipes, grids, and each refusal."""

import contextlib
import io
import json
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from genpipe import images
from genpipe.errors import InputError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(
    width: int, height: int, *extra: bytes, depth: int = 8, colour: int = 0, rows: bytes = b"\x00\x00"
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def refusal(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        images.open_picture(path, **options)
    message = str(caught.value)
    assert str(path.name) in message
    assert "\n" not in message and message.endswith(".")
    return message


# Value ranges


def test_every_level_comes_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    unit = images.to_unit(levels)
    assert unit.dtype == torch.float32 and unit.shape == (1, 3, 16, 16)
    assert unit.min() == 0 and unit.max() == 1
    assert np.array_equal(images.to_levels(unit)[0, :, :, 0].ravel(), np.arange(256))
    signed = images.unit_to_signed(unit)
    assert signed.min() == -1 and signed.max() == 1
    assert np.array_equal(images.to_levels(images.signed_to_unit(signed))[0, :, :, 2].ravel(), np.arange(256))


def test_to_unit_agrees_between_pil_array_and_tensor():
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    pictures = [Image.fromarray(level.transpose(1, 2, 0).copy()) for level in levels]
    from_array = images.to_unit(levels)
    assert torch.equal(images.to_unit(pictures), from_array)
    assert torch.equal(images.to_unit(torch.from_numpy(levels)), from_array)
    assert torch.equal(images.to_unit(levels[0]), from_array[:1])
    back = images.to_pil(from_array)
    assert [picture.size for picture in back] == [(5, 4), (5, 4)]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(back, pictures, strict=True))


def test_stack_levels_moves_the_channels_first():
    pictures = [np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8) for seed in range(2)]
    stacked = images.stack_levels(pictures)
    assert stacked.shape == (2, 3, 4, 5)
    assert np.array_equal(stacked[1, 2], pictures[1][:, :, 2])
    assert np.array_equal(images.to_levels(images.to_unit(stacked)), np.stack(pictures))


def test_to_levels_rounds_and_clips():
    pixels = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 3.0]).expand(1, 3, 1, 6)
    assert images.to_levels(pixels)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("wrong", [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 3, 4, 4), np.float32), []])
def test_to_unit_refuses_other_layouts(wrong):
    with pytest.raises(InputError):
        images.to_unit(wrong)


def test_to_unit_refuses_mixed_sizes():
    with pytest.raises(InputError, match=r"\(2, 2\), \(3, 2\)"):
        images.to_unit([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])


def test_to_levels_refuses_what_is_not_a_number():
    with pytest.raises(ValueError, match="finite"):
        images.to_levels(torch.full((3, 2, 2), float("nan")))


def test_lab_of_known_colours() -> None:
    colours = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]).T[None, :, :, None]
    # Values of CIE 15 under D65, as tabulated.
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    assert torch.allclose(images.lab(colours)[0, :, :, 0].T, expected, atol=0.05)


# Resize


@pytest.mark.parametrize(
    ("mode", "size"), [("bicubic", (15, 20)), ("bicubic", (50, 70)), ("bilinear", (15, 20)), ("area", (8, 24))]
)
def test_both_resizes_agree(mode, size):
    # No level near 0 or 255: Pillow would cut off what overshoots there between its two passes.
    levels = np.random.default_rng(1).integers(64, 192, (1, 3, 32, 48), dtype=np.uint8)
    ours = images.to_levels(images.resize(images.to_unit(levels), size, mode=mode))[0].astype(int)
    pillow = images.resize_picture(Image.fromarray(levels[0].transpose(1, 2, 0).copy()), size, mode)
    assert pillow.size == size[::-1]
    assert np.abs(ours - np.asarray(pillow)).max() <= 1


def test_resize_by_area_is_the_mean_of_blocks():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    means = pixels.reshape(2, 3, 4, 2, 4, 2).mean(dim=(3, 5))
    assert torch.allclose(images.resize(pixels, 4, mode="area"), means, atol=1e-6)


def test_resize_clamps_only_when_asked_and_leaves_its_input():
    pixels = (torch.arange(64).reshape(1, 1, 8, 8) % 2).float().expand(1, 3, 8, 8).contiguous()
    before = pixels.clone()
    free, clamped = images.resize(pixels, 24), images.resize(pixels, 24, clamp=True)
    assert free.max() > 1 and free.min() < 0
    assert torch.equal(clamped, free.clamp(0, 1))
    assert torch.equal(pixels, before)
    assert images.resize(pixels.half(), 5).dtype == torch.float16
    assert torch.equal(images.resize(pixels, 8), pixels)


def test_resize_refuses_an_empty_size():
    with pytest.raises(InputError, match="0x0"):
        images.resize(torch.zeros(1, 3, 4, 4), 0)


# Reading pictures


def test_open_picture_lays_transparency_over_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    rgba.save(tmp_path / "rgba.png")
    la = Image.new("LA", (2, 1), (10, 255))
    la.putpixel((1, 0), (10, 0))
    la.save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "key.png", transparency=(7, 8, 9))
    for name, first in [
        ("rgba.png", (255, 0, 0)),
        ("la.png", (10, 10, 10)),
        ("p.png", (255, 0, 0)),
        ("p.gif", (255, 0, 0)),
    ]:
        picture = images.open_picture(tmp_path / name)
        assert picture.mode == "RGB"
        assert picture.getpixel((0, 0)) == first and picture.getpixel((1, 0)) == (255, 255, 255), name
    assert images.open_picture(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


def test_open_picture_half_transparent_black_is_mid_grey(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert images.open_picture(tmp_path / "half.png").getpixel((0, 0)) == (127, 127, 127)


def test_open_picture_converts_grey_bilevel_and_cmyk(tmp_path):
    Image.new("L", (3, 2), 77).save(tmp_path / "grey.jpg", quality=100)
    assert images.open_picture(tmp_path / "grey.jpg").getpixel((1, 1)) == (77, 77, 77)
    Image.new("1", (3, 2), 1).save(tmp_path / "bits.png")
    assert images.open_picture(tmp_path / "bits.png").getpixel((1, 1)) == (255, 255, 255)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = images.open_picture(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 245 and green < 10 and blue < 10


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "16.png")
    assert np.asarray(images.open_picture(tmp_path / "16.png"))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]
    assert np.asarray(images.flatten(Image.fromarray(levels.astype(np.int32))))[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(levels).save(tmp_path / "16.tif")
    assert images.open_picture(tmp_path / "16.tif").getpixel((2, 0)) == (128, 128, 128)


def test_32_bit_pictures_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert "32-bit float" in refusal(tmp_path / "float.tif")
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "int.tif")
    assert "32-bit integer" in refusal(tmp_path / "int.tif")


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, extension):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (16, 16), colour) for colour in colours]
    path = tmp_path / f"moving.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(path) as stored:
        assert stored.n_frames == 3
    assert images.open_picture(path).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "tif"])
def test_orientation_is_applied_once(tmp_path, orientation, extension):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = (255, 255, 255)  # the top left corner is white
    stored = {  # how a camera stores the upright picture under this tag
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{extension}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    picture = images.open_picture(path)
    assert picture.size == (24, 16)
    assert np.abs(np.asarray(picture).astype(int) - upright).max() < 40
    assert not picture.getexif().get(0x0112)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_picture(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "exif.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert images.open_picture(tmp_path / "exif.png").getpixel((0, 0)) == (1, 2, 3)


def test_a_picture_above_the_limit_is_refused_from_its_header(tmp_path, recwarn):
    bomb = tmp_path / "bomb.png"
    for side in (11_000, 40_000):  # Pillow alone would warn about the first and hide the size of the second
        bomb.write_bytes(raw_png(side, side))
        message = refusal(bomb)
        assert f"{side}x{side}" in message and "100,000,000" in message
    Image.new("RGB", (20, 10)).save(tmp_path / "small.png")
    assert "20x10" in refusal(tmp_path / "small.png", max_pixels=199)
    assert images.open_picture(tmp_path / "small.png", max_pixels=200).size == (20, 10)
    assert not recwarn.list


def test_corrupt_files_are_refused(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.jpg")
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        cut.write_bytes(data[: len(data) // 2])
        assert "corrupt" in refusal(cut)
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("this is no picture\n")
    assert "not a picture" in refusal(tmp_path / "text.png")
    (tmp_path / "p.ppm").write_bytes(b"P")
    assert "not a picture" in refusal(tmp_path / "p.ppm")
    (tmp_path / "ghost.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert "not a picture" in refusal(tmp_path / "ghost.png")
    (tmp_path / "text-bomb.png").write_bytes(
        raw_png(1, 1, chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"x" * 3_000_000)))
    )
    assert "broken header" in refusal(tmp_path / "text-bomb.png")


def test_what_is_no_file_is_refused(tmp_path):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "folder" in refusal(folder)
    assert "no file" in refusal(tmp_path / "missing.png")
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert "pipe" in refusal(pipe)
    with pytest.raises(InputError, match="null"):
        images.open_picture("a\0b.png")


@contextlib.contextmanager
def without_rights(path: Path):
    """Root may read and write everything, so its test becomes another user for a moment."""
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o700)


def test_what_may_not_be_read_or_written_is_refused(tmp_path):
    (tmp_path / "closed").mkdir()
    path = tmp_path / "closed" / "picture.png"
    Image.new("RGB", (2, 2)).save(path)
    with without_rights(tmp_path / "closed"):
        assert "Permission denied" in refusal(path)
        with pytest.raises(InputError, match="Permission denied"):
            images.save_png(Image.new("RGB", (2, 2)), tmp_path / "closed" / "new.png", {})
    assert os.listdir(path.parent) == ["picture.png"]


def test_decode_picture_from_memory():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    buffer.seek(0)
    assert images.decode_picture(buffer, "sample 7").getpixel((2, 1)) == (9, 8, 7)
    with pytest.raises(InputError, match="sample 8"):
        images.decode_picture(io.BytesIO(b"junk"), "sample 8")


def test_find_pictures(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp", ".hidden/d.png", "._a.jpg", "notes.txt"):
        (tmp_path / "in" / name).write_bytes(b"")
    odd = tmp_path / "picture.without-extension"
    odd.write_bytes(b"")
    found = images.find_pictures([odd, tmp_path / "in", odd])
    assert [path.name for path in found] == [odd.name, "a.jpg", "b.PNG", "c.webp"]
    with pytest.raises(InputError, match="missing"):
        images.find_pictures([tmp_path / "missing"])
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="No pictures"):
        images.find_pictures([tmp_path / "none"])


# PNG with its recipe


def test_recipe_comes_back_whole(tmp_path):
    recipe = {"prompt": "zwei Bären \U0001f43b\x07 \ud800", "seed": 7, "score": 0.25, "settings": {"top_k": None}}
    path = tmp_path / "new" / "folder" / "out.png"
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    images.save_png(picture, path, recipe)
    assert images.read_recipe(path) == recipe
    assert np.array_equal(np.asarray(images.open_picture(path)), np.asarray(picture))
    assert sorted(os.listdir(path.parent)) == ["out.png"]
    images.save_png(picture, path, {"seed": 8})
    assert images.read_recipe(path) == {"seed": 8}


def png_with_text(path: Path, key: str, text: str, zipped: bool = False) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(key, text, zip=zipped)
    Image.new("RGB", (1, 1)).save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "JSON list"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5_000, "not valid JSON"),
        (json.dumps({"prompt": "x" * 1_100_000}), "more than 1,000,000"),
    ],
)
def test_hostile_recipes_are_refused(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason):
        images.read_recipe(png_with_text(tmp_path / "hostile.png", "genpipe", text))


def test_files_without_a_recipe_are_refused(tmp_path):
    with pytest.raises(InputError, match="broken header"):
        images.read_recipe(png_with_text(tmp_path / "zip.png", "genpipe", "x" * 3_000_000, zipped=True))
    with pytest.raises(InputError, match="carries no recipe"):
        images.read_recipe(png_with_text(tmp_path / "other.png", "Software", "{}"))
    Image.new("RGB", (1, 1)).save(tmp_path / "picture.jpg")
    for name in ("picture.jpg", "missing.png"):
        with pytest.raises(InputError, match=name):
            images.read_recipe(tmp_path / name)


def test_save_png_refuses_and_leaves_nothing(tmp_path):
    picture = Image.new("RGB", (4, 4))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        images.save_png(picture, tmp_path / "file" / "out.png", {})
    (tmp_path / "out.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        images.save_png(picture, tmp_path / "out.png", {})
    with pytest.raises(InputError, match="JSON"):
        images.save_png(picture, tmp_path / "nan.png", {"score": float("nan")})
    with pytest.raises(InputError, match="1,000,000"):
        images.save_png(picture, tmp_path / "long.png", {"prompt": "x" * 1_000_000})
    assert sorted(os.listdir(tmp_path)) == ["file", "out.png"]


def test_a_failed_write_keeps_the_older_picture(tmp_path):
    path = tmp_path / "out.png"
    images.save_png(Image.new("RGB", (4, 4)), path, {"seed": 1})
    noise = Image.effect_noise((128, 128), 80).convert("RGB")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))  # the system refuses further bytes, as a full disk does
    try:
        with pytest.raises(InputError, match=r"out.png' cannot be written \(File too large\)"):
            images.save_png(noise, path, {"seed": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert images.read_recipe(path) == {"seed": 1}
    assert os.listdir(tmp_path) == ["out.png"]


# Grids


def test_grid_places_every_picture():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    grid = images.make_grid([Image.new("RGB", (4, 4), colour) for colour in colours], columns=2, scale=3, padding=2)
    assert grid.size == (2 + 2 * (12 + 2), 2 + 2 * (12 + 2))
    assert [grid.getpixel(at) for at in [(2, 2), (27, 13), (13, 27)]] == colours
    assert grid.getpixel((0, 0)) == grid.getpixel((20, 20)) == (255, 255, 255)


def test_grid_labels_stand_below_their_picture():
    pictures = [Image.new("RGB", (64, 32), (255, 0, 0))] * 2
    plain = images.make_grid(pictures, columns=2, padding=4)
    labelled = images.make_grid(pictures, columns=5, padding=4, labels=["", "two tigers on a red background"])
    assert labelled.width == plain.width and labelled.height > plain.height + 2 * 12
    pixels = np.asarray(labelled)
    assert (pixels[36:, :68] == 255).all()
    assert (pixels[36:, 72:] < 100).any()


def test_grid_keeps_labels_inside_their_cell():
    grid = images.make_grid([Image.new("RGB", (40, 8))], columns=1, padding=10, labels=["W" * 400 + " and more" * 400])
    pixels = np.asarray(grid)
    assert (pixels[18:, :9] == 255).all() and (pixels[18:, 52:] == 255).all()
    assert grid.height < 100


def test_grid_refuses_bad_numbers():
    one = [Image.new("RGB", (2, 2))]
    for arguments in (
        {"images": [], "columns": 1},
        {"images": one, "columns": 0},
        {"images": one, "columns": 1, "scale": 0},
    ):
        with pytest.raises(InputError):
            images.make_grid(**arguments)
    with pytest.raises(InputError, match="labels"):
        images.make_grid(one, columns=1, labels=["a", "b"])
