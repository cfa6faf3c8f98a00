"""CUDA C++ for Hopper GPUs: rotation of a layer's input by a Hadamard matrix.

Twin: rotate of checkpoint/hadamard.py, rounded to x's dtype.
"""

from functools import cache

import torch
from torch import Tensor

from lrq_vllm.checkpoint.hadamard import paley_table
from lrq_vllm.kernels import cuda_kernel
from lrq_vllm.kernels.quantize_tokens import aligned

__all__ = ["prepare", "rotate_tokens", "source"]

_MOST_THREADS = 512
_MOST_AT_ONCE = 32  # inputs of a thread
_PALEY_UNIT = 16  # of rows and columns, on tensor cores
_BANKS = 32  # of 4 bytes
_ROW_BANKS = 16  # from row to row: what lanes write of two rows, or read of two rows, meets in no bank


def rotate_tokens(x: Tensor, block: int, order: int) -> Tensor:
    """H x of x [T, K], bfloat16 or float16, in x's dtype. For blocks that hadamard.check lets through."""
    x = aligned(x)
    tokens, inputs = x.shape
    y = torch.empty((tokens, inputs), dtype=x.dtype, device=x.device)
    if tokens:
        arguments = [x, paley_table(order, _filled(order), x.dtype, x.device), y, inputs, 2 * x.stride(0)]
        kernel = cuda_kernel.compiled(source(block, order, x.dtype), x.device)
        kernel.launch(tokens * (inputs // block), _threads(block), arguments)
    return y


def prepare(block: int, order: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile what :func:`rotate_tokens` takes: a CUDA graph cannot record compiling."""
    cuda_kernel.compiled(source(block, order, dtype), device)
    paley_table(order, _filled(order), dtype, device)


@cache
def source(block: int, order: int, dtype: torch.dtype) -> cuda_kernel.Source:
    """Of the kernel that :func:`rotate_tokens` takes."""
    size = block // order
    y_stride = size + size // 4
    y_stride += (_ROW_BANKS - y_stride) % _BANKS
    constants = {
        "FLOAT16": dtype == torch.float16, "ORDER": order, "LOG_SIZE": size.bit_length() - 1, "ROWS": _filled(order),
        "Y_STRIDE": y_stride, "THREADS": _threads(block),
    }  # fmt: skip
    shared_bytes = 4 * order * y_stride
    scale = f"#define SCALE {block**-0.5!r}f\n"
    return cuda_kernel.source("rotate_tokens", constants, "hopper.cuh", shared_bytes=shared_bytes, macros=scale)


def _threads(block: int) -> int:
    groups = -(-block // _MOST_AT_ONCE)
    rounds = -(-groups // _MOST_THREADS)
    return 32 * -(-groups // (32 * rounds))


def _filled(order: int) -> int:
    return -(-order // _PALEY_UNIT) * _PALEY_UNIT
