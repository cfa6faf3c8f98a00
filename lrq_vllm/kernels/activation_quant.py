"""Triton: activation quantization. Twins: quantize_input, with all that it chooses from, and quantize_rows of reference.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.reference import InputGrid, InputKind, QuantizedTokens
from lrq_vllm.kernels.triton_tiles import round_to_even

__all__ = ["quantize_clipped", "quantize_input", "quantize_per_token", "quantize_rows", "quantize_static"]


def quantize_input(x: Tensor, grid: InputGrid) -> QuantizedTokens:
    """As reference.quantize_input, one program per token. x [T, K], any strides."""
    return _launch(x, grid.kind, *grid.calibrated)


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """As reference.quantize_per_token, one program per token. x [T, K], any strides."""
    return _launch(x, InputKind.PER_TOKEN)


def quantize_clipped(x: Tensor, ratio: Tensor) -> QuantizedTokens:
    """As reference.quantize_clipped, one program per token. x [T, K], any strides; ratio has one element."""
    return _launch(x, InputKind.CLIPPED, ratio)


def quantize_static(x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
    """As reference.quantize_static, one program per token. x [T, K], any strides; step and zero_point have one element."""
    return _launch(x, InputKind.STATIC, step, zero_point)


def quantize_rows(x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
    """As reference.quantize_rows, one program per token. x [T, K], any strides; step and zero_point [T, 1], contiguous."""
    return _launch(x, InputKind.STATIC, step, zero_point)


def _launch(x: Tensor, kind: InputKind, step: Tensor | None = None, zero_point: Tensor | None = None) -> QuantizedTokens:
    tokens, in_features = x.shape
    out = QuantizedTokens(
        q=torch.empty((tokens, in_features), dtype=torch.int8, device=x.device),
        step=torch.empty((tokens, 1), dtype=torch.float32, device=x.device),
        zero_point=torch.empty((tokens, 1), dtype=torch.int32, device=x.device),
        total=torch.empty((tokens, 1), dtype=torch.int32, device=x.device),
    )
    if tokens:
        block = triton.next_power_of_2(in_features)
        _quantize_kernel[(tokens,)](
            x, step, zero_point, *out, in_features, x.stride(0), x.stride(1),
            STATIC=kind is InputKind.STATIC, CLIPPED=kind is InputKind.CLIPPED,
            BY_ROW=kind is InputKind.STATIC and step is not None and len(step) > 1, BLOCK=block,
            num_warps=min(16, max(4, block // 512)),
        )  # fmt: skip
    return out


@triton.jit
def _quantize_kernel(
    x_ptr, in_step_ptr, in_zero_ptr, q_ptr, step_ptr, zero_ptr, total_ptr, K, stride_t, stride_k,
    STATIC: tl.constexpr, CLIPPED: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    in_range = k < K
    x = tl.load(x_ptr + token * stride_t + k * stride_k, mask=in_range, other=0.0).to(tl.float32)
    if STATIC:
        row = token if BY_ROW else 0
        step = tl.load(in_step_ptr + row)
        zero = tl.load(in_zero_ptr + row).to(tl.float32) - 128.0
    elif CLIPPED:
        step = tl.div_rn(tl.max(tl.abs(x), axis=0) * tl.load(in_step_ptr), 7.5)
        step = tl.where(step > 0.0, step, 1.0)
        zero = 0.0
    else:
        # The padding zeros change nothing: the range is widened to hold 0 in any case.
        low = tl.minimum(tl.min(x, axis=0), 0.0)
        high = tl.maximum(tl.max(x, axis=0), 0.0)
        step = tl.div_rn(high - low, 255.0)
        step = tl.where(step > 0.0, step, 1.0)
        zero = tl.minimum(tl.maximum(round_to_even(tl.div_rn(-low, step)), 0.0), 255.0) - 128.0
    # Clamping to +-512 first changes no result and keeps the rounding trick in its range.
    scaled = tl.minimum(tl.maximum(tl.div_rn(x, step + tl.zeros_like(x)), -512.0), 512.0)
    q = tl.minimum(tl.maximum(round_to_even(scaled) + zero, -8.0 if CLIPPED else -128.0), 7.0 if CLIPPED else 127.0)
    q = tl.where(in_range, q, 0.0)
    tl.store(q_ptr + token * K + k, q.to(tl.int8), mask=in_range)
    tl.store(step_ptr + token, step)
    tl.store(zero_ptr + token, tl.cast(zero, tl.int32))
    tl.store(total_ptr + token, tl.sum(q.to(tl.int32), axis=0))
