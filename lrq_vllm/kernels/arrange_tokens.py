"""CUDA C++: activations, quantized, in the order that the kernels for Hopper GPUs read (arrange_tokens.cu).

Twin: reference.quantize_input, but for the order.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel
from lrq_vllm.kernels.arranged_weight import CHUNK
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind

__all__ = ["ArrangedTokens", "aligned", "arrange_tokens", "sources"]

_MOST_THREADS = 512
# Tokens of a block. More of them write whole sectors of memory; fewer fill the GPU sooner.
_ROWS = (1, 2, 4)


class ArrangedTokens(NamedTuple):
    """x [T, K] in this layout."""

    words: Tensor  # int32 [tiles, chunks, tokens of a tile, 4, 4]
    grids: Tensor  # float32 [T, 4]: step, 1 / step, and the bits of int32: zero-point on the int8 grid, sum of the integers
    dtype: torch.dtype  # of x
    tokens: int  # T


def arrange_tokens(x: Tensor, tile: int, grid: InputGrid = PER_TOKEN) -> ArrangedTokens:
    """Of x [T, K], bfloat16 or float16, K a multiple of 16, in tiles of ``tile`` tokens; those of the last one that x does not
    have stay undefined.
    """
    x = aligned(x)
    tokens, inputs = x.shape
    chunks = -(-inputs // CHUNK)
    words = torch.empty((-(-tokens // tile), chunks, tile, 4, 4), dtype=torch.int32, device=x.device)
    grids = torch.empty((tokens, 4), dtype=torch.float32, device=x.device)
    if tokens:
        rows = _rows(tokens)
        kernel = _compiled(rows, chunks, grid.kind, x.dtype == torch.float16, x.device)
        first, second, *_ = *grid.calibrated, x, x
        blocks = -(-tokens // rows)
        threads = _threads(rows, chunks)[0]
        kernel.launch(blocks, threads, [x, first, second, words, grids, tokens, tile, inputs, x.stride(0), chunks])
    return ArrangedTokens(words, grids, x.dtype, tokens)


def sources(inputs: int, dtype: torch.dtype, kind: InputKind) -> list[cuda_kernel.Source]:
    """What :func:`arrange_tokens` takes for so many inputs, whatever the number of tokens."""
    return [_source(rows, -(-inputs // CHUNK), kind, dtype == torch.float16) for rows in _ROWS]


def aligned(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes."""
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _rows(tokens: int) -> int:
    return 1 if tokens <= 128 else 2 if tokens < 512 else 4


def _threads(rows: int, chunks: int) -> tuple[int, int]:
    """Threads of a block, and how many quarters of chunks each of them has."""
    warps_of_work = -(-chunks * rows // 8)
    items = -(-warps_of_work * 32 // _MOST_THREADS)
    return 32 * -(-warps_of_work // items), items


def _source(rows: int, chunks: int, kind: InputKind, float16: bool) -> cuda_kernel.Source:
    threads, items = _threads(rows, chunks)
    constants = {"KIND": kind, "FLOAT16": float16, "THREADS": threads, "ROWS": rows, "ITEMS": items}
    return cuda_kernel.source("arrange_tokens", constants, "hopper.cuh")


@cache
def _compiled(rows: int, chunks: int, kind: InputKind, float16: bool, device: torch.device) -> cuda_kernel.CudaKernel:
    return cuda_kernel.compiled(_source(rows, chunks, kind, float16), device)
