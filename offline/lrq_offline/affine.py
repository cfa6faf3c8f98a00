"""Fake quantization of activations: quantize and dequantize in one go, with gradients (straight-through estimator).

    x_hat = step * (q - z),   q = clamp(round(x / step) + z, 0, 2^bits - 1)
    dx    = dx_hat where the grid holds round(x / step) + z, 0 where clamp() cut it; step and z take none

The arithmetic is that of lrq_vllm.checkpoint.affine: float32, whatever x's dtype; only x_hat is rounded to the dtype that is
asked for. Here in plain torch; on a GPU fake_quant_activation_kernel.py computes the same in one kernel each way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrq_vllm.checkpoint.affine import StepAndZeroPoint, clipped_token_step_and_zero_point, token_step_and_zero_point
from lrq_vllm.checkpoint.schema import ActivationFormat

__all__ = [
    "ActivationQuantizer",
    "FakeQuantized",
    "activation_quantizer",
    "backward",
    "fake_quantize",
    "fake_quantize_clipped",
    "fake_quantize_per_token",
    "forward",
]


# x and a dtype to x_hat in that dtype.
ActivationQuantizer = Callable[[Tensor, torch.dtype], Tensor]


class FakeQuantized(NamedTuple):
    """x_hat, and where x was not clamped (bool; None where nobody asked), both [tokens, in]."""

    x_hat: Tensor
    inside: Tensor | None


def activation_quantizer(
    rule: ActivationFormat | None, static: StepAndZeroPoint | None, clip: Tensor | None = None
) -> ActivationQuantizer | None:
    """What a scheme does to a layer's input: nothing, one fixed step (``static``), or a step for each token.

    clip: the ratio [1] of symmetric schemes.
    """
    if rule is None:
        return None
    if clip is not None:
        return lambda x, dtype: fake_quantize_clipped(x, clip, rule.bits, dtype)
    if static is None:
        return lambda x, dtype: fake_quantize_per_token(x, rule.bits, dtype)
    return lambda x, dtype: fake_quantize(x, static, rule.bits, dtype)


def fake_quantize(x: Tensor, quantizer: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x_hat in ``dtype`` for x [..., in] of any float dtype; step and zero-point have one element each, or one for each row."""
    rows = x.numel() // x.shape[-1]
    assert quantizer.step.numel() == quantizer.zero_point.numel() in (1, rows), "one step for the tensor or for each row"
    return _fake_quantize(x, quantizer, bits, dtype)


def fake_quantize_per_token(x: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As :func:`fake_quantize`, with a step for each row of x [..., in] from the row's own minimum and maximum."""
    return _fake_quantize(x, None, bits, dtype)


def fake_quantize_clipped(x: Tensor, clip: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """x_hat in ``dtype`` with a symmetric step for each row of x [..., in], from its largest magnitude times ``clip`` [1]."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return _fake_quantize(x, clipped_token_step_and_zero_point(rows, clip, bits), bits, dtype)


def _fake_quantize(x: Tensor, quantizer: StepAndZeroPoint | None, bits: int, dtype: torch.dtype) -> Tensor:
    result: Tensor = _FakeQuantize.apply(x.reshape(-1, x.shape[-1]), quantizer, bits, dtype)  # type: ignore[no-untyped-call]
    return result.view(x.shape)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: StepAndZeroPoint | None, bits: int, dtype: torch.dtype) -> Tensor:
        # A byte for each element says less than x does, and x would have to be divided again.
        result = _implementation(x).forward(x, quantizer, bits, dtype, with_inside=ctx.needs_input_grad[0])
        ctx.save_for_backward(result.inside)
        ctx.dtype = x.dtype
        return result.x_hat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return _implementation(inside).backward(gradients[0], inside, ctx.dtype), None, None, None


class _Implementation(NamedTuple):
    forward: Callable[..., FakeQuantized]
    backward: Callable[..., Tensor]


def _implementation(x: Tensor) -> _Implementation:
    if not x.is_cuda:
        return _Implementation(forward, backward)
    from lrq_offline import fake_quant_activation_kernel

    return _Implementation(fake_quant_activation_kernel.forward, fake_quant_activation_kernel.backward)


def forward(
    x: Tensor, quantizer: StepAndZeroPoint | None, bits: int, dtype: torch.dtype, *, with_inside: bool
) -> FakeQuantized:
    """x_hat in ``dtype`` for x [tokens, in]. quantizer: of one element, or [tokens, 1]; None makes each token its own."""
    step, zero_point = token_step_and_zero_point(x, bits) if quantizer is None else quantizer
    unclamped = (x.float() / step).round_().add_(zero_point)
    if not with_inside:
        return FakeQuantized(unclamped.clamp_(0, 2**bits - 1).sub_(zero_point).mul_(step).to(dtype), None)
    q = unclamped.clamp(0, 2**bits - 1)
    inside = q == unclamped
    return FakeQuantized(q.sub_(zero_point).mul_(step).to(dtype), inside)


def backward(gradient: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """dLoss/dx in ``dtype`` from ``gradient`` = dLoss/dx_hat, all [tokens, in]."""
    return torch.where(inside, gradient, 0).to(dtype)
