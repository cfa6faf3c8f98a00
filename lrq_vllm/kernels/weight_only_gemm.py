"""Triton: 16-bit activations x 4-, 3- or 2-bit weights. Twin: reference.weight_only_linear.

q - zero_point is exact in bfloat16 and float16, so each tile is multiplied as whole numbers and the step is applied to
the float32 product: once per group of inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.triton_tiles import block_of_inputs, load_weight_tile

__all__ = ["weight_only_linear", "weight_only_tile"]


def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """As reference.weight_only_linear. x [T, K] bfloat16 or float16, any strides; the weight contiguous, in groups of a
    multiple of 32 inputs.
    """
    tokens, in_features = x.shape
    out_features, groups = step.shape
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if tokens:
        block_t = min(64, max(16, triton.next_power_of_2(tokens)))
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(out_features, 64))
        _weight_only_kernel[grid](
            x, qweight, step, zero_point, bias, y,
            tokens, out_features, in_features, x.stride(0), x.stride(1), qweight.shape[1], in_features // groups, groups,
            BITS=bits, HAS_BIAS=bias is not None, GROUPED=groups > 1,
            BLOCK_T=block_t, BLOCK_N=64, BLOCK_K=block_of_inputs(in_features, groups, 64),
        )  # fmt: skip
    return y


@triton.jit
def _weight_only_kernel(
    x_ptr, wq_ptr, step_ptr, zero_ptr, bias_ptr, y_ptr, T, N, K, x_stride_t, x_stride_k, width, group_size, groups,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    t_ok, n_ok = t < T, n < N
    y = weight_only_tile(
        x_ptr, t, t_ok, x_stride_t, x_stride_k, wq_ptr, step_ptr, zero_ptr, n, n_ok, K, width, group_size, groups,
        BITS, GROUPED, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def weight_only_tile(
    x_ptr, row, row_ok, x_stride_t, x_stride_k, wq_ptr, step_ptr, zero_ptr, channel, channel_ok,
    K, width, group_size, groups, BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [rows, channels]: rows of x times channels of the weight, both int64 [..]; those that are not ok count as 0."""
    x_rows, w_rows = x_ptr + row * x_stride_t, wq_ptr + channel * width
    steps, zeros = step_ptr + channel * groups, zero_ptr + channel * groups
    # Those of a whole channel, else of the first group.
    step = tl.load(steps, mask=channel_ok, other=0.0)
    zero = tl.load(zeros, mask=channel_ok, other=0)
    acc = tl.zeros((row.shape[0], channel.shape[0]), dtype=tl.float32)
    for block in range(0, tl.cdiv(K, BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :] * x_stride_k, mask=row_ok[:, None] & (k < K)[None, :], other=0.0)
        q = load_weight_tile(w_rows, channel_ok, block, width, BITS, BLOCK_K)
        if GROUPED:
            group = block * BLOCK_K // group_size
            step = tl.load(steps + group, mask=channel_ok, other=0.0)
            zero = tl.load(zeros + group, mask=channel_ok, other=0)
            w = _centred(q, zero, BITS).to(x.dtype)
            acc += tl.dot(x, tl.trans(w), out_dtype=tl.float32) * step[None, :]
        else:
            w = _centred(q, zero, BITS).to(x.dtype)
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.float32)
    return acc if GROUPED else acc * step[None, :]


@triton.jit
def _centred(q, zero, BITS: tl.constexpr):
    """q - zero as float32. A whole number below 2^23 in the lowest bits of 2^23 is their sum: cheaper than a conversion."""
    if BITS == 8:
        q += 128  # stored as int8
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (zero.to(tl.float32) + 8388608.0)[:, None]
