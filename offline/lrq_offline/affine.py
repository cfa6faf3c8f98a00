"""Fake quantization: quantize and dequantize in one go, with gradients (straight-through estimator).

The arithmetic is that of lrq_vllm.checkpoint.affine; here round() passes its gradient through unchanged.
"""

from torch import Tensor

from lrq_vllm.checkpoint.affine import StepAndZeroPoint, token_step_and_zero_point

__all__ = ["fake_quantize", "fake_quantize_per_token", "straight_through_round"]


def straight_through_round(x: Tensor) -> Tensor:
    """round(x), to nearest with ties to even; its gradient is 1."""
    return x + (x.round() - x).detach()


def fake_quantize(x: Tensor, quantizer: StepAndZeroPoint, bits: int) -> Tensor:
    """x_hat of x's shape, float32: the gradient is 1 where x is inside the quantizer's range and 0 where it is clamped."""
    step, zero_point = quantizer
    # clamp(), not minimum() and maximum(): those halve the gradient at the bounds (algorithms note, section 3).
    q = (straight_through_round(x.float() / step) + zero_point).clamp(0, 2**bits - 1)
    return step * (q - zero_point)


def fake_quantize_per_token(x: Tensor, bits: int) -> Tensor:
    """x_hat of x [..., in], with a step for each token from its own minimum and maximum; the step takes no gradient."""
    flat = x.reshape(-1, x.shape[-1])
    return fake_quantize(flat, token_step_and_zero_point(flat.detach(), bits), bits).view_as(x)
