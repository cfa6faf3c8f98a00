"""What the Triton kernels share: rounding, and a tile of weight integers from the checkpoint's packed words."""

import triton
import triton.language as tl

__all__ = ["load_weight_tile", "round_to_even"]


@triton.jit
def round_to_even(x):
    """Nearest whole number, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits in float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def load_weight_tile(words, row, k, in_range, row_stride, BITS: tl.constexpr):
    """Stored integers as int32, in the shape that ``row`` and ``k`` broadcast to; out-of-range places hold 0.

    8 bits: int8, value - 128. 4, 3 and 2 bits: the unsigned value, unpacked as checkpoint/packing.py lays it out.
    """
    base = words + row * row_stride
    if BITS == 8:
        return tl.load(base + k, mask=in_range, other=0).to(tl.int32)
    elif BITS == 4 or BITS == 2:
        word = tl.load(base + k // (32 // BITS), mask=in_range, other=0)
        return (word >> (BITS * (k % (32 // BITS)))) & ((1 << BITS) - 1)
    else:
        group = 3 * (k // 32)
        low = tl.load(base + group + (k % 32) // 16, mask=in_range, other=0)
        high = tl.load(base + group + 2, mask=in_range, other=0)
        return ((low >> (2 * (k % 16))) & 3) | (((high >> (k % 32)) & 1) << 2)
