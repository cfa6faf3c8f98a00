"""Integers of 2, 3, 4 and 8 bits to stored words and back. Everything is packed along the input dimension.

8 bits: one int8 per value, holding q - 128.
4 bits: eight values per int32 word; value k of a row lies in word k // 8, at bits 4 * (k % 8) and up.
2 bits: sixteen values per int32 word; value k of a row lies in word k // 16, at bits 2 * (k % 16) and up.
3 bits: 32 values per three int32 words, in two planes. Value j = k % 32 of group g = k // 32 has its low two bits in
        word 3g + j // 16, at bits 2 * (j % 16) and up, and its high bit in word 3g + 2, at bit j. No value straddles a
        word, and a row can be cut at any multiple of 32 inputs.

A row whose length is no multiple of the group is padded with zero bits, which readers ignore.
docs/checkpoint-format.md works one example through byte by byte.
"""

import torch
from torch import Tensor

__all__ = ["STORED_BITS", "pack", "packed_width", "storage_dtype", "unpack", "values_per_group"]

STORED_BITS = (2, 3, 4, 8)


def values_per_group(bits: int) -> int:
    """The number of neighbouring inputs that are stored together: a row may only be cut at its multiples."""
    return {2: 16, 3: 32, 4: 8, 8: 1}[bits]


def words_per_group(bits: int) -> int:
    """The number of stored elements that one group of :func:`values_per_group` values takes."""
    return 3 if bits == 3 else 1


def packed_width(in_features: int, bits: int) -> int:
    """Stored elements per row of ``in_features`` values.

    in for 8 bits, ceil(in/8) for 4, 3 * ceil(in/32) for 3, ceil(in/16) for 2.
    """
    return -(-in_features // values_per_group(bits)) * words_per_group(bits)


def storage_dtype(bits: int) -> torch.dtype:
    """int8 for 8 bits, int32 for the packed widths."""
    return torch.int8 if bits == 8 else torch.int32


def pack(q: Tensor, bits: int) -> Tensor:
    """Stored form [out, packed_width(in)] of unsigned integers q [out, in] with 0 <= q < 2^bits (any integer dtype)."""
    if bits == 8:
        return (q.to(torch.int16) - 128).to(torch.int8)
    group = values_per_group(bits)
    padded = torch.nn.functional.pad(q.to(torch.int64), (0, -q.shape[1] % group)).unflatten(1, (-1, group))
    if bits in (2, 4):
        words = _join(padded, bits)
    else:
        low = _join((padded & 3).unflatten(2, (2, 16)), 2)  # [out, groups, 2]
        high = _join(padded >> 2, 1).unsqueeze(2)  # [out, groups, 1]
        words = torch.cat([low, high], dim=2).flatten(1)
    return _as_int32(words)


def unpack(stored: Tensor, bits: int, in_features: int) -> Tensor:
    """Unsigned integers uint8 [out, in_features] from their stored form [out, packed_width(in_features)]."""
    if bits == 8:
        return (stored.to(torch.int16) + 128).to(torch.uint8)
    if bits in (2, 4):
        values = _split(stored, 32 // bits, bits).flatten(1)
    else:
        groups = stored.unflatten(1, (-1, 3))
        low = _split(groups[..., :2], 16, 2).flatten(2)  # [out, groups, 32]
        high = _split(groups[..., 2], 32, 1)
        values = (low | (high << 2)).flatten(1)
    return values[:, :in_features].to(torch.uint8)


def _join(values: Tensor, bits: int) -> Tensor:
    """Words [...] whose bit fields, lowest first, are values [..., n] of ``bits`` bits each."""
    shifts = torch.arange(values.shape[-1], device=values.device) * bits
    return (values << shifts).sum(-1)


def _split(words: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` bit fields [..., count] of words [...], lowest first."""
    shifts = torch.arange(count, device=words.device, dtype=torch.int32) * bits
    return (words.unsqueeze(-1) >> shifts) & (2**bits - 1)


def _as_int32(words: Tensor) -> Tensor:
    """The int32 with the same 32 bits as each non-negative int64 word below 2^32."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
