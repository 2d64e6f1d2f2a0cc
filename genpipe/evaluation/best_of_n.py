"""What reranking buys: the expected CLIP score of the best of N candidates (DALL-E 1, 2102.12092, 2.6 and figure 6).

And, where a judge said of each candidate whether it is right, the share of right ones among the best.

Legend: P prompts, M candidates drawn per prompt.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from genpipe.errors import InputError

_CONFIDENT = 1.96  # standard errors to either side that hold 95 % of a normal distribution


def expected_best(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """Expected maximum of n scores drawn without replacement from each row of scores (P, M) -> (P,).

    values (P, M): what is expected of the candidate of the largest score instead, say whether it is right. Exact: the
    i-th smallest of M (from 1) is the best of C(i - 1, n - 1) of the C(M, n) subsets. Raises InputError for n outside
    1 ... M.
    """
    total = scores.shape[-1]
    if not 1 <= n <= total:
        raise InputError(f"the best of {n} is asked for, but {total} candidates were drawn; choose 1 to {total}")
    weights = torch.tensor(
        [math.comb(i - 1, n - 1) / math.comb(total, n) for i in range(1, total + 1)], dtype=torch.float64
    )
    order = scores.argsort(dim=-1, stable=True)
    return (scores if values is None else values).double().gather(-1, order) @ weights.to(scores.device)


def best_of_n_curve(scores: Tensor, values: Tensor | None = None) -> list[dict[str, float]]:
    """Mean over prompts and its standard error for N = 1, 2, 4, ... up to M; (P, M) as for `expected_best`."""
    curve = []
    n = 1
    while n <= scores.shape[1]:
        best = expected_best(scores, n, values)
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
    label = "CLIP score (cosine)"
    plot_curves({label: {"drawn, best of N": curve}}, path, {} if reference is None else {label: reference})


def plot_curves(
    panels: Mapping[str, Mapping[str, list[dict[str, float]]]], path: Path, references: Mapping[str, float]
) -> None:
    """Curves side by side as a PNG: label of the y axis -> name of a curve -> its points; bars: 95 % of the prompts.

    references: label -> level of real pictures. Raises InputError when matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.2), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(ncols=len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in curves.items():
            x, y, errors = ([point[key] for point in curve] for key in ("n", "score", "standard_error"))
            axes.errorbar(x, y, yerr=[_CONFIDENT * error for error in errors], marker="o", capsize=3, label=name)
        all_n = sorted({point["n"] for curve in curves.values() for point in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(all_n, [str(int(n)) for n in all_n])
        if label in references:
            axes.axhline(references[label], linestyle="--", color="grey", label="real scenes")
        axes.set_xlabel("N candidates")
        axes.set_ylabel(label)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
