"""Muon beside AdamW: steps of hidden layers' matrices made orthogonal by Newton-Schulz iteration (2502.16982, 2).

torch's own Muon takes matrices only; here kernels take part as matrices of out x (in * height * width), and what is no
hidden matrix (gains, biases, tables, narrow layers) is stepped by AdamW in the same optimiser.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genpipe.training.precision import has_native_bf16

MOMENTUM = 0.95
NARROWEST = 32  # smaller side of a matrix that Muon takes; below, little is left to make orthogonal
_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic: singular values from 0.01 on come near 1 within five iterations


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with "muon": True are stepped by Muon, at the same learning rate (2502.16982, 2.2).

    Args: parameter groups, each with "muon", and AdamW's own settings.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of all groups."""
        groups = self.param_groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else []:
                if parameter.grad is not None:
                    self._step_matrix(parameter, group)
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:  # "step" is there because AdamW looks for it in whatever state it is given back
            state["step"], state["momentum"] = torch.tensor(0.0), torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        ahead = parameter.grad.lerp(momentum, MOMENTUM).reshape(len(parameter), -1)  # Nesterov's
        # An orthogonal matrix has entries of RMS 1 / sqrt(longer side); AdamW's steps have an RMS of about 0.2.
        rms = 0.2 * max(ahead.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonal(ahead).view_as(parameter), alpha=-group["lr"] * rms)


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrix U V^T of matrix = U S V^T, roughly: singular values between 0.7 and 1.2.

    By X <- a X + (b X X^T + c (X X^T)^2) X from X = matrix / |matrix|, in bfloat16 where that is native (2502.16982,
    2.1). matrix (M, N) -> (M, N) in its own type; a matrix of zeros stays one.
    """
    x = matrix.bfloat16() if has_native_bf16(matrix.device) else matrix.float()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    # Every factor is a polynomial of X X^T: of a long matrix that small square alone is iterated, and X multiplied
    # once. Its eigenvalues are squares of singular values, for which bfloat16 has too few digits.
    if x.dtype == torch.float32 and x.shape[1] > 2 * x.shape[0]:
        x = _iterate_square(x @ x.T, iterations) @ x
    else:
        for _ in range(iterations):
            x = _factor(x @ x.T) @ x
    return (x.T if tall else x).to(matrix.dtype)


def _factor(square: Tensor) -> Tensor:
    return _A * torch.eye(len(square), dtype=square.dtype, device=square.device) + _B * square + _C * square @ square


def _iterate_square(square: Tensor, iterations: int) -> Tensor:
    """The product of all iterations' factors, from X X^T (M, M)."""
    factor = product = _factor(square)
    for _ in range(iterations - 1):
        square = factor @ square @ factor
        factor = _factor(square)
        product = factor @ product
    return product
