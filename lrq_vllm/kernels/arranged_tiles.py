"""Triton: the integers of a weight in arranged_weight.py's layout, written out row by row for a library's matrix product.

Twin: arranged_weight.arranged_integers, the other way round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.arranged_weight import CHUNK, STRIPE, ArrangedWeight

__all__ = ["unpacked_integers", "unpacked_weight"]

_CHUNKS = 4  # that one program unpacks


def unpacked_integers(weight: ArrangedWeight) -> Tensor:
    """q, int8 [N, K]: the int8 grid of 8-bit weights, the unsigned grid of others."""
    return _unpacked(weight, torch.int8)


def unpacked_weight(weight: ArrangedWeight, dtype: torch.dtype) -> Tensor:
    """W_hat = step * (q - zero_point) [N, K], computed in float32 and rounded to ``dtype``."""
    return _unpacked(weight, dtype)


def _unpacked(weight: ArrangedWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.q.device)
    stripes, chunks, _ = weight.q.shape
    stored = weight.q.view(torch.int8 if weight.integer else torch.int32)
    _unpack_kernel[(stripes, triton.cdiv(chunks, _CHUNKS))](
        stored, weight.facts.view(torch.float32), weight.facts, out, weight.out_features, weight.in_features, chunks,
        BITS=weight.bits, INTEGER=weight.integer, SCALE=dtype.is_floating_point,
        ROWS=STRIPE, COLUMNS=CHUNK * _CHUNKS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _unpack_kernel(
    stored_ptr, step_ptr, zero_ptr, out_ptr, N, K, chunks,
    BITS: tl.constexpr, INTEGER: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    stripe = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)[:, None]
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Lane 4 g + t of a warp holds inputs 16 t + j of outputs g + 8 half.
    half, lane, j = row // 8, 4 * (row % 8) + (k % 64) // 16, k % 16
    inside = (k < K) & (row >= 0)
    chunk = stored_ptr + (stripe * chunks + k // 64) * (32 * BITS if not INTEGER else 128 * BITS)
    if BITS == 8:
        q = tl.load(chunk + half * 512 + lane * 16 + j, mask=inside, other=0).to(tl.int32)
    elif INTEGER:
        q = tl.load(chunk + lane * 16 + half * 8 + (j // 8) * 4 + j % 4, mask=inside, other=0).to(tl.int32)
        q = (q >> (4 * ((j // 4) % 2))) & 15
    else:
        # Pair `place` of a lane's 16, of which this is the even or the odd value.
        place, high = (j // 4) * 4 + ((j // 2) % 2) * 2 + half, 16 * (j % 2)
        if BITS == 4:
            q = (tl.load(chunk + lane * 4 + place // 4, mask=inside, other=0) >> (4 * (place % 4) + high)) & 15
        else:
            # The last pair's bits are the top bits of all three words.
            bit = tl.where(place == 15, 15, 3 * (place % 5)) + high
            first = tl.load(chunk + tl.where(place == 15, 0, place // 5) * 32 + lane, mask=inside, other=0) >> bit
            second = tl.load(chunk + 32 + lane, mask=inside & (place == 15), other=0) >> bit
            third = tl.load(chunk + 64 + lane, mask=inside & (place == 15), other=0) >> bit
            q = tl.where(place == 15, (first & 1) | ((second & 1) << 1) | ((third & 1) << 2), first & 7)
    if SCALE:
        fact = stripe * (3 * ROWS) + row
        value = tl.load(step_ptr + fact) * (q - tl.load(zero_ptr + fact + ROWS)).to(tl.float32)
    else:
        value = q
    n = stripe * ROWS + row
    tl.store(out_ptr + n * K + k, value.to(out_ptr.dtype.element_ty), mask=inside & (n < N))
