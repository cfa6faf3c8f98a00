"""Triton: rotation of a layer's input by a Hadamard matrix. Twin: rotate of checkpoint/hadamard.py, rounded to x's dtype.

One program rotates one block of one token: H_B = (P_m (x) S_a (x) S_b) / sqrt(B), factor by factor, on tensor cores. Factors
are 1 and -1. TF32 keeps 11 bits of the other operand: all of a 16-bit one; a float32 one is given as the sum of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.compiler import max_shared_mem

from lrq_vllm.checkpoint.hadamard import paley_table
from lrq_vllm.errors import SettingsError

__all__ = ["check", "rotate"]

_LEAST, _MOST_AT_ONCE = 16, 128  # sides of a Sylvester matrix that one product takes
_MOST_VALUES = 2**15  # of one block, padded: in the registers of one program
_MOST_ROWS = 256  # of Paley's matrix, padded: in shared memory


def check(block: int, order: int, device: torch.device, *, hopper: bool) -> None:
    """Raises SettingsError for a block that no kernel takes on ``device``: this one or, if ``hopper``, rotate_tokens.py."""
    size = block // order
    rows = _rows(order, size)
    what = f"The checkpoint rotates {block} inputs at a time by a Hadamard matrix of order {order} times {size}"
    if not _LEAST <= size <= _MOST_AT_ONCE**2 or rows > _MOST_ROWS or rows * size > _MOST_VALUES:
        raise SettingsError(
            f"{what}, which the GPU kernel does not take: it takes orders up to {_MOST_ROWS}, times {_LEAST} to "
            f"{_MOST_AT_ONCE**2}, and {_MOST_VALUES} inputs, where the order is filled up to a power of two. Quantize with "
            "--no-rotate."
        )
    if order == 1 or device.type != "cuda" or hopper:
        return
    needed = 4 * rows * (rows + size)  # bytes of a product with Paley's matrix
    given = _shared_bytes(device)
    if needed > given:
        raise SettingsError(
            f"{what}, for which the Triton kernel needs {needed} bytes of shared memory, and this GPU has {given}. Serve it on "
            "a GPU of the Hopper generation with the package cuda-bindings and LRQ_KERNEL unset, or quantize with --no-rotate."
        )


def rotate(x: Tensor, block: int, order: int) -> Tensor:
    """H x of x [T, K], bfloat16 or float16, any strides, in x's dtype. For what :func:`check` lets through."""
    tokens, inputs = x.shape
    y = torch.empty((tokens, inputs), dtype=x.dtype, device=x.device)
    size = block // order
    rows, halves = _rows(order, size), size.bit_length() // 2
    right = size if size <= _MOST_AT_ONCE else 1 << halves
    if tokens:
        _rotate_kernel[(tokens, inputs // block)](
            x, paley_table(order, rows, torch.float32, x.device), y, inputs, x.stride(0), x.stride(1), block**-0.5,
            ORDER=order, ROWS=rows, SIZE=size, LEFT=size // right, RIGHT=right, num_warps=4 if rows * size <= 4096 else 16,
        )  # fmt: skip
    return y


def _shared_bytes(device: torch.device) -> int:
    """What a block of threads may have."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return max_shared_mem(index)


def _rows(order: int, size: int) -> int:
    """Rows of the tile whose columns are a Sylvester matrix's; products take 16 at least."""
    return 1 if order == 1 and size > _MOST_AT_ONCE else triton.next_power_of_2(max(order, _LEAST))


@triton.jit
def _sylvester(SIDE: tl.constexpr):
    index = tl.arange(0, SIDE)
    ones = index[:, None] & index[None, :]  # of at most 7 bits
    ones = ones ^ (ones >> 4)
    ones = ones ^ (ones >> 2)
    return (1 - 2 * ((ones ^ (ones >> 1)) & 1)).to(tl.float32)


@triton.jit
def _by_sylvester(y, SIDE: tl.constexpr):
    high = (y.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # what TF32 keeps of it
    matrix = _sylvester(SIDE)
    return tl.dot(y - high, matrix, tl.dot(high, matrix, input_precision="tf32"), input_precision="tf32")


@triton.jit
def _rotate_kernel(
    x_ptr, paley_ptr, y_ptr, K, stride_t, stride_k, scale,
    ORDER: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, SIZE)
    k = tl.program_id(1) * (ORDER * SIZE) + row[:, None] * SIZE + column[None, :]
    inside = (row < ORDER)[:, None] & (column >= 0)[None, :]
    y = tl.load(x_ptr + token * stride_t + k * stride_k, mask=inside, other=0.0).to(tl.float32)  # 11 bits, as TF32 has
    if ORDER > 1:
        y = tl.dot(tl.load(paley_ptr + row[:, None] * ROWS + row[None, :]), y, input_precision="tf32")
    y = _by_sylvester(tl.reshape(y, (ROWS * LEFT, RIGHT)), RIGHT)
    if LEFT > 1:
        y = tl.permute(tl.reshape(y, (ROWS, LEFT, RIGHT)), (0, 2, 1))
        y = _by_sylvester(tl.reshape(y, (ROWS * RIGHT, LEFT)), LEFT)
        y = tl.permute(tl.reshape(y, (ROWS, RIGHT, LEFT)), (0, 2, 1))
    y = tl.reshape(y, (ROWS, SIZE)) * scale
    tl.store(y_ptr + token * K + k, y.to(y_ptr.dtype.element_ty), mask=inside)
