"""Triton: the routes of a mixture of experts in one launch. Twin: expert_routes.routes_in_torch.

One program for each expert, and a last one for the blocks of nobody. Each counts all experts' slots for itself, which says
where its own blocks begin, and then writes its slots there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.expert_routes import Routes, most_blocks

__all__ = ["routes_in_one_launch"]

_CHUNK = 1024  # slots at a time


def routes_in_one_launch(expert_of: Tensor, experts: int, block: int) -> Routes:
    """As expert_routes.expert_routes."""
    count = len(expert_of)
    blocks = most_blocks(count, experts, block)
    slots = torch.empty(blocks * block, dtype=torch.int32, device=expert_of.device)
    owner = torch.empty(blocks, dtype=torch.int32, device=expert_of.device)
    if count:
        _routes_kernel[(experts + 1,)](
            expert_of.contiguous(), slots, owner, count, experts, blocks,
            BLOCK=block, CHUNK=_CHUNK, BINS=max(32, triton.next_power_of_2(experts + 1)),
        )  # fmt: skip
    return Routes(slots, owner, block)


@triton.jit(do_not_specialize=["S", "E", "blocks"])
def _routes_kernel(
    expert_of_ptr, slots_ptr, owner_ptr, S, E, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, S, CHUNK):
        counts += tl.histogram(_experts_of(expert_of_ptr, start + tl.arange(0, CHUNK), S, E), BINS)
    blocks_of = tl.where(bins < E, (counts + (BLOCK - 1)) // BLOCK, 0)
    first = tl.sum(tl.where(bins < expert, blocks_of, 0))  # of this expert's blocks
    if expert < E:
        count = tl.sum(tl.where(bins == expert, counts, 0))
        last = first + (count + (BLOCK - 1)) // BLOCK
        done = 0
        for start in range(0, S, CHUNK):
            slot = start + tl.arange(0, CHUNK)
            mine = _experts_of(expert_of_ptr, slot, S, E) == expert
            before = tl.cumsum(mine.to(tl.int32), axis=0) - 1
            tl.store(slots_ptr + first * BLOCK + done + before, slot, mask=mine)
            done += tl.sum(mine.to(tl.int32))
        empty = first * BLOCK + count + tl.arange(0, BLOCK)
        tl.store(slots_ptr + empty, tl.zeros((BLOCK,), dtype=tl.int32) + S, mask=empty < last * BLOCK)
        for block in range(first, last):
            tl.store(owner_ptr + block, expert)
    else:
        for block in range(first, blocks):
            tl.store(owner_ptr + block, -1)
            tl.store(slots_ptr + block * BLOCK + tl.arange(0, BLOCK), tl.zeros((BLOCK,), dtype=tl.int32) + S)


@triton.jit
def _experts_of(expert_of_ptr, slot, S, E):
    """int32: E for slots without an expert here, and beyond the last slot."""
    expert = tl.load(expert_of_ptr + slot, mask=slot < S, other=-1).to(tl.int32)
    return tl.where((expert >= 0) & (expert < E), expert, E)
