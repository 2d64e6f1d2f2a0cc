"""Causal attention masks of DALL-E 1: row, column and convolutional (2102.12092, B.1, figure 11).

A mask is a boolean (T, T) tensor, True where the query (first axis) may look at the key (second axis). The sequence is
a prefix (text and start-of-image) followed by the N image tokens of a grid x grid raster, row by row. Image positions
look at the whole prefix in every layer.
"""

import torch
from torch import Tensor


def causal_mask(length: int) -> Tensor:
    """Lower triangle with diagonal, (length, length)."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def _image_pairs(grid: int) -> tuple[Tensor, Tensor]:
    """Raster indices of query (N, 1) and key (1, N)."""
    index = torch.arange(grid * grid)
    return index[:, None], index[None, :]


def _with_prefix(image_mask: Tensor, prefix: int) -> Tensor:
    """Embed an (N, N) image mask behind a causal prefix that every image position sees."""
    mask = causal_mask(prefix + image_mask.shape[0])
    mask[prefix:, prefix:] &= image_mask
    return mask


def row_mask(prefix: int, grid: int) -> Tensor:
    """The token itself and the `grid` tokens before it, which crosses the border between rows (figure 11 a)."""
    query, key = _image_pairs(grid)
    return _with_prefix(query - key <= grid, prefix)


def column_mask(prefix: int, grid: int) -> Tensor:
    """The tokens of the same column (figure 11 b)."""
    query, key = _image_pairs(grid)
    return _with_prefix((query - key) % grid == 0, prefix)


def convolutional_mask(prefix: int, grid: int, kernel: int = 11) -> Tensor:
    """The causal half of a kernel x kernel window around the token, cut at the picture's border (figure 11 d)."""
    query, key = _image_pairs(grid)
    reach = kernel // 2
    near_rows = (query // grid - key // grid).abs() <= reach
    near_columns = (query % grid - key % grid).abs() <= reach
    return _with_prefix(near_rows & near_columns, prefix)


def layer_masks(num_layers: int, prefix: int, grid: int, kernel: int = 11) -> list[Tensor]:
    """Masks of all layers in the paper's order: layer i (from 1) is column if (i - 2) mod 4 = 0, else row; the last is
    convolutional (2102.12092, B.1)."""
    kinds = {"row": row_mask(prefix, grid), "column": column_mask(prefix, grid)}
    masks = [kinds["column" if (i - 2) % 4 == 0 else "row"] for i in range(1, num_layers)]
    return [*masks, convolutional_mask(prefix, grid, kernel)]
