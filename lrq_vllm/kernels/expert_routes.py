"""Which expert of a mixture takes which slots, in blocks that the grouped kernels work on (grouped_gemm.py).

A slot is one choice of one token: token t has slots t * choices to (t + 1) * choices - 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Routes", "expert_routes", "most_blocks", "routes_in_torch"]


class Routes(NamedTuple):
    """S slots, sorted by expert; each expert's are padded to whole blocks of places."""

    slots: Tensor  # int32 [blocks * block]: which slot (row of y) stands at each place; S where a place is empty
    experts: Tensor  # int32 [blocks]: whose places a block of them is; -1: nobody's
    block: int  # places per block


def expert_routes(expert_of: Tensor, experts: int, block: int) -> Routes:
    """The routes of ``expert_of``, int32 or int64 [S]: the expert of each slot; one outside 0 to ``experts`` - 1 leaves it out.

    block: 16, 32 or 64. An expert's slots keep their order. Shapes depend on S and ``experts`` alone, and nothing waits for the
    device: a CUDA graph can record it. On a GPU it is one launch (expert_routes_kernel.py), elsewhere plain torch.
    """
    if not expert_of.is_cuda:
        return routes_in_torch(expert_of, experts, block)
    from lrq_vllm.kernels.expert_routes_kernel import routes_in_one_launch

    return routes_in_one_launch(expert_of, experts, block)


def routes_in_torch(expert_of: Tensor, experts: int, block: int) -> Routes:
    """:func:`expert_routes`, in plain torch: the definition."""
    count, dtype = len(expert_of), expert_of.dtype
    blocks = most_blocks(count, experts, block)
    ordered, order = torch.sort(expert_of, stable=True)
    numbers = torch.arange(max(experts + 1, blocks * block), dtype=dtype, device=expert_of.device)
    first = torch.searchsorted(ordered, numbers[: experts + 1], out_int32=dtype == torch.int32)  # where an expert's slots begin
    blocks_of = (first.diff() + (block - 1)) // block
    end = blocks_of.cumsum(0, dtype=dtype)
    owner = torch.searchsorted(end, numbers[:blocks], right=True, out_int32=True)
    owner = owner.masked_fill(owner == experts, -1)
    # From a place to a place in ``order``. -1 takes the last expert's, and lies beyond its slots.
    shift = (first[:-1] - (end - blocks_of) * block)[owner]
    place = numbers[: blocks * block].view(blocks, block) + shift.unsqueeze(1)
    empty = place >= first[1:][owner].unsqueeze(1)
    slots = order[place.clamp(max=count - 1)].masked_fill(empty, count)
    return Routes(slots.flatten().to(torch.int32), owner, block)


def most_blocks(slots: int, experts: int, block: int) -> int:
    """So many are needed if each expert has one slot more than it has full blocks, and never more than there are slots."""
    return min(slots, (slots + experts * (block - 1)) // block)
