"""kernels/exact.py in vLLM's layers: as torch ops, opaque to torch.compile, whose sums are those of all tensor-parallel ranks.

``shared``: whether the ranks have some of the layer's inputs each; else every rank has all. ``grouped``: whether steps are
those of groups of inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce

from lrq_vllm.kernels import exact
from lrq_vllm.kernels.exact import ONE_RANK, InputRanks
from lrq_vllm.kernels.reference import InputGrid, InputKind, IntegerWeight

__all__ = ["add_low_rank", "counted_once", "input_ranks", "integer_linear", "take_over_sum", "weight_only_linear"]


def take_over_sum(layer: Any) -> bool:
    """Whether ranks share the inputs of one of vLLM's linear layers. If so, vLLM does not add up from here on what they return
    for it: each returns the whole layer's result.

    Layers whose sums the model takes later, together with others', stay as they are.
    """
    if layer.tp_size == 1 or not getattr(layer, "reduce_results", False):
        return False
    layer.reduce_results = False
    return True


class _TensorParallelRanks:
    # vLLM's own reductions take 16 and 32 bits only.
    def total(self, values: Tensor) -> Tensor:
        return _reduced(values, ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        return _reduced(values, ReduceOp.MAX)


def _reduced(values: Tensor, how: Any) -> Tensor:
    from vllm.distributed import get_tp_group

    result = values.contiguous()
    all_reduce(result, how, group=get_tp_group().device_group)
    return result


def input_ranks(shared: bool) -> InputRanks:
    """All tensor-parallel ranks, or this one alone."""
    return _TensorParallelRanks() if shared else ONE_RANK


def counted_once(y: Tensor) -> Tensor:
    """y in one rank and 0 in the others, where vLLM is going to add up what all of them have as a whole."""
    from vllm.distributed import get_tp_group

    return y if get_tp_group().rank_in_group == 0 else torch.zeros_like(y)


@torch.library.custom_op("lrq::exact_integer_linear", mutates_args=())
def integer_linear(
    x: Tensor, kind: int, calibrated: list[Tensor],
    q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor, bits: int, bias: Tensor | None, shared: bool,
    grouped: bool,
) -> Tensor:  # fmt: skip
    """y [T, N] in x's dtype of x [T, K], which is quantized as kind and calibrated, a reference.InputGrid, say."""
    ranks = input_ranks(shared)
    tokens = exact.quantize_input(x, InputGrid(InputKind(kind), tuple(calibrated)), ranks)
    weight = IntegerWeight(q, step, zero_point, total, bits)
    return exact.integer_linear(tokens, weight, bias, x.dtype, ranks, grouped=grouped)


@integer_linear.register_fake
def _(
    x: Tensor, kind: int, calibrated: list[Tensor],
    q: Tensor, step: Tensor, zero_point: Tensor, total: Tensor, bits: int, bias: Tensor | None, shared: bool,
    grouped: bool,
) -> Tensor:  # fmt: skip
    return torch.empty((x.shape[0], step.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::exact_weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None, shared: bool
) -> Tensor:
    """y [T, N] in x's dtype of x [T, K]."""
    return exact.weight_only_linear(x, qweight, step, zero_point, bits, bias, input_ranks(shared))


@weight_only_linear.register_fake
def _(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None, shared: bool) -> Tensor:
    return torch.empty((x.shape[0], step.shape[0]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("lrq::exact_add_low_rank", mutates_args=())
def add_low_rank(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor], shared: bool) -> Tensor:
    """y [T, N] + U (V^T x) for x [T, K]."""
    return exact.add_low_rank(y, x, list(zip(u, v, strict=True)), input_ranks(shared))


@add_low_rank.register_fake
def _(y: Tensor, x: Tensor, u: list[Tensor], v: list[Tensor], shared: bool) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)
