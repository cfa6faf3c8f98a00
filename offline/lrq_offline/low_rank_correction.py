"""LRC (arXiv 2412.07902): a low-rank branch in 16 bits that corrects what rounding a layer's weight and input costs.

    y = W_hat Q(x) + U (V^T x)            W, W_hat [out, in], U [out, k], V [in, k]

Everything follows from the moments of the inputs x and of what the layer makes of them, y = Q(x), over the calibration tokens:
Sxx = sum x x^T, Syy = sum y y^T, Sxy = sum x y^T, each with 1% of its mean diagonal added to its diagonal. All in float64.

    objective   || W X - W_hat Y - U V^T X ||^2
    begin with  S = Sxx - Sxy Syy^-1 Sxy^T;   U = top-k eigenvectors of W S W^T;   V^T = U^T W
    each round  W_hat = rounded((W - U V^T) Sxy Syy^-1)
                M = W - W_hat Sxy^T Sxx^-1;   U = top-k eigenvectors of M Sxx M^T;   V^T = U^T M

The beginning is the best pair for a W_hat that need not be rounded, and the second step the best one for W_hat as it is. The
first step is only as good as the rounding: neither GPTQ nor rounding to nearest minimises anything exactly, so that a round can
end worse than the one before. The best round is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_offline.learned_scales import FixedRounding
from lrq_offline.ranks import ONE_RANK, Ranks

__all__ = [
    "Corrected",
    "LowRankPair",
    "MomentSums",
    "Moments",
    "best_pair",
    "by_energy",
    "corrected",
    "first_pair",
    "objective",
]

_REGULARIZATION = 0.01


@dataclass(frozen=True)
class Moments:
    """Sxx, Syy and Sxy, float64 [in, in]. Where a layer takes its input as it is, all three are one tensor."""

    xx: Tensor
    yy: Tensor
    xy: Tensor

    @property
    def exact(self) -> bool:
        """Whether y is x: nothing is quantized before the product."""
        return self.yy is self.xx

    def regularized(self) -> "Moments":
        """With 1% of its mean diagonal added to each."""

        def with_diagonal(moment: Tensor) -> Tensor:
            return moment + torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * (
                _REGULARIZATION * moment.diagonal().mean()
            )

        xx = with_diagonal(self.xx)
        return Moments(xx, xx, xx) if self.exact else Moments(xx, with_diagonal(self.yy), with_diagonal(self.xy))


class MomentSums:
    """:class:`Moments` of the x and y that it is called with, float32 [tokens, in], batch by batch."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        wide_x = x.double()
        products = [wide_x.T @ wide_x]
        if y is not x:
            wide_y = y.double()
            products += [wide_y.T @ wide_y, wide_x.T @ wide_y]
        self._sums = [before.add_(new) for before, new in zip(self._sums, products, strict=True)] if self._sums else products

    def value(self, ranks: Ranks = ONE_RANK) -> Moments:
        """Of the tokens of all ranks. Only after the first call."""
        xx, *others = (ranks.sum(total.clone()) for total in self._sums)
        return Moments(xx, *others) if others else Moments(xx, xx, xx)


@dataclass(frozen=True)
class LowRankPair:
    """U [out, k] with orthonormal columns, and V [in, k], float64; the columns that correct most come first."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Corrected:
    """The best round: the weight that was rounded, float32, what came of it, and the pair.

    objectives: relative to || W X ||^2, of each round in turn.
    """

    target: Tensor
    rounding: FixedRounding
    pair: LowRankPair
    objectives: tuple[float, ...]


def corrected(
    weight: Tensor, moments: Moments, rank: int, rounded: Callable[[Tensor], FixedRounding], rounds: int = 1
) -> Corrected | None:
    """W_hat, U and V for W [out, in] in ``rounds`` rounds, with ``rounded`` from a float32 weight to integers.

    None if the moments are not finite or cannot be inverted. ``rank`` is at most min(out, in).
    """
    wide, regular = weight.double(), moments.regularized()
    if not all(torch.isfinite(moment).all() for moment in (regular.xx, regular.yy, regular.xy)):
        return None
    (lower_x, x_failed), (lower_y, y_failed) = (torch.linalg.cholesky_ex(moment) for moment in (regular.xx, regular.yy))
    if x_failed or y_failed:
        return None
    pair = first_pair(wide, regular, rank, lower_y)
    best, objectives = None, []
    scale = max(float((wide @ regular.xx * wide).sum()), torch.finfo(torch.float64).tiny)  # of a weight of zeros too
    for _ in range(rounds):
        target = _divided((wide - pair.u @ pair.v.T) @ regular.xy, lower_y).float()
        rounding = rounded(target)
        w_hat = rounding().double()
        pair = best_pair(wide - _divided(w_hat @ regular.xy.T, lower_x), regular.xx, rank)
        objectives.append(objective(wide, regular, w_hat, pair) / scale)
        if objectives[-1] == min(objectives):
            best = target, rounding, pair
    assert best is not None, "at least one round"
    return Corrected(*best, tuple(objectives))


def first_pair(weight: Tensor, regular: Moments, rank: int, lower_y: Tensor) -> LowRankPair:
    """The pair to begin with; zeros where S is zero, because the input is not quantized. lower_y: Syy's Cholesky factor."""
    if regular.exact:
        return LowRankPair(*(weight.new_zeros(size, rank) for size in weight.shape))
    missing = regular.xx - _divided(regular.xy, lower_y) @ regular.xy.T
    return best_pair(weight, (missing + missing.T) / 2, rank)


def best_pair(matrix: Tensor, moment: Tensor, rank: int) -> LowRankPair:
    """U and V that minimise || M X - U V^T X ||^2 for M [out, in] and X X^T = ``moment`` [in, in].

    U holds the top eigenvectors of M X X^T M^T; found on the smaller side of M. Directions without energy are zero.
    """
    out_features, in_features = matrix.shape
    if out_features <= in_features:
        u = torch.linalg.eigh(matrix @ moment @ matrix.T).eigenvectors.flip(1)[:, :rank]
        return LowRankPair(u, matrix.T @ u)
    energy, directions = torch.linalg.eigh(moment)
    outputs = matrix @ (directions * energy.clamp(min=0).sqrt())
    energy, directions = torch.linalg.eigh(outputs.T @ outputs)
    energy, directions = energy.flip(0)[:rank], directions.flip(1)[:, :rank]
    usable = energy > torch.finfo(energy.dtype).eps * in_features * energy[0]
    u = outputs @ (directions * torch.where(usable, energy, torch.inf).rsqrt())
    return LowRankPair(u, matrix.T @ u)


def by_energy(pair: LowRankPair, inner: Tensor) -> LowRankPair:
    """The same product U V^T, as orthonormal columns U in the order of what they add; inner: sum of z z^T, z = V^T x [k, k].

    What :func:`best_pair` would make of M = U V^T, without a matrix of the layer's size: the first columns of it are the best
    of their number.
    """
    basis, triangle = torch.linalg.qr(pair.u)
    turn = torch.linalg.eigh(triangle @ inner @ triangle.T).eigenvectors.flip(1)
    return LowRankPair(basis @ turn, pair.v @ triangle.T @ turn)


def objective(weight: Tensor, moments: Moments, w_hat: Tensor, pair: LowRankPair | None = None) -> float:
    """|| W X - W_hat Y - U V^T X ||^2, float64 [out, in] and these moments."""
    left = weight if pair is None else weight - pair.u @ pair.v.T
    total = (left @ moments.xx * left).sum() - 2 * (left @ moments.xy * w_hat).sum() + (w_hat @ moments.yy * w_hat).sum()
    return float(total)


def _divided(matrix: Tensor, lower: Tensor) -> Tensor:
    """A S^-1 for A [n, in] and the Cholesky factor of S [in, in]."""
    return torch.cholesky_solve(matrix.T, lower).T
