"""W_hat from W and its learned scale, forwards and backwards, without keeping any [out, in] intermediate.

    u = W / (step * exp(S2)),   W_hat = step * (clamp(round(u) + z, 0, 2^bits - 1) - z),   S2 = matrix + row + column

Gradients (straight through round(), nothing where clamp() cut; FlexRound, section 3), with G = dLoss/dW_hat:

    dS2   = -G * W * exp(-S2)   inside the grid, 0 where it clamped
    dstep = sum over the group of G * ((q - z) - u)   inside, G * (q - z) where it clamped

Here in plain torch; on a GPU fake_quant_kernel.py computes the same in one kernel each way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Gradients", "LogScale", "backward", "fake_quant_weight", "forward", "integers"]


class LogScale(NamedTuple):
    """The parts of S2, any of them None: matrix [out, in] (any float dtype), row [out, 1], column [1, in], or, where several
    weights of one shape stand above each other, [weights, in].
    """

    matrix: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients for step [out, groups] and each part of S2 (None where the part is None)."""

    step: Tensor
    matrix: Tensor | None
    row: Tensor | None
    column: Tensor | None


def fake_quant_weight(
    weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int, dtype: torch.dtype
) -> Tensor:
    """W_hat [out, in] in ``dtype``, differentiable in step and the parts of S2.

    weight: W [out, in], float; step, zero_point: float32 [out, groups], where groups divides in.
    """
    result: Tensor = _FakeQuantWeight.apply(weight, step, zero_point, *scale, bits, dtype)  # type: ignore[no-untyped-call]
    return result


class _FakeQuantWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, bits, dtype = arguments
        weight, step, zero_point, *parts = tensors
        ctx.save_for_backward(*tensors)
        ctx.bits = bits
        return _implementation(weight).forward(weight, step, zero_point, LogScale(*parts), bits, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, zero_point, *parts = ctx.saved_tensors
        result = _implementation(weight).backward(gradients[0], weight, step, zero_point, LogScale(*parts), ctx.bits)
        return None, result.step, None, result.matrix, result.row, result.column, None, None


class _Implementation(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., Gradients]


def _implementation(weight: Tensor) -> _Implementation:
    if not weight.is_cuda:
        return _Implementation(forward, backward)
    from lrq_offline import fake_quant_kernel

    return _Implementation(fake_quant_kernel.forward, fake_quant_kernel.backward)


def integers(weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int) -> Tensor:
    """q, uint8 [out, in]: exactly those that :func:`fake_quant_weight` computes with on the same device."""
    if weight.is_cuda:
        from lrq_offline import fake_quant_kernel

        return fake_quant_kernel.integers(weight, step, zero_point, scale, bits)
    rounded = _scaled(weight, step, scale).round_().add_(zero_point.unsqueeze(2))
    return rounded.clamp_(0, 2**bits - 1).flatten(1).to(torch.uint8)


# What follows works in place on its own intermediates: on a CPU fresh memory costs more than arithmetic.


def forward(weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int, dtype: torch.dtype) -> Tensor:
    """W_hat [out, in] in ``dtype``."""
    zero = zero_point.unsqueeze(2)
    q = _scaled(weight, step, scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return q.sub_(zero).mul_(step.unsqueeze(2)).flatten(1).to(dtype)


def backward(gradient: Tensor, weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int) -> Gradients:
    """Gradients of step and of the parts of S2 for ``gradient`` = dLoss/dW_hat [out, in]."""
    zero = zero_point.unsqueeze(2)
    gradient = gradient.float().unflatten(1, (step.shape[1], -1))
    u = _scaled(weight, step, scale)
    unclamped = u.round().add_(zero)
    q = unclamped.clamp(0, 2**bits - 1)
    inner = u.mul_(q == unclamped).mul_(gradient)  # G u inside the grid, 0 where it clamped
    of_step = q.sub_(zero).mul_(gradient).sum(dim=2).sub_(inner.sum(dim=2))
    of_scale = inner.mul_(-step.unsqueeze(2)).flatten(1)
    return Gradients(
        of_step,
        None if scale.matrix is None else of_scale.to(scale.matrix.dtype),
        None if scale.row is None else of_scale.sum(dim=1, keepdim=True),
        None if scale.column is None else of_scale.unflatten(0, (len(scale.column), -1)).sum(dim=1),
    )


def _scaled(weight: Tensor, step: Tensor, scale: LogScale) -> Tensor:
    """u, float32 [out, groups, in / groups], in memory of its own."""
    u = torch.zeros_like(weight, dtype=torch.float32)
    for part in (scale.matrix, scale.row):
        if part is not None:
            u.sub_(part)
    if scale.column is not None:
        u.unflatten(0, (len(scale.column), -1)).sub_(scale.column.unsqueeze(1))
    if any(part is not None for part in scale):
        u.exp_().mul_(weight)
    else:
        u.copy_(weight)
    return u.unflatten(1, (step.shape[1], -1)).div_(step.unsqueeze(2))
