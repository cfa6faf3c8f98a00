"""Which expert of a mixture takes which slots, in blocks that the grouped kernels work on (grouped_gemm.py).

A slot is one choice of one token: token t has slots t * choices to (t + 1) * choices - 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Routes", "expert_routes"]


class Routes(NamedTuple):
    """S slots, sorted by expert; each expert's are padded to whole blocks of places."""

    slots: Tensor  # int32 [blocks * block]: which slot (row of y) stands at each place; S where a place is empty
    experts: Tensor  # int32 [blocks]: whose places a block of them is; -1: nobody's
    block: int  # places per block


def expert_routes(expert_of: Tensor, experts: int, block: int) -> Routes:
    """The routes of ``expert_of``, int [S]: the expert of each slot; one outside 0 to ``experts`` - 1 leaves its slot out.

    block: 16, 32 or 64. An expert's slots keep their order. Shapes depend on S and ``experts`` alone, and nothing waits for the
    device: a CUDA graph can record it.
    """
    count = len(expert_of)
    # Most blocks are needed if every expert has one slot more than it has full blocks, and never more than there are slots.
    blocks = min(count, (count + experts * (block - 1)) // block)
    expert_of, order = torch.sort(expert_of.to(torch.int32).clamp(-1, experts), stable=True)
    borders = torch.arange(max(experts + 1, blocks), dtype=torch.int32, device=expert_of.device)
    first = torch.searchsorted(expert_of, borders[: experts + 1], out_int32=True)  # [E + 1]: where an expert's slots begin
    blocks_of = (first.diff() + (block - 1)) // block
    end = blocks_of.cumsum(0, dtype=torch.int32)
    owner = torch.searchsorted(end, borders[:blocks], right=True, out_int32=True)  # experts: nobody
    taken = owner.clamp(max=experts - 1)
    # The block begins so many slots after its expert's first one.
    begin = first[taken] + (borders[:blocks] - (end - blocks_of)[taken]) * block
    place = begin.unsqueeze(1) + torch.arange(block, dtype=torch.int32, device=expert_of.device)
    empty = (place >= first[taken + 1].unsqueeze(1)) | (owner == experts).unsqueeze(1)
    slots = order.to(torch.int32)[place.clamp(max=max(count - 1, 0))].masked_fill(empty, count)
    return Routes(slots.flatten(), owner.masked_fill(owner == experts, -1), block)
