"""Looks at what `genpipe generate "three strawberries on a white background"` drew: size, not flat, white, some red."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder, info = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
(family,) = [family for family in info["families"] if family["name"] == "nano"]
names = sorted(path.name for path in folder.iterdir())
assert names == ["0001-1.png", "0001-2.png", "0001-3.png", "0001-4.png", "0001-grid.png"], names

white, red = 0, 0
for name in names[:4]:
    image = Image.open(folder / name)
    assert image.size == (4 * family["resolution"],) * 2 and family["resolution"] >= 32, image.size  # upsampled
    assert json.loads(image.text["genpipe"])["prompt"] == "three strawberries on a white background"
    pixels = np.asarray(image.convert("RGB")).astype(int)  # H, W, 3
    assert pixels.std() > 10, f"{name} is flat"
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    white += bool((np.median(border, axis=0) > 190).all())
    red += bool((pixels[..., 0] - pixels[..., 1:].max(axis=-1) > 60).mean() > 0.02)
print(f"of the 4 best pictures, {white} have a white background and {red} show something red")
assert white >= 2 and red >= 2, "the pictures do not show what was asked for"
