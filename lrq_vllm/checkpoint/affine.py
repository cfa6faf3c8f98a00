"""The number format: uniform affine quantization, the definition that everything else in this project agrees with.

    q = clamp(round(x / step) + zero_point, 0, 2^bits - 1)        x_hat = step * (q - zero_point)

All arithmetic is float32, rounding is to nearest with ties to even, q and zero_point lie on the unsigned grid
0 .. 2^bits - 1. Symmetric quantization is the special case zero_point = 2^(bits-1) throughout.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "StepAndZeroPoint",
    "clipped_token_step_and_zero_point",
    "dequantize",
    "quantize",
    "step_and_zero_point",
    "token_step_and_zero_point",
]


class StepAndZeroPoint(NamedTuple):
    """Parameters of one quantizer: ``step`` > 0 and ``zero_point`` (whole numbers), both float32, of one shape."""

    step: Tensor
    zero_point: Tensor


def quantize(x: Tensor, step: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Integers on the unsigned grid, as float32 (they fit exactly), of x's shape; step and zero_point broadcast to x."""
    return torch.clamp(torch.round(x.float() / step) + zero_point, 0, 2**bits - 1)


def dequantize(q: Tensor, step: Tensor, zero_point: Tensor) -> Tensor:
    """The real numbers that integers stand for, float32: step * (q - zero_point)."""
    return step * (q.float() - zero_point)


def step_and_zero_point(low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False) -> StepAndZeroPoint:
    """Step and zero-point that cover the range [low, high], widened to hold 0 so that 0 is exact.

    Asymmetric: step = (high - low) / (2^bits - 1), zero_point = round(-low / step).
    Symmetric: step = max(-low, high) / (2^(bits-1) - 0.5), zero_point = 2^(bits-1).
    A range that is {0} gets step 1, so that nothing divides by zero.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    # A tensor, because CUDA turns a division by a number into a multiplication, and steps must not depend on the device.
    levels = torch.full_like(low, 2**bits - 1)
    if symmetric:
        step = torch.maximum(-low, high) / (levels / 2)
        zero_point = torch.full_like(step, 2 ** (bits - 1))
        return StepAndZeroPoint(torch.where(step > 0, step, torch.ones_like(step)), zero_point)
    step = (high - low) / levels
    step = torch.where(step > 0, step, torch.ones_like(step))
    return StepAndZeroPoint(step, torch.round(-low / step).clamp(0, 2**bits - 1))


def token_step_and_zero_point(x: Tensor, bits: int) -> StepAndZeroPoint:
    """Asymmetric step and zero-point of each token of x [tokens, in]: both [tokens, 1], from its minimum and maximum."""
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    return step_and_zero_point(low, high, bits)


def clipped_token_step_and_zero_point(x: Tensor, clip: Tensor, bits: int) -> StepAndZeroPoint:
    """Symmetric step and zero-point of each token of x [tokens, in]: both [tokens, 1].

    The range is that of the token's largest magnitude times ``clip``, float32 of one element in (0, 1].
    """
    largest = x.float().abs().amax(dim=-1, keepdim=True) * clip
    return step_and_zero_point(-largest, largest, bits, symmetric=True)
