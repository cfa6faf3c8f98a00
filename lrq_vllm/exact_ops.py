"""kernels/reference.py and exact.py in vLLM's layers: as torch ops, opaque to torch.compile."""

import torch
from torch import Tensor

from lrq_vllm.kernels import exact, reference
from lrq_vllm.kernels.reference import InputGrid, InputKind, IntegerWeight

__all__ = ["add_low_rank", "integer_linear", "weight_only_linear"]


@torch.library.custom_op("lrq::exact_integer_linear", mutates_args=())
def integer_linear(
    x: Tensor, kind: int, calibrated: list[Tensor],
    q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor, bits: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [T, N] in x's dtype of x [T, K], which is quantized as kind and calibrated, a reference.InputGrid, say."""
    tokens = reference.quantize_input(x, InputGrid(InputKind(kind), tuple(calibrated)))
    return reference.integer_linear(tokens, IntegerWeight(q, step, zero_point, total, bits), bias, x.dtype)


@integer_linear.register_fake
def _(
    x: Tensor, kind: int, calibrated: list[Tensor],
    q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor, bits: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty((x.shape[0], step.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::exact_weight_only_linear", mutates_args=())
def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """y [T, N] in x's dtype of x [T, K]."""
    return exact.weight_only_linear(x, qweight, step, zero_point, bits, bias)


@weight_only_linear.register_fake
def _(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    return torch.empty((x.shape[0], step.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::exact_add_low_rank", mutates_args=())
def add_low_rank(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor]) -> Tensor:
    """y [T, N] + U (V^T x) for x [T, K]."""
    return exact.add_low_rank(y, x, list(zip(u, v, strict=True)))


@add_low_rank.register_fake
def _(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor]) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)
