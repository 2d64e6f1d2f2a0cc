"""What reranking buys: the expected CLIP score of the best of N candidates (DALL-E 1, 2102.12092, 2.6 and figure 6).

Legend: P prompts, M candidates drawn per prompt.
"""

import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor

from genpipe.errors import InputError


def expected_best(scores: Tensor, n: int) -> Tensor:
    """Expected maximum of n scores drawn without replacement from each row of scores (P, M) -> (P,).

    Exact: the i-th smallest of M (from 1) is the best of C(i - 1, n - 1) of the C(M, n) subsets. Raises InputError for
    n outside 1 ... M.
    """
    total = scores.shape[-1]
    if not 1 <= n <= total:
        raise InputError(f"the best of {n} is asked for, but {total} candidates were drawn; choose 1 to {total}")
    weights = torch.tensor(
        [math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)], dtype=torch.float64
    )
    return scores.double().sort(dim=-1).values @ weights.to(scores.device)


def best_of_n_curve(scores: Tensor) -> list[dict[str, float]]:
    """Mean over prompts and its standard error for N = 1, 2, 4, ... up to M, from scores (P, M)."""
    curve = []
    n = 1
    while n <= scores.shape[1]:
        best = expected_best(scores, n)
        error = float(best.std() / len(best) ** 0.5) if len(best) > 1 else 0.0
        curve.append({"n": float(n), "score": float(best.mean()), "standard_error": error})
        n *= 2
    return curve


def check_matplotlib() -> None:
    """Raise InputError when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing curves needs matplotlib; install it with pip install matplotlib.")


def plot_curve(curve: list[dict[str, float]], path: Path, reference: float | None = None) -> None:
    """Draw the curve with error bars as a PNG; `reference` is the mean score of real pictures with their own captions.

    Raises InputError when matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    x, y, bars = ([point[key] for point in curve] for key in ("n", "score", "standard_error"))
    axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, label="drawn, best of N")
    if reference is not None:
        axes.axhline(reference, linestyle="--", color="grey", label="real scenes")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [str(int(n)) for n in x])
    axes.set_xlabel("N candidates")
    axes.set_ylabel("CLIP score (cosine)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
