"""CUDA C++: many tokens times an arranged weight, on wgmma (tile_linear.cu says how).

Twins: reference.integer_linear and reference.weight_only_linear. Needs an NVIDIA GPU of the Hopper generation.
"""

from dataclasses import asdict, dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel
from lrq_vllm.kernels.arranged_weight import STRIPE, WARPS, ArrangedWeight, WeightShape
from lrq_vllm.kernels.low_rank import Factors, Parts
from lrq_vllm.kernels.quantize_tokens import IntegerTokens, aligned

__all__ = ["Plan", "adds", "plan", "tile_linear"]

_OUTPUTS = 128  # of a tile
_ROW_BYTES = 128  # of a token, that are fetched at once
_THREADS = 32 * WARPS + 128  # two warpgroups multiply, one gives them its registers and fills
_SHARED_BYTES = 227 * 1024
_BAND = 8
_PARTS = 3  # of a correction, at most


@dataclass(frozen=True)
class Plan:
    """The constants of one compiled kernel, named as in tile_linear.cu."""

    bits: int
    integer: bool
    float16: bool
    grouped: bool
    tokens: int
    split: int
    blocks: int
    share: int
    team: int
    even: int
    rank_bytes: int
    stage_chunks: int
    stages: int
    band: int
    shared_bytes: int

    def source(self) -> cuda_kernel.Source:
        """The kernel's text with its constants in front."""
        fixed = {"even": self.even > 0, "centred": self.integer and self.grouped, "warps": WARPS, "row_bytes": _ROW_BYTES}
        macros = _wgmma_macros(self.tokens // 2, integer=self.integer, registers=self.bits < 8)
        headers = ("hopper.cuh", "weight_chunk.cuh")
        return cuda_kernel.source("tile_linear", asdict(self) | fixed, *headers, shared_bytes=self.shared_bytes, macros=macros)


def plan(
    bits: int, tokens: int, split: int = 1, blocks: int = 1, share: int = 1, team: int = 2, even: int = 0, *,
    integer: bool, float16: bool = False, grouped: bool = False, corrected: bool = False,
) -> Plan:  # fmt: skip
    """The kernel with tiles of ``tokens``, and as long a ring as there is memory for.

    tokens: a multiple of 16, 256 at most; 128 where groups meet integers. split: 1, 2, 4 or 8 blocks of a cluster sum up one
    tile. blocks: 2 share a multiprocessor, each with half its registers, which is enough for 64 tokens; or 1. share: 1, or 2
    blocks of a cluster fetch tokens for each other; with split 1. team: 2 warpgroups share a tile; or 1, and while one writes
    its tile, the other multiplies: 8-bit weights, split 1, blocks 1, 160 tokens at most. even: 0, or as many clusters as there
    are, but no more than this for a tile, have the same amount of work each; with split 1, team 2. corrected: a low-rank
    correction is added; with split 1, team 2.
    """
    chunk_bytes = WeightShape(bits, integer, 0, 0, grouped).chunk_bytes
    stage_chunks = 4 if bits <= 4 and tokens <= 64 and blocks == 1 and not grouped else 2
    stage = stage_chunks * (8 * chunk_bytes + 16 * tokens * (4 if integer else 8))
    fixed = 48 + 2048 * (2 if split == 1 else 1) + (2 * (16 * tokens + 8 * 12 * STRIPE) if integer else 0)
    stages = min(12, (_SHARED_BYTES // blocks - 1024 - fixed) // (stage + 16))
    shared_bytes = stages * (stage + 16) + fixed
    most_rank_bytes = 128 if 128 * (_OUTPUTS + tokens) <= stage else 64  # of U's and t's rows, that fit a stage
    rank_bytes = most_rank_bytes if corrected else 0
    return Plan(
        bits, integer, float16, grouped, tokens, split, blocks, share, team, even, rank_bytes, stage_chunks, stages, _BAND,
        shared_bytes,
    )  # fmt: skip


def adds(parts: Parts, share: int) -> bool:
    """Whether the kernel can add the correction of these parts: each tile, or ``share`` tiles side by side, belongs to one."""
    few = len(parts.widths) <= _PARTS and any(parts.ranks)
    return few and all(width % (_OUTPUTS * share) == 0 for width in parts.widths[:-1])


def tile_linear(
    x: IntegerTokens | Tensor, weight: ArrangedWeight, bias: Tensor | None, chosen: Plan,
    correction: tuple[Tensor, Factors] | None = None,
) -> Tensor:  # fmt: skip
    """y [T, N] in x's dtype. x: integers and their totals if the weight meets integers, else [T, K].

    correction: V^T x [T, sum of k_i] in x's dtype and the factors, if the plan is for one and :func:`adds` them.
    """
    stripes, chunks, _ = weight.q.shape
    outputs = weight.shape.out_features
    if isinstance(x, IntegerTokens):
        if x.total is None:
            raise ValueError("tokens come without their totals, which this kernel needs")
        rows, kind, grids = x.q, int(x.kind), (x.step, x.zero_point, x.total)
    else:
        rows, kind, grids = aligned(x), 0, (x, x, x)
    tokens, size = len(rows), rows.element_size()
    y = torch.empty((tokens, outputs), dtype=x.dtype, device=weight.q.device)
    if not tokens:
        return y
    box = chosen.tokens // chosen.share, _ROW_BYTES
    given = cuda_kernel.boxes(
        rows.data_ptr(), tokens, size * rows.shape[1], box, stride=size * rows.stride(0), swizzled=True
    )  # fmt: skip
    tiles = -(-outputs // (_OUTPUTS * chosen.share)) * -(-tokens // chosen.tokens)  # of clusters
    resident = min(cuda_kernel.processors(y.device) * chosen.blocks, weight.flags.numel() // WARPS) // chosen.share
    most = min(max(chosen.even, 1), -(-chunks // chosen.stage_chunks))  # that a tile is dealt out to, a stage to each at least
    clusters = tiles if chosen.split > 1 else min(tiles * most, resident)
    parts = y  # or what clusters send each other
    if chosen.even:
        parts = torch.empty(clusters * chosen.share * chosen.tokens * _OUTPUTS, dtype=torch.int32, device=y.device)
    chunk_bytes = weight.shape.chunk_bytes
    box = _OUTPUTS // STRIPE, chunk_bytes * (1 if weight.shape.bits == 8 else chosen.stage_chunks)
    boxes = cuda_kernel.boxes(weight.q.data_ptr(), stripes, chunks * chunk_bytes, box)
    _compiled(chosen, y.device).launch(
        clusters * chosen.split * chosen.share, _THREADS,
        [
            boxes, given, *grids, weight.facts, y if bias is None else bias, y, parts, weight.flags,
            kind, int(bias is not None), tokens, outputs, chunks, stripes,
            *([] if correction is None else _correction_arguments(*correction, chosen)),
        ],
    )  # fmt: skip
    return y


def _correction_arguments(shrunk: Tensor, factors: Factors, chosen: Plan) -> list[Any]:
    box = chosen.tokens // chosen.share, chosen.rank_bytes
    given = cuda_kernel.boxes(shrunk.data_ptr(), len(shrunk), 2 * shrunk.shape[1], box, swizzled=True)
    box = _OUTPUTS, chosen.rank_bytes
    parts = [
        cuda_kernel.boxes(u.data_ptr(), len(u), 2 * u.shape[1], box, swizzled=True) if u.shape[1] else given
        for u in factors.each_u()
    ]
    missing = _PARTS - len(parts)
    ends = [*accumulate(factors.widths), *[sum(factors.widths)] * missing]
    return [given, *parts, *[given] * missing, *ends[:-1], *factors.ranks, *[0] * missing]


@cache
def _compiled(chosen: Plan, device: torch.device) -> cuda_kernel.CudaKernel:
    return cuda_kernel.compiled(chosen.source(), device)


def _wgmma_macros(sums: int, *, integer: bool, registers: bool) -> str:
    """What names the operands of a wgmma with so many sums to a thread; registers: that the left operand comes from.

    RANK_...: of one with 16-bit floats, whose operands both come from shared memory.
    """
    kind, count = "+r" if integer else "+f", 4 if registers else 1
    left = ", ".join(f"%{sums + i}" for i in range(count))
    all_sums = f"{{{', '.join(f'%{i}' for i in range(sums))}}}"
    given = ", ".join(f'"r"(w.at[{i}])' for i in range(4)) if registers else '"l"(w)'
    macros = {
        "WGMMA_TOKENS": f'"{2 * sums}"',
        "WGMMA_SUM(sum)": f'"{kind}"(sum)',
        "WGMMA_SUMS(sums)": ", ".join(f'"{kind}"(sums[{i}])' for i in range(sums)),
        "WGMMA_LEFT(w)": given,
        "WGMMA_OPERANDS": f'"{all_sums}, {f"{{{left}}}" if registers else left}, %{sums + count}"',
        "RANK_SUMS(sums)": ", ".join(f'"+f"(sums[{i}])' for i in range(sums)),
        "RANK_OPERANDS": f'"{all_sums}, %{sums}, %{sums + 1}"',
    }
    return "".join(f"#define {name} {value}\n" for name, value in macros.items())
