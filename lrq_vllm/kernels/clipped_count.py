"""Triton: values of one token that static quantization clips. Twin: count_clipped of reference.py, which does not add up."""

import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.triton_tiles import round_to_even

__all__ = ["count_clipped_"]


def count_clipped_(counts: Tensor, x: Tensor, step: Tensor, zero_point: Tensor) -> None:
    """Add reference.count_clipped to counts int64 [2]. x [T, K], any strides; one program."""
    if x.shape[0]:
        block = triton.next_power_of_2(x.shape[1])
        _count_kernel[(1,)](counts, x, step, zero_point, x.shape[1], x.stride(1), BLOCK=block, num_warps=8)


@triton.jit
def _count_kernel(counts_ptr, x_ptr, step_ptr, zero_ptr, K, stride_k, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k * stride_k, mask=k < K, other=0.0).to(tl.float32)
    step, zero = tl.load(step_ptr), tl.load(zero_ptr).to(tl.float32)
    scaled = tl.minimum(tl.maximum(tl.div_rn(x, step + tl.zeros_like(x)), -512.0), 512.0)
    place = round_to_even(scaled) + zero
    clipped = tl.sum(((place < 0.0) | (place > 255.0)).to(tl.int32), axis=0)
    tl.store(counts_ptr, tl.load(counts_ptr) + clipped)
    tl.store(counts_ptr + 1, tl.load(counts_ptr + 1) + K)
