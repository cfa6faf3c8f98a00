"""What is calibrated of a linear layer's input: a static step and zero-point (W8A8), or a clipping ratio (W4A4)."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from lrq_offline.affine import fake_quantize_clipped
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize, step_and_zero_point

__all__ = ["OutputError", "best_clip", "best_range", "least"]

_SHARES = [0.85**i for i in range(26)]  # 1.00 .. 0.017
_CLIPS = [1.0 - 0.04 * i for i in range(16)]  # 1.00 .. 0.40

_Candidate = TypeVar("_Candidate")


def least(candidates: Sequence[_Candidate], cost: Callable[[_Candidate], Tensor]) -> _Candidate:
    """The first candidate whose cost, a scalar, is the smallest. The host waits for the device once."""
    return candidates[int(torch.stack([cost(candidate) for candidate in candidates]).argmin())]


class OutputError:
    """What quantizing the input of y = x W^T costs, on a sample of tokens: the mean over tokens of |error of y|^2 / |y|^2.

    tokens: X [tokens, in]; weight: W [out, in], float32. Relative, because the norms that follow a block make all tokens
    equally large: one token with a thousandfold activation must not decide the range of all others. (|y|^2 is not taken
    smaller than a hundredth of its mean.)
    """

    def __init__(self, tokens: Tensor, weight: Tensor) -> None:
        self._tokens, self._weight = tokens, weight
        self._outputs = tokens @ weight.T
        size = self._outputs.square().sum(dim=1)
        self._importance = 1 / size.clamp(min=float(size.mean()) / 100 or 1.0)

    def of(self, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar; for other inputs (X quantized) and, if given, another weight, which stand in for the sample's."""
        error = tokens @ (self._weight if weight is None else weight).T - self._outputs
        return (error.square().sum(dim=1) * self._importance).mean()


def best_range(tokens: Tensor, low: Tensor, high: Tensor, weight: Tensor, bits: int) -> StepAndZeroPoint:
    """Step and zero-point [1] of X [tokens, in] with the least :class:`OutputError` for W [out, in].

    low, high: X's extremes over all calibration tokens (scalars). The upper and the lower end are searched in turn, each from
    its extreme down to a sixtieth of it.
    """
    cost = OutputError(tokens, weight)

    def quantizer(shares: tuple[float, float]) -> StepAndZeroPoint:
        return step_and_zero_point((low * shares[0]).reshape(1), (high * shares[1]).reshape(1), bits)

    @cache
    def error(shares: tuple[float, float]) -> Tensor:
        step, zero_point = quantizer(shares)
        return cost.of(dequantize(quantize(tokens, step, zero_point, bits), step, zero_point))

    lower, upper = least([(share, share) for share in _SHARES], error)
    for _ in range(2):
        lower, upper = least([(share, upper) for share in _SHARES], error)
        lower, upper = least([(lower, share) for share in _SHARES], error)
    return quantizer((lower, upper))


def best_clip(tokens: Tensor, weight: Tensor, bits: int) -> Tensor:
    """The clipping ratio [1] of symmetric steps per token with the least :class:`OutputError`: X [tokens, in], W [out, in]."""
    cost = OutputError(tokens, weight)
    ratios = [torch.tensor([clip], device=tokens.device) for clip in _CLIPS]
    return least(ratios, lambda clip: cost.of(fake_quantize_clipped(tokens, clip, bits)))
