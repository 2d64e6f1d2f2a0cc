"""The attention masks of DALL-E 1 against masks drawn by hand (2102.12092, B.1)."""

import pytest
import torch

from genpipe.dalle1.masks import causal_mask, column_mask, convolutional_mask, layer_masks, row_mask

# What each of the 9 tokens of a 3 x 3 grid (one line each) sees of the 9 tokens.
ROW = """
    x........
    xx.......
    xxx......
    xxxx.....
    .xxxx....
    ..xxxx...
    ...xxxx..
    ....xxxx.
    .....xxxx
"""  # token 4, in the middle, sees tokens 1 and 2 of the row above: three tokens back, across the border of the row
COLUMN = """
    x........
    .x.......
    ..x......
    x..x.....
    .x..x....
    ..x..x...
    x..x..x..
    .x..x..x.
    ..x..x..x
"""
CONVOLUTIONAL = """
    x........
    xx.......
    .xx......
    xx.x.....
    xxxxx....
    .xx.xx...
    ...xx.x..
    ...xxxxx.
    ....xx.xx
"""  # kernel 3; token 3, first of its row, does not see token 2, the last of the row above


def parse(drawing: str) -> torch.Tensor:
    return torch.tensor([[mark == "x" for mark in line.strip()] for line in drawing.strip().splitlines()])


MASKS = {
    "row": (row_mask(2, 3), ROW),
    "column": (column_mask(2, 3), COLUMN),
    "convolutional": (convolutional_mask(2, 3, kernel=3), CONVOLUTIONAL),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_by_hand(kind: str) -> None:
    mask, drawing = MASKS[kind]
    assert mask.shape == (11, 11) and mask.dtype == torch.bool
    assert torch.equal(mask[2:, 2:], parse(drawing))


@pytest.mark.parametrize("kind", MASKS)
def test_the_prefix_is_causal_and_every_image_token_sees_all_of_it(kind: str) -> None:
    mask, _ = MASKS[kind]
    assert mask[:2, :2].tolist() == [[True, False], [True, True]]
    assert not mask[:2, 2:].any()
    assert mask[2:, :2].all()


def test_the_causal_mask_is_a_triangle() -> None:
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_papers_sizes() -> None:
    # Far from the borders, row: itself and the 32 tokens before; column: itself and the rows above; convolutional: five
    # whole rows of 11 above, and five tokens before itself.
    prefix, grid = 257, 32
    query = prefix + 16 * grid + 16
    assert int(row_mask(prefix, grid)[query].sum()) - prefix == 33
    assert int(column_mask(prefix, grid)[query].sum()) - prefix == 17
    assert int(convolutional_mask(prefix, grid, 11)[query].sum()) - prefix == 5 * 11 + 6


def kinds(num_layers: int) -> str:
    """First letters of the kinds of all layers' masks."""
    known = {"r": row_mask(2, 4), "c": column_mask(2, 4), "k": convolutional_mask(2, 4, 3)}
    masks = layer_masks(num_layers, 2, 4, kernel=3)
    return "".join(next(name for name, mask in known.items() if torch.equal(mask, found)) for found in masks)


def test_the_order_of_layers() -> None:
    assert kinds(1) == "k"
    assert kinds(2) == "rk"
    assert kinds(6) == "rcrrrk"  # layer 6 would be a column, but the last one is convolutional
    assert kinds(8) == "rcrrrcrk"
    assert kinds(64) == "rcrr" * 15 + "rcrk"
