"""Guidance and thresholding against values worked out by hand (2112.10741, 2.3; 2205.11487, 2.3)."""

import pytest
import torch

from genpipe.dalle2.guidance import classifier_free, dynamic_threshold


def test_guidance_by_hand() -> None:
    conditional, null = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    before = conditional.clone(), null.clone()
    assert classifier_free(conditional, null, 1.0).tolist() == [1, 2]
    assert classifier_free(conditional, null, 0.0).tolist() == [0.5, 4]
    assert classifier_free(conditional, null, 3.0).tolist() == [2, -2]  # 0.5 + 3 * 0.5 and 4 + 3 * -2
    assert torch.equal(conditional, before[0]) and torch.equal(null, before[1])


def test_dynamic_thresholding_by_hand() -> None:
    # Sorted absolute values 0 1 2 4 8: three quarters of the way is 4. The second row stays within [-1, 1].
    x_0 = torch.tensor([[0.0, 1.0, 2.0, 4.0, -8.0], [0.1, -0.2, 0.3, 0.4, -1.0]])
    before = x_0.clone()
    limited = dynamic_threshold(x_0, 0.75)
    assert limited[0].tolist() == [0, 0.25, 0.5, 1, -1]
    assert torch.equal(limited[1], x_0[1])
    assert torch.equal(x_0, before)


def test_dynamic_thresholding_never_enlarges_and_the_highest_percentile_only_scales() -> None:
    x_0 = (
        torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1, 5, 50])[:, None, None, None]
    )
    limited = dynamic_threshold(x_0, 1.0)
    largest = x_0.abs().flatten(1).amax(dim=1).clamp(min=1)
    torch.testing.assert_close(limited, x_0 / largest[:, None, None, None])
    for percentile in (0.01, 0.5, 0.995):
        limited = dynamic_threshold(x_0, percentile)
        assert limited.abs().max() <= 1 and bool((limited.abs() <= x_0.abs()).all())
        assert torch.equal(limited.sign(), x_0.sign())


def test_a_row_is_thresholded_alone_and_keeps_its_precision() -> None:
    x_0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 3
    rows = torch.cat([dynamic_threshold(row[None], 0.9) for row in x_0])
    assert torch.equal(dynamic_threshold(x_0, 0.9), rows)
    assert dynamic_threshold(x_0.half(), 0.9).dtype == torch.float16
    assert dynamic_threshold(x_0.double(), 0.9).dtype == torch.float64


def test_a_row_may_be_larger_than_what_torch_sorts_at_once() -> None:
    x_0 = torch.ones(2, 2**23 + 1)  # more than 2^24 numbers together
    assert float(dynamic_threshold(2 * x_0, 0.5).max()) == pytest.approx(1)
