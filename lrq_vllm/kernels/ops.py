"""The kernels as torch ops: opaque to torch.compile, with shapes that it can follow. Registered on import.

Arguments are those of the kernels, flattened: a NamedTuple cannot cross an op's schema.
"""

import torch
from torch import Tensor

from lrq_vllm.checkpoint import hadamard
from lrq_vllm.kernels import cpu_groups, reference
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, WeightShape
from lrq_vllm.kernels.reference import InputGrid, InputKind, IntegerWeight, QuantizedTokens

__all__ = [
    "add_low_rank",
    "add_low_rank_",
    "arranged_linear",
    "arranged_product",
    "count_clipped_",
    "grouped_linear",
    "integer_linear",
    "quantize_input",
    "rotate",
    "weight_only_linear",
]

_Tokens = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("lrq::quantize_input", mutates_args=())
def quantize_input(x: Tensor, kind: int, calibrated: list[Tensor]) -> _Tokens:
    """q, step, zero_point and total of reference.QuantizedTokens; the rest is a reference.InputGrid."""
    from lrq_vllm.kernels import activation_quant

    return tuple(activation_quant.quantize_input(x, InputGrid(InputKind(kind), tuple(calibrated))))  # type: ignore[return-value]


@quantize_input.register_fake
def _(x: Tensor, kind: int, calibrated: list[Tensor]) -> _Tokens:
    rows = (x.shape[0], 1)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float32, device=x.device)
    return q, step, torch.empty_like(step, dtype=torch.int32), torch.empty_like(step, dtype=torch.int32)


@torch.library.custom_op("lrq::integer_linear", mutates_args=())
def integer_linear(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor,
    w_q: Tensor, w_step: Tensor, w_zero_point: Tensor, w_total: Tensor,
    bias: Tensor | None, bits: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """reference.integer_linear."""
    from lrq_vllm.kernels import integer_gemm

    tokens = QuantizedTokens(x_q, x_step, x_zero_point, x_total)
    return integer_gemm.integer_linear(tokens, IntegerWeight(w_q, w_step, w_zero_point, w_total, bits), bias, out_dtype)


@integer_linear.register_fake
def _(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor,
    w_q: Tensor, w_step: Tensor, w_zero_point: Tensor, w_total: Tensor,
    bias: Tensor | None, bits: int, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((x_q.shape[0], w_step.shape[0]), dtype=out_dtype, device=x_q.device)


@torch.library.custom_op("lrq::grouped_linear", mutates_args=())
def grouped_linear(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor, centred: Tensor, step: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """kernels/cpu_groups.py: an op, so that a compiled graph does not hold every group's product apart."""
    return cpu_groups.grouped_linear(QuantizedTokens(x_q, x_step, x_zero_point, x_total), centred, step, bias, dtype)


@grouped_linear.register_fake
def _(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor, centred: Tensor, step: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((x_q.shape[0], step.shape[1]), dtype=dtype, device=x_q.device)


@torch.library.custom_op("lrq::weight_only_linear", mutates_args=())
def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """reference.weight_only_linear."""
    from lrq_vllm.kernels import weight_only_gemm

    return weight_only_gemm.weight_only_linear(x, qweight, step, zero_point, bits, bias)


@weight_only_linear.register_fake
def _(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return torch.empty((x.shape[0], step.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::arranged_linear", mutates_args=())
def arranged_linear(
    x: Tensor, q: Tensor, facts: Tensor, flags: Tensor, shape: list[int],
    bias: Tensor | None, x_kind: int, x_calibrated: list[Tensor], factors: list[Tensor], widths: list[int], ranks: list[int],
) -> Tensor:  # fmt: skip
    """kernels/arranged_linear.py; shape: a WeightShape's fields; x_kind and x_calibrated are a reference.InputGrid.

    factors: V and U of low_rank.Factors, with its widths and ranks, or nothing.
    """
    from lrq_vllm.kernels import arranged_linear as kernel
    from lrq_vllm.kernels.low_rank import Factors

    weight, grid = ArrangedWeight(q, facts, flags, WeightShape.of(shape)), InputGrid(InputKind(x_kind), tuple(x_calibrated))
    correction = Factors(factors[0], factors[1], tuple(widths), tuple(ranks)) if factors else None
    return kernel.arranged_linear(x, weight, bias, grid, correction)


@arranged_linear.register_fake
def _(
    x: Tensor, q: Tensor, facts: Tensor, flags: Tensor, shape: list[int],
    bias: Tensor | None, x_kind: int, x_calibrated: list[Tensor], factors: list[Tensor], widths: list[int], ranks: list[int],
) -> Tensor:  # fmt: skip
    return torch.empty((x.shape[0], WeightShape.of(shape).out_features), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::arranged_product", mutates_args=())
def arranged_product(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor | None,
    q: Tensor, facts: Tensor, flags: Tensor, shape: list[int], bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """kernels/arranged_linear.py; what begins with x is a quantize_tokens.IntegerTokens of kind STATIC; shape as above."""
    from lrq_vllm.kernels import arranged_linear as kernel
    from lrq_vllm.kernels.quantize_tokens import IntegerTokens

    tokens = IntegerTokens(x_q, InputKind.STATIC, x_step, x_zero_point, x_total, dtype)
    weight = ArrangedWeight(q, facts, flags, WeightShape.of(shape))
    return kernel.arranged_product(tokens, weight, bias)


@arranged_product.register_fake
def _(
    x_q: Tensor, x_step: Tensor, x_zero_point: Tensor, x_total: Tensor | None,
    q: Tensor, facts: Tensor, flags: Tensor, shape: list[int], bias: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return torch.empty((x_q.shape[0], WeightShape.of(shape).out_features), dtype=dtype, device=x_q.device)


@torch.library.custom_op("lrq::add_low_rank_", mutates_args=("y",))
def add_low_rank_(
    y: Tensor, x: Tensor, v: Tensor, u: Tensor, widths: list[int], ranks: list[int], hopper: bool
) -> None:  # fmt: skip
    """kernels/low_rank.py; from v to ranks these are its Factors."""
    from lrq_vllm.kernels import low_rank

    low_rank.add_low_rank_(y, x, low_rank.Factors(v, u, tuple(widths), tuple(ranks)), hopper=hopper)


@torch.library.custom_op("lrq::add_low_rank", mutates_args=())
def add_low_rank(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor]) -> Tensor:
    """reference.add_low_rank, on a CPU. Not for torch.compile to look into: it would compute each slice of the sum where it is
    used, and for rotary embeddings, which change their slices in place, copy more of a slice than there is (torch 2.13).
    """
    return reference.add_low_rank(y, x, list(zip(u, v, strict=True)))


@add_low_rank.register_fake
def _(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor]) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


@torch.library.custom_op("lrq::count_clipped_", mutates_args=("counts",))
def count_clipped_(counts: Tensor, x: Tensor, step: Tensor, zero_point: Tensor) -> None:
    """Add reference.count_clipped to counts."""
    if not x.is_cuda:
        counts += reference.count_clipped(x, step, zero_point)
        return
    from lrq_vllm.kernels import clipped_count

    clipped_count.count_clipped_(counts, x, step, zero_point)


@torch.library.custom_op("lrq::rotate", mutates_args=())
def rotate(x: Tensor, block: int, order: int, hopper: bool) -> Tensor:
    """checkpoint/hadamard.py, rounded to x's dtype; on a GPU kernels/rotate_tokens.py if ``hopper``, or kernels/hadamard.py."""
    if not x.is_cuda:
        return hadamard.rotate(x, block, order).to(x.dtype)
    from lrq_vllm.kernels import hadamard as kernel
    from lrq_vllm.kernels import rotate_tokens

    return rotate_tokens.rotate_tokens(x, block, order) if hopper else kernel.rotate(x, block, order)


@rotate.register_fake
def _(x: Tensor, block: int, order: int, hopper: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
