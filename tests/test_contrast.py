"""Weights by contrast, worked out by hand."""

import torch

from genpipe.training.contrast import contrast_weight


def test_pictures_of_little_contrast_weigh_more_by_hand() -> None:
    halves = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 4, 2)  # half of the pixels one way of the mean
    x_0 = torch.cat([0.8 * halves + 0.1, 0.2 * halves - 0.5, torch.full_like(halves, 0.7)])
    kept = x_0.clone()
    weight = contrast_weight(x_0, 1.0)
    by_hand = torch.tensor([1 / 0.8, 1 / 0.2, 1 / 0.02])  # an empty picture weighs as one of the least contrast
    torch.testing.assert_close(weight, by_hand / by_hand.mean())
    torch.testing.assert_close(contrast_weight(x_0, 2.0), by_hand.square() / by_hand.square().mean())
    assert contrast_weight(x_0, 0.0).tolist() == [1, 1, 1] and torch.equal(x_0, kept)
