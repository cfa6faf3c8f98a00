"""What the Triton kernels share: rounding, blocks of inputs, and a tile of weight integers from the packed words."""

import triton
import triton.language as tl

__all__ = ["block_of_inputs", "load_weight_tile", "round_to_even"]


def block_of_inputs(in_features: int, groups: int, most: int) -> int:
    """The largest power of two up to ``most`` inputs that lie within one group."""
    group_size = in_features // groups
    return most if groups == 1 else min(most, group_size & -group_size)


@triton.jit
def round_to_even(x):
    """Nearest whole number, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits in float32."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def load_weight_tile(rows, row_ok, block, width, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Stored integers as int32 [BLOCK_N, BLOCK_K]: of each row the ``block``-th BLOCK_K inputs, a multiple of 32.

    rows: pointers [BLOCK_N] to the first stored element of a row, which has ``width`` of them. Every word is loaded once; what
    lies outside a row, or in a row that is not ok, is 0. 8 bits: int8, value - 128. 4, 3 and 2 bits: the unsigned value,
    unpacked as checkpoint/packing.py lays it out.
    """
    if BITS == 8:
        return _load_words(rows, row_ok, block * BLOCK_K + tl.arange(0, BLOCK_K), width).to(tl.int32)
    elif BITS == 3:
        first = block * (3 * (BLOCK_K // 32)) + 3 * tl.arange(0, BLOCK_K // 32)
        low = tl.interleave(_load_words(rows, row_ok, first, width), _load_words(rows, row_ok, first + 1, width))
        return _fields(low, 2, 4) | (_fields(_load_words(rows, row_ok, first + 2, width), 1, 5) << 2)
    else:
        WORDS: tl.constexpr = BLOCK_K * BITS // 32
        return _fields(_load_words(rows, row_ok, block * WORDS + tl.arange(0, WORDS), width), BITS, 3 if BITS == 4 else 4)


@triton.jit
def _load_words(rows, row_ok, place, width):
    return tl.load(rows[:, None] + place[None, :], mask=row_ok[:, None] & (place < width)[None, :], other=0)


@triton.jit
def _fields(words, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """The 2^LEVELS lowest bit fields of words [rows, words], the lowest first, side by side: [rows, words * 2^LEVELS].

    Halves beside each other, halves of these beside each other, and so on: all fields of a word stay in one thread.
    """
    for level in tl.static_range(LEVELS):
        words = tl.interleave(words, words >> (BITS << (LEVELS - 1 - level)))
    return words & ((1 << BITS) - 1)
