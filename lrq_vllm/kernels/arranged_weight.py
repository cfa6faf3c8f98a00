"""The layout of a weight for the kernels of Hopper GPUs: chunks of 16 outputs x 64 inputs, ready for a warp's registers.

A chunk is what tensor cores take as their left operand, without any shuffling: lane 4 g + t of a warp's 32 has inputs 16 t to
16 t + 15 of outputs g and g + 8. Letters as in reference.py: N outputs, K inputs. Steps are per channel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CHUNK", "STRIPE", "ArrangedWeight", "arrange", "arranged_integers"]

STRIPE, CHUNK = 16, 64  # outputs and inputs of a chunk
_SLICE = 64 * STRIPE  # outputs arranged at a time: the integers take 4 bytes each meanwhile


class ArrangedWeight(NamedTuple):
    """A weight in this layout, padded with zeros."""

    q: Tensor  # uint8 [stripes, chunks, 128 * bits], by :func:`arranged_integers`
    facts: Tensor  # int32 [stripes, 3, 16]: step (the float's bits), zero-point on q's grid, total
    bits: int
    integer: bool  # whether activations are quantized
    out_features: int
    in_features: int


def arrange(q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor | None, bits: int, *, integer: bool) -> ArrangedWeight:
    """From integers [N, K] (8 bits: int8; else the unsigned grid), step float32 [N], zero_point and total int32 [N] as in
    reference.IntegerWeight. 16-bit activations need no total.
    """
    rows, columns = q.shape
    facts = torch.zeros((3, -(-rows // STRIPE) * STRIPE), dtype=torch.int32, device=q.device)
    for place, values in enumerate((step.view(torch.int32), zero_point, total)):
        if values is not None:
            facts[place, :rows] = values
    by_stripe = facts.unflatten(1, (-1, STRIPE)).transpose(0, 1).contiguous()
    return ArrangedWeight(arranged_integers(q, bits, integer=integer), by_stripe, bits, integer, rows, columns)


def arranged_integers(q: Tensor, bits: int, *, integer: bool) -> Tensor:
    """Integers [N, K] (8 bits: int8; else the unsigned grid) as uint8 [ceil(N / 16), ceil(K / 64), 128 * bits].

    integer: whether it will meet 8-bit activations, whose tensor-core step takes 32 inputs, not 16.
    """
    return torch.cat([_arranged_slice(rows, bits, integer=integer) for rows in q.split(_SLICE)])


def _arranged_slice(q: Tensor, bits: int, *, integer: bool) -> Tensor:
    rows, columns = q.shape
    padded = torch.zeros(-(-rows // STRIPE) * STRIPE, -(-columns // CHUNK) * CHUNK, dtype=torch.int32, device=q.device)
    padded[:rows, :columns] = q
    stripes, chunks = padded.shape[0] // STRIPE, padded.shape[1] // CHUNK
    # [stripe, half, g, chunk, t, j] to [stripe, chunk, g, t, half, j]
    values = padded.view(stripes, 2, 8, chunks, 4, 16).permute(0, 3, 2, 4, 1, 5)
    if bits == 8:  # two vectors of 16 bytes, one for each half
        return values.permute(0, 1, 4, 2, 3, 5).to(torch.int8).reshape(stripes, chunks, -1).view(torch.uint8)
    if integer:  # byte b of word w: inputs 8 w + b and, in the high half, 8 w + 4 + b
        low, high = values.unflatten(5, (2, 2, 4)).unbind(6)
        return (low | high << 4).to(torch.uint8).reshape(stripes, chunks, -1)
    # Pairs of neighbouring inputs: the even one goes to the low 16 bits of a word, the odd one to the high ones. In the order
    # of a tensor-core step's registers: [stripe, chunk, g, t, step * (pair * half), 2].
    pairs = values.unflatten(5, (4, 2, 2)).permute(0, 1, 2, 3, 5, 6, 4, 7).flatten(4, 6)
    pairs = pairs[..., 0] | pairs[..., 1] << 16
    if bits == 4:
        shifts = 4 * torch.arange(4, dtype=torch.int32, device=q.device)
        words = (pairs.unflatten(4, (4, 4)) << shifts).sum(dim=5, dtype=torch.int64)
        return words.to(torch.int32).reshape(stripes, chunks, -1).view(torch.uint8)
    # 3 bits: five pairs fill 15 bits of each half of three words; the bits of the last pair are their top bits.
    shifts = 3 * torch.arange(5, dtype=torch.int32, device=q.device)
    words = (pairs[..., :15].unflatten(4, (3, 5)).long() << shifts).sum(dim=5)
    bit = torch.arange(3, device=q.device)
    words |= ((pairs[..., 15:].long() >> bit) & 0x00010001) << 15
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.permute(0, 1, 4, 2, 3).reshape(stripes, chunks, -1).contiguous().view(torch.uint8)
