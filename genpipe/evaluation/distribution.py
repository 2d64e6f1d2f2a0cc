"""How far a set of drawn pictures lies from a set of real ones: Frechet distance, CMMD, precision and recall.

Each takes features alone, whatever they are of: see features.py. All is computed in float64, and no matrix of all pairs
is ever in memory.

Legend: M, N pictures of the two sets, D features of a picture.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from genpipe.errors import InputError

SIGMA, SCALE = 10.0, 1000.0  # of CMMD
_PAIRS = 2**23  # numbers of a block of pairs: 64 MiB
_EPSILON = 1e-12  # rounding of a squared distance, as a share of the largest squared length


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of Gaussians with the moments of a (M, D) and b (N, D): FID (1706.08500, equation 6).

    0 for equal moments, no upper end. It comes out too large for few pictures, the more the larger D is: compare equal
    numbers of them only. Raises InputError for fewer than 2 rows, other shapes, numbers that are not finite.
    """
    a, b = _checked(a, b, least=2)
    m, m_w = a.mean(dim=0), b.mean(dim=0)
    root, root_w = _square_root(torch.cov(a.T)), _square_root(torch.cov(b.T))  # of C and C_w
    # Tr((C C_w)^(1/2)) is the sum of the singular values of C^(1/2) C_w^(1/2), which no rounding makes imaginary.
    mixed = torch.linalg.svdvals(root @ root_w).sum()
    distance = (m - m_w).square().sum() + root.square().sum() + root_w.square().sum() - 2 * mixed
    return max(0.0, float(distance))


def _square_root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance (D, D), by its eigenvalues; rounding may leave tiny negative ones."""
    values, vectors = torch.linalg.eigh(torch.atleast_2d(covariance))  # of a single feature, it is a number
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD of CLIP embeddings a (M, D) and b (N, D) of length 1 (2401.09603, 4): squared MMD, Gaussian kernel, x 1000.

    The paper's unbiased estimator: about 0 for samples of one distribution, on either side of it. (Its reference
    implementation also counts each picture beside itself, which adds a few units divided by M, and by N.)
    Raises InputError for fewer than 2 rows, other shapes, rows of another length, numbers that are not finite.
    """
    x, y = _checked(a, b, least=2)
    if any(bool(((each.norm(dim=1) - 1).abs() > 1e-3).any()) for each in (x, y)):
        raise InputError("CMMD is defined for embeddings of length 1; normalise them first.")
    m, n = len(x), len(y)
    within_x = (_kernel_sum(x, x) - m) / (m * (m - 1))  # k(x, x) = 1 is left out
    within_y = (_kernel_sum(y, y) - n) / (n * (n - 1))
    return SCALE * (within_x + within_y - 2 * _kernel_sum(x, y) / (m * n))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """Sum of k(x_i, y_j) = exp(-|x_i - y_j|^2 / (2 sigma^2)) over all pairs of (M, D) and (N, D)."""
    return sum(float(torch.exp(-d / (2 * SIGMA**2)).sum()) for d in _squared_distances(x, y))


def precision_recall(real: Tensor, drawn: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of real (M, D) and drawn (N, D) features, each in [0, 1] (1904.06991, 2).

    Precision: share of drawn pictures within the manifold of the real ones, which is all that lies no farther from a
    real picture than its k-th nearest neighbour among them. Recall: share of the real ones within that of the drawn.
    Raises InputError for k below 1, not more than k rows, other shapes, numbers that are not finite.
    """
    if k < 1:
        raise InputError(f"The number of neighbours must be at least 1, not {k}.")
    real, drawn = _checked(real, drawn, least=k + 1)
    return _share_within(drawn, real, k), _share_within(real, drawn, k)


def _share_within(phi: Tensor, manifold: Tensor, k: int) -> float:
    """Share of phi (N, D) for which f(phi, manifold (M, D)) is 1 (equation 1)."""
    # Each picture is its own nearest neighbour, at distance 0: hence k + 1.
    radii = torch.cat([d.kthvalue(k + 1, dim=1).values for d in _squared_distances(manifold, manifold)])  # M
    slack = _EPSILON * max(float(each.square().sum(dim=1).max()) for each in (phi, manifold))
    within = [(d <= radii + slack).any(dim=1) for d in _squared_distances(phi, manifold)]
    return float(torch.cat(within).double().mean())


def distribution_figures(real: Tensor, drawn: Tensor, k: int = 3) -> dict[str, float]:
    """All of them, of features (M, D) and (N, D) of any length; CMMD of their directions. Raises as those do."""
    precision, recall = precision_recall(real, drawn, k)
    return {
        "frechet_distance": frechet_distance(real, drawn),
        "cmmd": cmmd(F.normalize(real.double(), dim=1), F.normalize(drawn.double(), dim=1)),
        "precision": precision,
        "recall": recall,
    }


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """|x_i - y_j|^2 of (M, D) and (N, D), some rows (m, N) at a time."""
    lengths = y.square().sum(dim=1)
    for rows in x.split(max(1, _PAIRS // len(y))):
        yield (rows.square().sum(dim=1)[:, None] + lengths - 2 * rows @ y.T).clamp_(min=0)


def _checked(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both in float64, or InputError."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(f"Two sets of features of one width are compared, not {list(a.shape)} and {list(b.shape)}.")
    if min(len(a), len(b)) < least:
        raise InputError(f"At least {least} pictures of each set are needed, got {len(a)} and {len(b)}.")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError("A feature is not a finite number; pictures or weights are damaged.")
    return a.double(), b.double()
