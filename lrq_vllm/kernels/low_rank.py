"""y += U (V^T x) on a GPU, in y. Twin: reference.add_low_rank.

For few tokens on a Hopper GPU, CUDA C++: two kernels for all parts, which read U and V before the kernels in front of them have
ended. For more, cuBLAS makes V^T x of all parts in one product, and the kernel of the layer's own product adds U (V^T x), where
hopper_table.json says so. Else cuBLAS adds it where y stands: a product for each U, or one for parts that are alike.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel
from lrq_vllm.kernels.quantize_tokens import aligned

__all__ = ["Factors", "Plan", "add_low_rank_", "add_to_few_", "add_to_many_", "arrange", "plan", "prepare", "shrink"]

_RANK_UNIT = 16  # what tensor cores take at a time: products of other sizes are several times slower
MOST_FEW = 8  # tokens, of our kernels for few: with 16, cuBLAS is faster (bench/results/correction-parts-h200.json)
_MOST_RANK = 2048  # of a part: for more, t does not fit shared memory beside other blocks
_CHUNK = 32  # inputs, or ranks, of a 16-byte word of each of 4 lanes
_SHRINKING_WARPS = 8
_AHEAD = 8  # chunks that a warp reads ahead
_MOST_SHARES = 4
_MOST_TURNS = 20  # of a warp: with more, cuBLAS is faster (bench/results/correction-speed-*.json: down, from 20% on)


class Parts(NamedTuple):
    """What stands one after the other in y."""

    widths: tuple[int, ...]  # N_i
    ranks: tuple[int, ...]  # k_i


class Factors(NamedTuple):
    """U and V of the parts that stand one after the other in y, in 16 bits; ranks are filled up with zeros to _RANK_UNIT."""

    v: Tensor  # [sum of k_i, K]: V^T of all parts, one below the other
    u: Tensor  # [sum of N_i * k_i]: U of each part, row by row
    widths: tuple[int, ...]  # N_i
    ranks: tuple[int, ...]  # k_i

    @property
    def parts(self) -> Parts:
        """Their sizes."""
        return Parts(self.widths, self.ranks)

    def each_u(self) -> list[Tensor]:
        """U [N_i, k_i] of each part."""
        sizes = [width * rank for width, rank in zip(self.widths, self.ranks, strict=True)]
        return [u.view(*shape) for u, *shape in zip(self.u.split(sizes), self.widths, self.ranks, strict=True)]


def arrange(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Factors:
    """Of U [N_i, k_i] and V [K, k_i] of each part."""

    def filled(factor: Tensor) -> Tensor:
        return torch.nn.functional.pad(factor, (0, -factor.shape[1] % _RANK_UNIT)).to(dtype)

    us, vs = [filled(u) for u, _ in pairs], [filled(v).t() for _, v in pairs]
    widths, ranks = tuple(u.shape[0] for u in us), tuple(u.shape[1] for u in us)
    return Factors(torch.cat(vs).contiguous(), torch.cat([u.flatten() for u in us]), widths, ranks)


def add_low_rank_(y: Tensor, x: Tensor, factors: Factors, *, hopper: bool) -> Tensor:
    """y [T, N] += U (V^T x) for x [T, K], and y; its rows have their elements one after the other.

    hopper: whether our kernels may add to few tokens.
    """
    if hopper and _are_few(x, factors):
        add_to_few_(y, x, factors)
    else:
        add_to_many_(y, x, factors)
    return y


def prepare(factors: Factors) -> None:
    """Compile our kernels that :func:`add_low_rank_` may take for these: a CUDA graph cannot record compiling."""
    x = torch.empty(MOST_FEW, factors.v.shape[1], dtype=factors.v.dtype, device=factors.v.device)
    if _are_few(x, factors):
        kernels = _plan_for(x, factors)
        for source in (kernels.shrink, kernels.expand):
            cuda_kernel.compiled(source, x.device)


def add_to_many_(y: Tensor, x: Tensor, factors: Factors) -> None:
    """As :func:`add_low_rank_`, by cuBLAS, or on a CPU by torch's own products."""
    shrunk = shrink(x, factors)
    parts = list(zip(factors.widths, factors.ranks, strict=True))
    if len(parts) > 1 and len(set(parts)) == 1:
        many, each = (
            values.unflatten(1, (len(parts), size)).transpose(0, 1) for values, size in zip((y, shrunk), parts[0], strict=True)
        )
        many.baddbmm_(each, factors.u.view(len(parts), *parts[0]).mT)
        return
    for part, values, u in zip(y.split(factors.widths, 1), shrunk.split(factors.ranks, 1), factors.each_u(), strict=True):
        part.addmm_(values, u.t())


def shrink(x: Tensor, factors: Factors) -> Tensor:
    """V^T x [T, sum of k_i] of all parts, rounded to x's dtype."""
    return x @ factors.v.t()


def _are_few(x: Tensor, factors: Factors) -> bool:
    if not (0 < len(x) <= MOST_FEW and x.shape[1] % 8 == 0 and 0 < max(factors.ranks) <= _MOST_RANK):
        return False
    shares = _shares(factors.ranks, cuda_kernel.processors(x.device))
    return _turns(x.shape[1], shares) <= _MOST_TURNS


def add_to_few_(y: Tensor, x: Tensor, factors: Factors) -> None:
    """As :func:`add_low_rank_`, by our kernels, for 1 to 32 tokens; K a multiple of 8."""
    x = aligned(x)
    tokens = len(x)
    kernels = _plan_for(x, factors)
    sums = torch.empty((kernels.shares, tokens, len(factors.v)), dtype=torch.float32, device=x.device)
    shrink, expand = (cuda_kernel.compiled(source, x.device) for source in (kernels.shrink, kernels.expand))
    shrink.launch(*kernels.shrink_grid, [factors.v, x, sums, tokens, 2 * x.stride(0)])
    expand.launch(*kernels.expand_grid, [factors.u, sums, y, tokens, y.stride(0)])


class Plan(NamedTuple):
    """The kernels for so many tokens, in eights."""

    shares: int
    shrink: cuda_kernel.Source
    shrink_grid: tuple[int, int]  # blocks, and threads of each
    expand: cuda_kernel.Source
    expand_grid: tuple[int, int]


def _plan_for(x: Tensor, factors: Factors) -> Plan:
    processors = cuda_kernel.processors(x.device)
    return plan(-(-len(x) // 8), x.shape[1], factors.widths, factors.ranks, x.dtype == torch.float16, processors)


@cache
def plan(
    tiles: int, inputs: int, widths: tuple[int, ...], ranks: tuple[int, ...], float16: bool, processors: int
) -> Plan:  # fmt: skip
    """Of :class:`Factors` with these widths and ranks, for ``tiles`` times 8 tokens [T, inputs] on so many multiprocessors."""
    shares = _shares(ranks, processors)
    turns = _turns(inputs, shares)
    common = {"FLOAT16": float16, "TILES": tiles, "RANKS": sum(ranks), "SHARES": shares}
    shrink = cuda_kernel.source(
        "low_rank_shrink",
        {**common, "INPUTS": inputs, "WARPS": _SHRINKING_WARPS, "TURNS": turns, "AHEAD": min(turns, _AHEAD)},
        "hopper.cuh",
    )
    # As many outputs to a block as still leave one for each multiprocessor.
    warps = next((warps for warps in (8, 4) if sum(widths) >= 16 * warps * processors), 2)
    blocks = [-(-width // (16 * warps)) for width in widths]
    sizes = [width * rank for width, rank in zip(widths, ranks, strict=True)]
    begins = (accumulate(counts, initial=0) for counts in (blocks, widths, ranks, sizes))
    parts = ", ".join(
        f"{{{block}, {output}, {width}, {first}, {rank}, {u}ull}}"
        for block, output, first, u, width, rank in zip(*begins, widths, ranks, strict=False)
    )
    most = -(-max(ranks) // _CHUNK) * _CHUNK
    expand = cuda_kernel.source(
        "low_rank_expand",
        {**common, "WARPS": warps, "MOST": most, "PARTS": len(widths)},
        "hopper.cuh",
        shared_bytes=2 * 8 * tiles * (most + 8),
        macros=f"#define PART {parts}\n",
    )
    shrinking = sum(ranks) // _RANK_UNIT * shares, 32 * _SHRINKING_WARPS
    return Plan(shares, shrink, shrinking, expand, (sum(blocks), 32 * warps))


def _shares(ranks: tuple[int, ...], processors: int) -> int:
    """Into how many blocks the inputs of V^T x are divided, for as many ranks as tensor cores take at a time."""
    stripes = sum(ranks) // _RANK_UNIT
    return max(min(processors // stripes, _MOST_SHARES), 1)


def _turns(inputs: int, shares: int) -> int:
    """Chunks of inputs that a warp of such a block takes, one after the other."""
    return -(-inputs // (_CHUNK * _SHRINKING_WARPS * shares))
