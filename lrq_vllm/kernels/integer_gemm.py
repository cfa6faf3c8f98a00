"""Triton: int8 x int8 and int8 x int4 products with their zero-point terms. Twin: reference.integer_linear.

The 4-bit weight is unpacked in the kernel to q - zero_point, which fits int8, so that the tensor cores multiply int8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens
from lrq_vllm.kernels.triton_tiles import block_of_inputs, load_weight_tile

__all__ = ["integer_linear", "integer_tile"]


def integer_linear(x: QuantizedTokens, weight: IntegerWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """As reference.integer_linear; the sums, of groups if there are any, are int32 and equal the reference's exactly.

    x.q and the weight's tensors contiguous; groups of a multiple of 32 inputs.
    """
    tokens, in_features = x.q.shape
    out_features, groups = weight.step.shape[0], weight.groups
    y = torch.empty((tokens, out_features), dtype=out_dtype, device=x.q.device)
    if tokens:
        block_t = min(64, max(16, triton.next_power_of_2(tokens)))
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(out_features, 64))
        _integer_gemm_kernel[grid](
            x.q, x.step, x.zero_point, x.total, weight.q, weight.step, weight.zero_point, weight.total, bias, y,
            tokens, out_features, in_features, weight.q.shape[1], in_features // groups, groups,
            BITS=weight.bits, HAS_BIAS=bias is not None, GROUPED=groups > 1,
            BLOCK_T=block_t, BLOCK_N=64, BLOCK_K=block_of_inputs(in_features, groups, 64),
            enable_fp_fusion=False,  # step and bias are rounded one after the other, as in the reference
        )  # fmt: skip
    return y


@triton.jit
def _integer_gemm_kernel(
    xq_ptr, xstep_ptr, xzero_ptr, xtotal_ptr, wq_ptr, wstep_ptr, wzero_ptr, wtotal_ptr, bias_ptr, y_ptr,
    T, N, K, width, group_size, groups,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    t_ok, n_ok = t < T, n < N
    y = integer_tile(
        xq_ptr, xstep_ptr, xzero_ptr, xtotal_ptr, t, t_ok,
        wq_ptr, wstep_ptr, wzero_ptr, wtotal_ptr, n, n_ok, K, width, group_size, groups, BITS, GROUPED, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=t_ok[:, None] & n_ok[None, :])


@triton.jit
def integer_tile(
    xq_ptr, xstep_ptr, xzero_ptr, xtotal_ptr, row, row_ok, wq_ptr, wstep_ptr, wzero_ptr, wtotal_ptr, channel, channel_ok,
    K, width, group_size, groups, BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """float32 [rows, channels]: rows of x times channels of the weight, both int64 [..]; those that are not ok count as 0.

    Its products with steps are rounded one by one if the kernel is started with enable_fp_fusion=False. GROUPED: below 8 bits.
    """
    x_rows, w_rows = xq_ptr + row * K, wq_ptr + channel * width
    w_steps, w_zeros, w_totals = wstep_ptr + channel * groups, wzero_ptr + channel * groups, wtotal_ptr + channel * groups
    # Those of a whole channel, else of the first group.
    w_zero = tl.load(w_zeros, mask=channel_ok, other=0)
    x_zero = tl.load(xzero_ptr + row, mask=row_ok, other=0)
    acc = tl.zeros((row.shape[0], channel.shape[0]), dtype=tl.int32)
    y = tl.zeros((row.shape[0], channel.shape[0]), dtype=tl.float32)
    for block in range(0, tl.cdiv(K, BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0)
        # x is 0 wherever k is out of range, so what w holds there does not count.
        w = load_weight_tile(w_rows, channel_ok, block, width, BITS, BLOCK_K)
        if GROUPED:
            w_zero = tl.load(w_zeros + block * BLOCK_K // group_size, mask=channel_ok, other=0)
        if BITS != 8:
            w = w - w_zero[:, None]
        acc = tl.dot(x, tl.trans(w.to(tl.int8)), acc, out_dtype=tl.int32)
        if GROUPED:
            if (block + 1) * BLOCK_K % group_size == 0:  # the group's last block
                group = block * BLOCK_K // group_size
                w_total = tl.load(w_totals + group, mask=channel_ok, other=0)
                w_step = tl.load(w_steps + group, mask=channel_ok, other=0.0)
                y += (acc - x_zero[:, None] * w_total[None, :]).to(tl.float32) * w_step[None, :]
                acc = tl.zeros((row.shape[0], channel.shape[0]), dtype=tl.int32)
    x_step = tl.load(xstep_ptr + row, mask=row_ok, other=0.0)
    if GROUPED:
        return y * x_step[:, None]
    else:
        acc -= x_zero[:, None] * tl.load(w_totals, mask=channel_ok, other=0)[None, :]
        if BITS == 8:
            x_total = tl.load(xtotal_ptr + row, mask=row_ok, other=0)
            acc -= x_total[:, None] * w_zero[None, :]
        w_step = tl.load(w_steps, mask=channel_ok, other=0.0)
        return acc.to(tl.float32) * x_step[:, None] * w_step[None, :]
