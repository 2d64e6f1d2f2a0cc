"""Any picture file -> upright RGB: safe on hostile files, one clear sentence for each that cannot be used."""

import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from genpipe.errors import InputError

MAX_PIXELS = 100_000_000  # refuse larger pictures before decoding them; 100 megapixels are 300 MB as RGB

# Only formats that Pillow decodes by itself: EPS, for one, would start Ghostscript on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
PICTURE_EXTENSIONS = frozenset(
    ".png .apng .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2".split()
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read any picture file as an upright RGB picture; see `decode_picture` for what is converted how.

    Raises InputError, one sentence with the path, for a file that is missing, a folder, unreadable, empty, not a
    picture, corrupt, or larger than `max_pixels` (known from its header, before anything is decoded).
    """
    name = repr(str(path))
    with open_file(path) as file:
        return decode_picture(file, name, max_pixels)


def decode_picture(file: IO[bytes], name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a seekable binary file (`io.BytesIO` for bytes) into an upright RGB picture.

    First frame of an animation; EXIF orientation applied; transparency laid over white; palette, grey and CMYK
    converted; 16-bit grey scaled (divided by 257), not clipped. `name` stands for the file in the InputError.
    """
    image = read_header(file, name)
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"The picture {name} has {width}x{height} = {width * height:,} pixels and the limit is {max_pixels:,}; "
            "make it smaller first."
        )
    # Pillow's decoders raise almost any exception on a hostile file, from zlib.error to KeyError.
    try:
        image.seek(0)
        image.load()
        return _turn_upright(flatten(image), image)
    except InputError as error:
        raise InputError(f"The picture {name} cannot be used: {error}") from error
    except Exception as error:
        raise InputError(f"The picture {name} is corrupt or cut short ({one_line(error)}); replace it.") from error


def flatten(image: Image.Image) -> Image.Image:
    """A picture of any mode -> RGB: transparency over white, 16-bit grey divided by 257; the argument is not changed.

    Raises InputError for 32-bit pictures, whose range no file states.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return _flatten_16_bit(image)
    if image.mode == "F":
        raise InputError("it has 32-bit float pixels of unknown range, save it with 8 or 16 bits.")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _flatten_16_bit(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64)  # (H, W)
    if levels.min() < 0 or levels.max() > 65535:
        raise InputError("it has 32-bit integer pixels of unknown range, save it with 8 or 16 bits.")
    grey = np.rint(levels / 257).astype(np.uint8)  # 65535 = 255 * 257, so 8-bit levels come back exactly
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: the one grey level that means "nothing here"
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _turn_upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    # Read after decoding: Pillow turns TIFF files by itself and then removes the tag.
    try:
        orientation = source.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken EXIF beside sound pixels: keep the picture as stored
        orientation = None
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    upright = picture.copy() if turn is None else picture.transpose(turn)
    upright.info.clear()  # or the EXIF data would have the picture turned a second time
    return upright


def read_header(file: IO[bytes], name: str, formats: Sequence[str] = FORMATS) -> Image.Image:
    """An undecoded picture of one of `formats`; raises InputError, in which `name` stands for the file."""
    # In place of Image.open, whose own size check can only be moved for the whole process and does not tell the size.
    prefix = file.read(16)
    if not prefix:
        raise InputError(f"The file {name} is empty; replace it.")
    Image.init()
    for factory, accept in (Image.OPEN[format] for format in formats if format in Image.OPEN):
        try:
            if accept is None or accept(prefix) is True:
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # Pillow's way of saying "not mine"
        except Exception as error:
            raise InputError(f"The picture {name} has a broken header ({one_line(error)}); replace it.") from error
    raise InputError(f"The file {name} is not a picture that can be read ({', '.join(formats)}).")


def open_file(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading; raises InputError."""
    name = repr(str(path))
    try:
        mode = os.stat(path).st_mode  # asked before opening, which would wait for ever on a named pipe
        if stat.S_ISREG(mode):
            return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {name}.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"The file {name} cannot be read: {one_line(error)}.") from error
    what = "a folder" if stat.S_ISDIR(mode) else "a device or pipe"
    raise InputError(f"{name} is {what} where a picture file is needed.")


def find_pictures(paths: Sequence[str | Path]) -> list[Path]:
    """Files as given, folders searched recursively by extension and sorted; each path once.

    Names that begin with a dot are passed over. Raises InputError for a missing path, a folder that cannot be read and
    where nothing was found.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if os.path.isdir(path):
            found += sorted(file for file in _walk(path) if file.suffix.lower() in PICTURE_EXTENSIONS)
        elif os.path.exists(path):
            found.append(path)
        else:
            raise InputError(f"There is no file or folder {str(path)!r}.")
    if not found:
        names = ", ".join(repr(str(path)) for path in paths) or "nothing"
        raise InputError(f"No pictures were found in {names}; give picture files or a folder that holds some.")
    return list(dict.fromkeys(found))


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"The folder {str(error.filename)!r} cannot be read: {one_line(error)}.") from error

    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk goes down what is left here
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return files


def one_line(error: BaseException) -> str:
    """What went wrong, short and on one line, to stand inside a sentence."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(reason.split())[:200].rstrip(".") or type(error).__name__
