"""Triton: the products of weight_only_gemm.py and integer_gemm.py for a mixture of experts, all of them in one launch.

Twins: reference_experts.experts_weight_only_linear and experts_integer_linear. Letters as there.

One program multiplies one block of slots, which have the same expert, with BLOCK_N of its channels. Programs that need the same
channels follow each other: only the first of them has to wait for memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_vllm.kernels.expert_routes import Routes
from lrq_vllm.kernels.integer_gemm import integer_tile
from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens
from lrq_vllm.kernels.triton_tiles import block_of_inputs
from lrq_vllm.kernels.weight_only_gemm import weight_only_tile

__all__ = ["SAME_FOR_ALL", "Launch", "grouped_integer_linear", "grouped_weight_only_linear"]

_ENOUGH_TILES = 264  # two for each multiprocessor of an H100


class Launch(NamedTuple):
    """How the work is divided."""

    outputs: int  # of a tile
    inputs: int  # of a step of its loop
    warps: int
    stages: int  # steps whose operands are on their way


SAME_FOR_ALL = Launch(64, inputs=128, warps=4, stages=4)
"""Adds up an output's products in the same order however many outputs and experts there are."""


def grouped_weight_only_linear(
    x: Tensor, slots_per_row: int, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, routes: Routes,
    *, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """y [S, N] in x's dtype: y[s] = x[s // slots_per_row] W_hat_e^T for the expert e of slot s, 0 for slots without one.

    x [S / slots_per_row, K] bfloat16 or float16, any strides. The checkpoint's tensors of each expert, stacked and contiguous:
    qweight [E, N, width], step float32 [E, N, G], zero_point uint8 [E, N, G]; bits 2, 3, 4 or 8; groups of a multiple of 32
    inputs. launch: None chooses by the sizes.
    """
    in_features = x.shape[1]
    _, out_features, groups = step.shape
    y = torch.zeros((len(x) * slots_per_row, out_features), dtype=x.dtype, device=x.device)
    if len(y):
        launch = launch or _launch(routes, out_features, bits)
        _grouped_weight_only_kernel[_grid(routes, out_features, launch)](
            x, qweight, step, zero_point, y, routes.slots, routes.experts,
            len(y), out_features, in_features, slots_per_row, x.stride(0), x.stride(1), qweight.shape[2],
            in_features // groups, groups,
            BITS=bits, GROUPED=groups > 1, BLOCK_T=routes.block, BLOCK_N=launch.outputs,
            BLOCK_K=block_of_inputs(in_features, groups, launch.inputs),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return y


def grouped_integer_linear(
    x: QuantizedTokens, slots_per_row: int, weight: IntegerWeight, routes: Routes, out_dtype: torch.dtype,
    *, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """y [S, N] in ``out_dtype``, as :func:`grouped_weight_only_linear`, with exact integer sums.

    x.q [S / slots_per_row, K] contiguous. The weight's tensors have one more dimension in front, the experts, and are
    contiguous.
    """
    rows, in_features = x.q.shape
    out_features, groups = weight.step.shape[1], 1 if weight.step.dim() == 2 else weight.step.shape[2]
    y = torch.zeros((rows * slots_per_row, out_features), dtype=out_dtype, device=x.q.device)
    if len(y):
        launch = launch or _launch(routes, out_features, weight.bits)
        _grouped_integer_kernel[_grid(routes, out_features, launch)](
            x.q, x.step, x.zero_point, x.total, weight.q, weight.step, weight.zero_point, weight.total, y,
            routes.slots, routes.experts, len(y), out_features, in_features, slots_per_row, weight.q.shape[2],
            in_features // groups, groups,
            BITS=weight.bits, GROUPED=groups > 1, BLOCK_T=routes.block, BLOCK_N=launch.outputs,
            BLOCK_K=block_of_inputs(in_features, groups, launch.inputs),
            num_warps=launch.warps, num_stages=launch.stages,
            enable_fp_fusion=False,  # the two steps are rounded one after the other, as in the reference
        )  # fmt: skip
    return y


def _launch(routes: Routes, out_features: int, bits: int) -> Launch:
    """Wide tiles read x less often, narrow ones are more: as wide as leaves enough of them for every multiprocessor.

    The rest is what bench/experts.py found the fastest in most cells on an H100.
    """
    blocks = len(routes.experts)
    outputs = next((width for width in (128, 64) if blocks * triton.cdiv(out_features, width) >= _ENOUGH_TILES), 32)
    if outputs < 128:
        return Launch(outputs, inputs=128, warps=4, stages=4)
    return Launch(128, inputs=128, warps=8, stages=3) if bits == 8 else Launch(128, inputs=64, warps=4, stages=4)


def _grid(routes: Routes, out_features: int, launch: Launch) -> tuple[int, int]:
    return len(routes.experts), triton.cdiv(out_features, launch.outputs)


@triton.jit(do_not_specialize=["S", "slots_per_row"])
def _grouped_weight_only_kernel(
    x_ptr, wq_ptr, step_ptr, zero_ptr, y_ptr, slots_ptr, experts_ptr,
    S, N, K, slots_per_row, x_stride_t, x_stride_k, width, group_size, groups,
    BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.load(experts_ptr + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        row, slot, n = _rows_and_outputs(slots_ptr, slots_per_row, BLOCK_T, BLOCK_N)
        slot_ok, n_ok = slot < S, n < N
        y = weight_only_tile(
            x_ptr, row, slot_ok, x_stride_t, x_stride_k, wq_ptr, step_ptr, zero_ptr, expert * N + n, n_ok,
            K, width, group_size, groups, BITS, GROUPED, BLOCK_K,
        )  # fmt: skip
        _store(y_ptr, y, slot, slot_ok, n, n_ok, N)


@triton.jit(do_not_specialize=["S", "slots_per_row"])
def _grouped_integer_kernel(
    xq_ptr, xstep_ptr, xzero_ptr, xtotal_ptr, wq_ptr, wstep_ptr, wzero_ptr, wtotal_ptr, y_ptr, slots_ptr, experts_ptr,
    S, N, K, slots_per_row, width, group_size, groups,
    BITS: tl.constexpr, GROUPED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.load(experts_ptr + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        row, slot, n = _rows_and_outputs(slots_ptr, slots_per_row, BLOCK_T, BLOCK_N)
        slot_ok, n_ok = slot < S, n < N
        y = integer_tile(
            xq_ptr, xstep_ptr, xzero_ptr, xtotal_ptr, row, slot_ok,
            wq_ptr, wstep_ptr, wzero_ptr, wtotal_ptr, expert * N + n, n_ok,
            K, width, group_size, groups, BITS, GROUPED, BLOCK_K,
        )  # fmt: skip
        _store(y_ptr, y, slot, slot_ok, n, n_ok, N)


@triton.jit
def _rows_and_outputs(slots_ptr, slots_per_row, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows of x and of y, int64 [BLOCK_T], and its outputs, int64 [BLOCK_N]."""
    slot = tl.load(slots_ptr + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return (slot // slots_per_row).to(tl.int64), slot.to(tl.int64), n.to(tl.int64)


@triton.jit
def _store(y_ptr, y, slot, slot_ok, n, n_ok, N):
    tl.store(y_ptr + slot[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=slot_ok[:, None] & n_ok[None, :])
