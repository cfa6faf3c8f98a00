"""Triton: the weight fake-quantizer, one kernel forwards and one backwards. Twin: fake_quant_weight.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrq_offline.fake_quant_weight import Gradients, LogScale

__all__ = ["backward", "forward", "integers"]

_ROWS, _COLUMNS = 32, 128


def forward(weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int, dtype: torch.dtype) -> Tensor:
    """As the twin's, W_hat [out, in] in ``dtype``."""
    return _launch_forward(weight, step, zero_point, scale, bits, torch.empty_like(weight, dtype=dtype), real=True)


def integers(weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int) -> Tensor:
    """As the twin's, q uint8 [out, in], rounded by the same kernel as :func:`forward`."""
    return _launch_forward(weight, step, zero_point, scale, bits, torch.empty_like(weight, dtype=torch.uint8), real=False)


def _launch_forward(
    weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int, out: Tensor, *, real: bool
) -> Tensor:
    rows, columns = weight.shape
    tile = _columns_per_tile(columns // step.shape[1], columns)
    own_rows, row_tile = _rows_per_weight(weight, scale), _rows_per_tile(weight, scale)
    _forward_kernel[(triton.cdiv(rows, row_tile), triton.cdiv(columns, tile))](
        weight, step, zero_point, *scale, out, rows, columns, columns // step.shape[1], step.shape[1], own_rows,
        LEVELS=2**bits - 1, REAL=real, ROWS=row_tile, COLUMNS=tile, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def backward(gradient: Tensor, weight: Tensor, step: Tensor, zero_point: Tensor, scale: LogScale, bits: int) -> Gradients:
    """As the twin's. Sums over rows and columns go through partial sums per tile, so they do not depend on timing."""
    rows, columns = weight.shape
    group_size = columns // step.shape[1]
    tile = _columns_per_tile(group_size, columns)
    own_rows, row_tile = _rows_per_weight(weight, scale), _rows_per_tile(weight, scale)
    row_tiles, column_tiles = triton.cdiv(rows, row_tile), triton.cdiv(columns, tile)
    gradient = gradient.contiguous()

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=weight.device) if wanted else None

    of_matrix = None if scale.matrix is None else torch.empty_like(scale.matrix)
    of_step = torch.empty((rows, column_tiles), dtype=torch.float32, device=weight.device)
    of_row = partial(scale.row is not None, rows, column_tiles)
    of_column = partial(scale.column is not None, row_tiles, columns)
    _backward_kernel[(row_tiles, column_tiles)](
        gradient, weight, step, zero_point, *scale, of_step, of_matrix, of_row, of_column,
        rows, columns, group_size, step.shape[1], own_rows, column_tiles,
        LEVELS=2**bits - 1, ROWS=row_tile, COLUMNS=tile, enable_fp_fusion=False,
    )  # fmt: skip
    return Gradients(
        of_step.unflatten(1, (step.shape[1], -1)).sum(dim=2),
        of_matrix,
        None if of_row is None else of_row.sum(dim=1, keepdim=True),
        None if of_column is None or scale.column is None else of_column.unflatten(0, (len(scale.column), -1)).sum(dim=1),
    )


def _rows_per_weight(weight: Tensor, scale: LogScale) -> int:
    """Of each of the weights that stand above each other."""
    return len(weight) if scale.column is None else len(weight) // len(scale.column)


def _rows_per_tile(weight: Tensor, scale: LogScale) -> int:
    """A power of two, such that no tile spans two weights; the last tile of a single one may be cut short."""
    own_rows = _rows_per_weight(weight, scale)
    return _ROWS if own_rows == len(weight) else min(_ROWS, own_rows & -own_rows)


def _columns_per_tile(group_size: int, columns: int) -> int:
    """A power of two, such that no tile spans two groups; a whole row is one group, whose last tile may be cut short."""
    if group_size == columns:
        return _COLUMNS
    return min(_COLUMNS, group_size & -group_size)


@triton.jit
def _tile(
    weight_ptr, step_ptr, zero_ptr, matrix_ptr, row_ptr, column_ptr, rows, columns, group_size, groups, own_rows,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one tile: places, mask, u, round(u) + z before clamping, step [ROWS, 1] and z [ROWS, 1]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = (tl.program_id(1) * COLUMNS) // group_size
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    step = tl.load(step_ptr + row * groups + group, mask=row < rows, other=1.0)[:, None]
    zero = tl.load(zero_ptr + row * groups + group, mask=row < rows, other=0.0)[:, None]
    scaled = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    log_scale = tl.zeros((ROWS, COLUMNS), tl.float32)
    if matrix_ptr is not None:
        log_scale += tl.load(matrix_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if row_ptr is not None:
        log_scale += tl.load(row_ptr + row, mask=row < rows, other=0.0)[:, None]
    if column_ptr is not None:
        above = (tl.program_id(0) * ROWS) // own_rows
        log_scale += tl.load(column_ptr + above * columns + column, mask=column < columns, other=0.0)[None, :]
    u = tl.div_rn(scaled * tl.exp(-log_scale), step + tl.zeros_like(scaled))
    # Beyond these bounds every value is clamped anyway; within them the rounding trick below is exact.
    bounded = tl.minimum(tl.maximum(u, -4.0 * LEVELS - 4.0), 4.0 * LEVELS + 4.0)
    # Nearest, ties to even: adding 1.5 * 2^23 leaves no fraction bits in float32.
    unclamped = ((bounded + 12582912.0) - 12582912.0) + zero
    return row, column, mask, place, u, unclamped, step, zero


@triton.jit
def _forward_kernel(
    weight_ptr, step_ptr, zero_ptr, matrix_ptr, row_ptr, column_ptr, out_ptr, rows, columns, group_size, groups,
    own_rows, LEVELS: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _row, _column, mask, place, _u, unclamped, step, zero = _tile(
        weight_ptr, step_ptr, zero_ptr, matrix_ptr, row_ptr, column_ptr, rows, columns, group_size, groups,
        own_rows, LEVELS, ROWS, COLUMNS,
    )  # fmt: skip
    q = tl.minimum(tl.maximum(unclamped, 0.0), LEVELS)
    if REAL:
        q = step * (q - zero)
    tl.store(out_ptr + place, q.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    gradient_ptr, weight_ptr, step_ptr, zero_ptr, matrix_ptr, row_ptr, column_ptr,
    of_step_ptr, of_matrix_ptr, of_row_ptr, of_column_ptr, rows, columns, group_size, groups, own_rows, column_tiles,
    LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, mask, place, u, unclamped, step, zero = _tile(
        weight_ptr, step_ptr, zero_ptr, matrix_ptr, row_ptr, column_ptr, rows, columns, group_size, groups,
        own_rows, LEVELS, ROWS, COLUMNS,
    )  # fmt: skip
    gradient = tl.load(gradient_ptr + place, mask=mask, other=0.0).to(tl.float32)
    inside = (unclamped >= 0.0) & (unclamped <= LEVELS)
    q = tl.minimum(tl.maximum(unclamped, 0.0), LEVELS)
    inner = tl.where(inside, u, 0.0)
    partial = row * column_tiles + tl.program_id(1)
    tl.store(of_step_ptr + partial, tl.sum(gradient * ((q - zero) - inner), axis=1), mask=row < rows)
    of_scale = -(gradient * inner * step)
    if of_matrix_ptr is not None:
        tl.store(of_matrix_ptr + place, of_scale.to(of_matrix_ptr.dtype.element_ty), mask=mask)
    if of_row_ptr is not None:
        tl.store(of_row_ptr + partial, tl.sum(of_scale, axis=1), mask=row < rows)
    if of_column_ptr is not None:
        tl.store(of_column_ptr + tl.program_id(0) * columns + column, tl.sum(of_scale, axis=0), mask=column < columns)
