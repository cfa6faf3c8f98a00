"""Triton: the activation fake-quantizer, one kernel forwards and one backwards. Twin: affine.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_offline.affine import FakeQuantized
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["backward", "forward"]

# Elements of a program; a whole row where the row's range is wanted, so that it is read once for its range and its integers.
_TILE = 4096
# 16 elements a thread take about 40 registers, 32 take about 80.
_ELEMENTS_PER_WARP, _MOST_WARPS = 512, 32


def forward(
    x: Tensor, quantizer: StepAndZeroPoint | None, bits: int, dtype: torch.dtype, *, with_inside: bool
) -> FakeQuantized:
    """As the twin's. x may have any strides."""
    tokens, in_features = x.shape
    x_hat = torch.empty((tokens, in_features), dtype=dtype, device=x.device)
    inside = torch.empty((tokens, in_features), dtype=torch.bool, device=x.device) if with_inside else None
    step, zero_point = (None, None) if quantizer is None else quantizer
    columns = max(triton.next_power_of_2(in_features), 16)
    if quantizer is not None:
        columns = min(columns, _TILE)
    rows = max(_TILE // columns, 1)
    if tokens:
        _forward_kernel[(triton.cdiv(tokens, rows), triton.cdiv(in_features, columns))](
            x, step, zero_point, x_hat, None if inside is None else inside.view(torch.uint8),
            tokens, in_features, x.stride(0), x.stride(1), 1 if step is not None and step.numel() == tokens else 0,
            LEVELS=2**bits - 1, ROWS=rows, COLUMNS=columns,
            num_warps=min(rows * columns // _ELEMENTS_PER_WARP, _MOST_WARPS), enable_fp_fusion=False,
        )  # fmt: skip
    return FakeQuantized(x_hat, inside)


def backward(gradient: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """As the twin's."""
    gradient = gradient.contiguous()
    of_x = torch.empty_like(gradient, dtype=dtype)
    if count := of_x.numel():
        _backward_kernel[(triton.cdiv(count, _TILE),)](
            gradient, inside.view(torch.uint8), of_x, count, TILE=_TILE, num_warps=_TILE // _ELEMENTS_PER_WARP
        )
    return of_x


@triton.jit
def _clamp(x, low, high):
    """tl.clamp would turn NaN into a number, and a broken block would look healthy."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round(u):
    """Nearest whole number, ties to even, for |u| < 2^22: adding 1.5 * 2^23 leaves no fraction bits in float32.

    Beyond that it errs by a small part of u, which is as far outside every grid.
    """
    return (u + 12582912.0) - 12582912.0


@triton.jit
def _forward_kernel(
    x_ptr, step_ptr, zero_ptr, x_hat_ptr, inside_ptr, tokens, in_features, stride_t, stride_k, stride_step,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < tokens) & (column < in_features)
    x = tl.load(x_ptr + row * stride_t + column * stride_k, mask=mask, other=0.0).to(tl.float32)
    if step_ptr is not None:
        step = tl.load(step_ptr + row * stride_step, mask=row < tokens, other=1.0)
        zero = tl.load(zero_ptr + row * stride_step, mask=row < tokens, other=0.0)
    else:
        # The padding zeros change nothing: the range is widened to hold 0 in any case.
        low = tl.minimum(tl.min(x, axis=1, keep_dims=True), 0.0)
        high = tl.maximum(tl.max(x, axis=1, keep_dims=True), 0.0)
        step = tl.div_rn(high - low, tl.full((ROWS, 1), LEVELS, tl.float32))
        step = tl.where(step > 0.0, step, 1.0)
        zero = _clamp(_round(tl.div_rn(-low, step)), 0.0, 1.0 * LEVELS)
    unclamped = _round(tl.div_rn(x, step + tl.zeros_like(x))) + zero
    q = _clamp(unclamped, 0.0, 1.0 * LEVELS)
    place = row * in_features + column
    tl.store(x_hat_ptr + place, (step * (q - zero)).to(x_hat_ptr.dtype.element_ty), mask=mask)
    if inside_ptr is not None:
        tl.store(inside_ptr + place, (q == unclamped).to(tl.uint8), mask=mask)


@triton.jit
def _backward_kernel(gradient_ptr, inside_ptr, of_x_ptr, count, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < count
    gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32)
    inside = tl.load(inside_ptr + place, mask=mask, other=0) != 0
    tl.store(of_x_ptr + place, tl.where(inside, gradient, 0.0).to(of_x_ptr.dtype.element_ty), mask=mask)
