"""Triton: 16-bit activations x 4-, 3- or 2-bit weights. Twin: reference.weight_only_linear.

q - zero_point is exact in bfloat16 and float16, so each tile is multiplied as whole numbers and the step is applied to
the float32 product: once per group of inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.triton_tiles import load_weight_tile

__all__ = ["weight_only_linear"]


def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """As reference.weight_only_linear. x [T, K] bfloat16 or float16, any strides; groups of 32 inputs or more."""
    tokens, in_features = x.shape
    out_features, groups = step.shape
    group_size = in_features // groups if groups > 1 else triton.cdiv(in_features, 64) * 64
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if tokens:
        block_t = min(64, max(16, triton.next_power_of_2(tokens)))
        # A block of inputs lies within one group: the largest power of two up to 64 that divides the group.
        block_k = min(64, group_size & -group_size)
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(out_features, 64))
        _weight_only_kernel[grid](
            x, qweight, step, zero_point, bias, y,
            tokens, out_features, in_features, x.stride(0), x.stride(1), qweight.stride(0), group_size, groups,
            BITS=bits, HAS_BIAS=bias is not None, BLOCK_T=block_t, BLOCK_N=64, BLOCK_K=block_k,
        )  # fmt: skip
    return y


@triton.jit
def _weight_only_kernel(
    x_ptr, wq_ptr, step_ptr, zero_ptr, bias_ptr, y_ptr, T, N, K, x_stride_t, x_stride_k, w_stride, group_size, groups,
    BITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    t_ok, n_ok = t < T, n < N
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < K
        x = tl.load(x_ptr + t[:, None] * x_stride_t + k[None, :] * x_stride_k, mask=t_ok[:, None] & k_ok[None, :], other=0.0)
        group = start // group_size
        zero = tl.load(zero_ptr + n * groups + group, mask=n_ok, other=0).to(tl.int32)
        step = tl.load(step_ptr + n * groups + group, mask=n_ok, other=0.0)
        w = load_weight_tile(wq_ptr, n[None, :], k[:, None], n_ok[None, :] & k_ok[:, None], w_stride, BITS)
        product = tl.dot(x, (w - zero[None, :]).to(x.dtype), out_dtype=tl.float32)
        acc += product * step[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + t[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=t_ok[:, None] & n_ok[None, :])
