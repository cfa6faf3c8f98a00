"""CUDA C++: activations as the integers that the kernels for Hopper GPUs read. Twin: reference.quantize_input."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind

__all__ = ["QUANTIZED", "IntegerTokens", "aligned", "quantize_tokens", "row_totals", "sources"]

_MOST_THREADS = 512
_UNIT = 16  # inputs that a thread takes at a time
# With more of them in all, threads take two units at least and look for ranges in pairs: with fewer that takes up to 20% longer
# (bench/results/quantize-tokens-h200.json).
_MANY_INPUTS = 2**23
QUANTIZED = 4  # in place of an InputKind: integers already, as hopper.cuh calls them


class IntegerTokens(NamedTuple):
    """8- or 4-bit activations of T tokens, as one kernel takes them from another."""

    q: Tensor  # int8 [T, K], contiguous; K a multiple of 16
    kind: InputKind
    step: Tensor  # float32: of each token; if STATIC [1], the calibrated one
    # PER_TOKEN: int32, of each token, on q's grid; STATIC: uint8 [1], the calibrated one; CLIPPED: none is read
    zero_point: Tensor
    total: Tensor | None  # int32, of each token: sum over K of q; few tokens need none
    dtype: torch.dtype  # of the product


def quantize_tokens(x: Tensor, grid: InputGrid = PER_TOKEN) -> IntegerTokens:
    """Of x [T, K], bfloat16 or float16, K a multiple of 16."""
    x = aligned(x)
    tokens, inputs = x.shape
    q = torch.empty((tokens, inputs), dtype=torch.int8, device=x.device)
    step = torch.empty(tokens, dtype=torch.float32, device=x.device)
    zero_point, total = torch.empty_like(step, dtype=torch.int32), torch.empty_like(step, dtype=torch.int32)
    if tokens:
        first, second, *_ = *grid.calibrated, x, x
        source, threads = _kernel(inputs, grid.kind, x.dtype == torch.float16, many=x.numel() > _MANY_INPUTS)
        arguments = [x, first, second, q, step, zero_point, total, inputs, 2 * x.stride(0)]
        cuda_kernel.compiled(source, x.device).launch(tokens, threads, arguments)
    kind = InputKind.PER_TOKEN if grid.kind is InputKind.STATIC else grid.kind  # each token has its own copy now
    return IntegerTokens(q, kind, step, zero_point, total, x.dtype)


def row_totals(q: Tensor) -> Tensor:
    """int32 [T]: the sums of q int8 [T, K], contiguous, K a multiple of 16."""
    tokens, inputs = q.shape
    total = torch.empty(tokens, dtype=torch.int32, device=q.device)
    if tokens:
        source, threads = _kernel(inputs, QUANTIZED, False, many=q.numel() > _MANY_INPUTS)
        arguments = [q, q, q, q, total, total, total, inputs, inputs]
        cuda_kernel.compiled(source, q.device).launch(tokens, threads, arguments)
    return total


def sources(inputs: int, dtype: torch.dtype, kind: InputKind) -> list[cuda_kernel.Source]:
    """What :func:`quantize_tokens` and :func:`row_totals` take for so many inputs."""
    kinds = (kind, dtype == torch.float16), (QUANTIZED, False)
    return [_kernel(inputs, *one, many=many)[0] for one in kinds for many in (False, True)]


def aligned(x: Tensor) -> Tensor:
    """x with rows that begin at multiples of 16 bytes."""
    return x if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 else x.contiguous()


def _kernel(inputs: int, kind: int, float16: bool, *, many: bool) -> tuple[cuda_kernel.Source, int]:
    """And the threads of a block. many: whether all tokens have more than _MANY_INPUTS."""
    units = -(-inputs // _UNIT)
    items = max(-(-units // _MOST_THREADS), 2 if many else 1)
    threads = 32 * -(-units // (32 * items))
    return _source(kind, float16, threads, items, many), threads


@cache
def _source(kind: int, float16: bool, threads: int, items: int, in_pairs: bool) -> cuda_kernel.Source:
    constants = {"KIND": kind, "FLOAT16": float16, "THREADS": threads, "ITEMS": items, "IN_PAIRS": in_pairs}
    return cuda_kernel.source("quantize_tokens", constants, "hopper.cuh")
