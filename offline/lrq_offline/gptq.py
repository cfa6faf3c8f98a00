"""GPTQ (arXiv 2210.17323): round a weight column by column, each column's error spread over those still to come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize

__all__ = ["GptqResult", "HessianSum", "gptq"]

_COLUMNS_AT_ONCE = 128
_DAMPINGS = (0.01, 0.1, 1.0)


class HessianSum:
    """H = 2/n * sum x x^T [in, in] over the inputs that it is called with, float32 [tokens, in]."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def __call__(self, x: Tensor) -> None:
        product = x.T @ x
        self._sum = product if self._sum is None else self._sum + product
        self._tokens += len(x)

    def value(self, ranks: Ranks = ONE_RANK) -> Tensor:
        """H of the inputs of all ranks, however many each has; at least one there must be. Only after the first call."""
        assert self._sum is not None
        tokens = ranks.sum(torch.tensor(self._tokens, device=self._sum.device)).item()
        return ranks.sum(self._sum.clone()) * (2 / tokens)


@dataclass(frozen=True)
class GptqResult:
    """q: uint8 [out, in]. damping: the share of H's mean diagonal that was added; None where rounding to nearest had to do."""

    q: Tensor
    damping: float | None


def gptq(weight: Tensor, hessian: Tensor, quantizer: StepAndZeroPoint, bits: int) -> GptqResult:
    """Integers of W [out, in] on the grid of ``quantizer`` ([out, groups]) that keep W X^T, for H [in, in] = 2/n X^T X.

    Columns go by descending diagonal of H; the steps stay as they are. Channels that no token reaches (a zero diagonal) are
    rounded to nearest. If H + damping is not positive definite even at full damping, everything is.
    """
    group_size = weight.shape[1] // quantizer.step.shape[1]
    step, zero = (t.repeat_interleave(group_size, dim=1) for t in quantizer)
    inverse, damping = _inverse_factor(hessian)
    if inverse is None:
        return GptqResult(quantize(weight, step, zero, bits).to(torch.uint8), None)
    order, factor = inverse
    remaining = weight.float()[:, order].clone()
    step, zero = step[:, order], zero[:, order]
    q = torch.empty_like(remaining)
    for start in range(0, remaining.shape[1], _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, remaining.shape[1])
        errors = torch.empty_like(remaining[:, start:end])
        for column in range(start, end):
            place = (slice(None), slice(column, column + 1))
            q[place] = quantize(remaining[place], step[place], zero[place], bits)
            error = (remaining[place] - dequantize(q[place], step[place], zero[place])) / factor[column, column]
            remaining[:, column + 1 : end] -= error * factor[column, column + 1 : end]
            errors[:, column - start : column - start + 1] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    return GptqResult(q[:, order.argsort()].to(torch.uint8), damping)


def _inverse_factor(hessian: Tensor) -> tuple[tuple[Tensor, Tensor] | None, float | None]:
    """The columns' order and the upper Cholesky factor of the damped H^-1 in that order; and the damping that it took."""
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all() or not diagonal.any():
        return None, None
    order = diagonal.argsort(descending=True, stable=True)
    ordered = hessian[order][:, order]
    ordered.diagonal().masked_fill_(ordered.diagonal() == 0, 1)
    for damping in _DAMPINGS:
        damped = ordered.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(factor).all():
                return (order, factor), damping
    return None, None
