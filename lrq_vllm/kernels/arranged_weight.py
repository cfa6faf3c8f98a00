"""The layout of a weight for the kernels of Hopper GPUs: chunks of 16 outputs x 64 inputs, ready for a warp's registers.

Letters as in reference.py: N outputs, K inputs; steps are per channel. Of a chunk, lane 4 g + t of a warp's 32 takes 16 inputs
of outputs g and g + 8 as the left operand of its tensor-core steps, without any shuffling: 4 t to 4 t + 3 of every 16 if
activations are integers, else 2 t and 2 t + 1 of every 8, as the instructions count them.

Weights of 8 bits can also be read from shared memory by tensor cores themselves: rows of 64 bytes, "swizzled" by 64 bytes. In
those of 4 and 3 bits, output g + 8 stands right above output g, where a mask finds it without a shift (weight_chunk.cuh).

If steps are per group of inputs, each chunk is followed by a word for each of its outputs: the group's step relative to the
channel's largest one, a float32 without its last four bits, which are the zero-point.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "STRIPE",
    "WARPS",
    "ArrangedWeight",
    "WeightShape",
    "arrange",
    "arranged_integers",
    "group_unit",
    "no_flags",
]

STRIPE, CHUNK = 16, 64  # outputs and inputs of a chunk
WARPS = 8  # of a block of tile_linear, that multiply
_MOST_BLOCKS = 2 * 144  # of tile_linear, at the same time, on a GPU of the Hopper generation
_SLICE = 64 * STRIPE  # outputs arranged at a time: the integers take 4 bytes each meanwhile
_WORDS_OF_THREE_BITS = ((0, 1, 2, 3, 12), (4, 5, 6, 7, 14), (8, 9, 10, 11, 15))  # pairs, from the lowest bits up
_TOP_PAIR = 13
_ZERO_BITS = 4  # of a group's word


class WeightShape(NamedTuple):
    """What decides which kernel takes a weight."""

    bits: int
    integer: bool  # whether activations are quantized
    out_features: int
    in_features: int
    grouped: bool = False  # whether there are steps for groups of inputs, which are whole chunks
    # Outputs of the layer that ranks share, where nothing may depend on how many they are (tp_invariance.py), else 0: sums are
    # then divided as for all of them.
    whole_outputs: int = 0

    @classmethod
    def of(cls, fields: list[int]) -> "WeightShape":
        """From its fields as torch's ops take them, which know whole numbers alone."""
        bits, integer, outputs, inputs, grouped, whole_outputs = fields
        return cls(bits, bool(integer), outputs, inputs, bool(grouped), whole_outputs)

    @property
    def scheme(self) -> str:
        """Its name, without the size."""
        return f"w{self.bits}a{8 if self.integer else 16}" + ("-groups" if self.grouped else "")

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk and what belongs to it."""
        return 128 * self.bits + (4 * STRIPE if self.grouped else 0)


class ArrangedWeight(NamedTuple):
    """A weight in this layout, padded with zeros."""

    q: Tensor  # uint8 [stripes, chunks, shape.chunk_bytes]: :func:`arranged_integers`, and words of groups
    # int32 [stripes, 3, 16]: step (the float's bits), zero-point on q's grid (0 if there are groups), total. If groups meet
    # integers, the total is a float's bits: over the groups, relative step times total.
    facts: Tensor
    flags: Tensor  # int32, 0 between products: with them, warps of tile_linear tell each other what they have done
    shape: WeightShape

    def copy(self) -> "ArrangedWeight":
        """The same in memory of its own."""
        return ArrangedWeight(self.q.clone(), self.facts.clone(), self.flags.clone(), self.shape)


def group_unit(*, integer: bool) -> int:
    """The number of inputs of which groups are a multiple. integer: whether activations are quantized."""
    return 2 * CHUNK if integer else CHUNK


def arrange(q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor | None, bits: int, *, integer: bool) -> ArrangedWeight:
    """From integers [N, K] (8 bits: int8; else the unsigned grid), step float32 [N], zero_point and total int32 [N] as in
    reference.IntegerWeight. 16-bit activations need no total. Below 8 bits step, zero_point and total may be [N, G], for G
    groups of a multiple of :func:`group_unit` inputs.
    """
    rows, columns = q.shape
    grouped = step.numel() > rows
    words = arranged_integers(q, bits, integer=integer)
    if grouped:
        channel = step.amax(dim=1)
        channel = torch.where(channel > 0, channel, 1)
        relative = _without_last_bits(step / channel.unsqueeze(1))
        words = torch.cat([words, _group_words(relative, zero_point, words.shape[1])], dim=2)
        if total is not None:
            total = (relative.double() * total).sum(dim=1).float().view(torch.int32)
        step, zero_point = channel, torch.zeros_like(channel, dtype=torch.int32)
    facts = torch.zeros((3, -(-rows // STRIPE) * STRIPE), dtype=torch.int32, device=q.device)
    for place, values in enumerate((step.view(torch.int32), zero_point, total)):
        if values is not None:
            facts[place, :rows] = values.flatten()
    by_stripe = facts.unflatten(1, (-1, STRIPE)).transpose(0, 1).contiguous()
    return ArrangedWeight(words, by_stripe, no_flags(q.device), WeightShape(bits, integer, rows, columns, grouped))


def no_flags(device: torch.device) -> Tensor:
    """ArrangedWeight.flags. Each weight has its own: two may be multiplied at the same time, on two streams."""
    return torch.zeros(_MOST_BLOCKS * WARPS, dtype=torch.int32, device=device)


def arranged_integers(q: Tensor, bits: int, *, integer: bool) -> Tensor:
    """Integers [N, K] (8 bits: int8; else the unsigned grid) as uint8 [ceil(N / 16), ceil(K / 64), 128 * bits].

    integer: whether it will meet 8-bit activations, whose tensor-core step takes 32 inputs, not 16.
    """
    return torch.cat([_arranged_slice(rows, bits, integer=integer) for rows in q.split(_SLICE)])


def _without_last_bits(step: Tensor) -> Tensor:
    """The nearest floats whose last _ZERO_BITS bits are 0."""
    unit = 1 << _ZERO_BITS
    return ((step.view(torch.int32) + unit // 2) & -unit).view(torch.float32)


def _group_words(step: Tensor, zero_point: Tensor, chunks: int) -> Tensor:
    """uint8 [stripes, chunks, 64] from steps (1 at most, :func:`_without_last_bits`) and zero-points [N, G]."""
    rows, groups = step.shape
    words = step.view(torch.int32) | zero_point.to(torch.int32)
    padded = torch.zeros(-(-rows // STRIPE) * STRIPE, chunks, dtype=torch.int32, device=step.device)
    padded[:rows] = words.repeat_interleave(chunks // groups, dim=1)
    return padded.unflatten(0, (-1, STRIPE)).transpose(1, 2).contiguous().view(torch.uint8)


def _arranged_slice(q: Tensor, bits: int, *, integer: bool) -> Tensor:
    rows, columns = q.shape
    padded = torch.zeros(-(-rows // STRIPE) * STRIPE, -(-columns // CHUNK) * CHUNK, dtype=torch.int32, device=q.device)
    padded[:rows, :columns] = q
    stripes, chunks = padded.shape[0] // STRIPE, padded.shape[1] // CHUNK
    if bits == 8:  # [stripe, row, chunk, unit of 16 inputs, input] to [stripe, chunk, row, place, input]
        units = padded.to(torch.int8).view(stripes, STRIPE, chunks, 4, 16).transpose(1, 2)
        row, place = torch.arange(STRIPE, device=q.device).unsqueeze(1), torch.arange(4, device=q.device)
        return units[:, :, row, place ^ (row // 2 % 4)].reshape(stripes, chunks, -1).view(torch.uint8)
    if integer:  # [stripe, half, g, chunk, step, late, t, byte] to [half, stripe, chunk, g, t, step, late, byte]
        low, high = padded.view(stripes, 2, 8, chunks, 2, 2, 4, 4).permute(1, 0, 3, 2, 6, 4, 5, 7)
        return (low | high << 4).to(torch.uint8).reshape(stripes, chunks, -1)
    # Pairs of neighbouring inputs: the even one goes to the low 16 bits of a word, the odd one to the high ones. From
    # [stripe, half, g, chunk, step, late, t, 2] to [2, stripe, chunk, g, t, step * late * half].
    low, high = padded.view(stripes, 2, 8, chunks, 4, 2, 4, 2).permute(7, 0, 3, 2, 6, 4, 5, 1).flatten(5)
    pairs = low | high << 16
    if bits == 4:
        shifts = 4 * torch.arange(4, dtype=torch.int32, device=q.device)
        words = (pairs.unflatten(4, (4, 4)) << shifts).sum(dim=5, dtype=torch.int64)
        return words.to(torch.int32).reshape(stripes, chunks, -1).view(torch.uint8)
    # 3 bits: five pairs fill 15 bits of each half of three words; the bits of one more pair are their top bits. This order
    # leaves few shifts to the kernel (weight_chunk.cuh).
    shifts = 3 * torch.arange(5, dtype=torch.int32, device=q.device)
    words = (pairs[..., _WORDS_OF_THREE_BITS].long() << shifts).sum(dim=5)
    bit = torch.arange(3, device=q.device)
    words |= ((pairs[..., _TOP_PAIR].long().unsqueeze(4) >> bit) & 0x00010001) << 15
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.permute(0, 1, 4, 2, 3).reshape(stripes, chunks, -1).contiguous().view(torch.uint8)
