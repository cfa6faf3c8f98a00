"""A layer whose weight is laid out for Hopper GPUs, and whose product adds its low-rank correction: what all schemes share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.input_fusion import Fusion
from lrq_vllm.kernels import low_rank, reference
from lrq_vllm.kernels.arranged_linear import prepare, prepare_correction
from lrq_vllm.kernels.arranged_weight import ArrangedWeight
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind
from lrq_vllm.low_rank_factors import factors_of, put_factors

__all__ = ["arranged_linear", "keep_arranged", "keep_factors", "quantized_in_graph"]


def keep_arranged(layer: Any, weight: ArrangedWeight, dtype: torch.dtype, kind: InputKind = InputKind.PER_TOKEN) -> None:
    """Put the weight on the layer, as parameters, and compile its kernels. dtype and kind: of activations."""
    shape = weight.shape._replace(whole_outputs=layer.lrq_whole_outputs)
    prepare(shape, dtype, weight.q.device, kind)
    layer.lrq_q = Parameter(weight.q, requires_grad=False)
    layer.lrq_facts = Parameter(weight.facts, requires_grad=False)
    layer.lrq_flags = Parameter(weight.flags, requires_grad=False)
    layer.lrq_weight_shape = shape


def keep_factors(layer: Any, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Put the factors of a correction, U [out, k] and V [in, k] of each part, on a layer that has its weight, and compile their
    kernels. dtype: of activations.
    """
    factors = low_rank.arrange(pairs, dtype)
    prepare_correction(layer.lrq_weight_shape, factors)
    put_factors(layer, factors)


def arranged_linear(layer: Any, x: Tensor, bias: Tensor | None, grid: InputGrid = PER_TOKEN) -> Tensor:
    """y [tokens, out] of x [tokens, in], in x's dtype."""
    from lrq_vllm.kernels import ops

    return ops.arranged_linear(x, *_arranged(layer), bias, grid.kind, list(grid.calibrated), *factors_of(layer))


def quantized_in_graph(layer: Any, x: Tensor, bias: Tensor | None, grid: InputGrid, fusion: Fusion) -> Tensor:
    """The same for a STATIC grid and torch.compile, which fuses the quantization with what makes x."""
    from lrq_vllm.kernels import ops

    tokens = reference.quantize_input(x, grid)
    total = tokens.total if fusion is Fusion.INTEGERS_AND_TOTALS else None
    y = ops.arranged_product(tokens.q, *grid.calibrated, total, *_arranged(layer), bias, x.dtype)
    factors, widths, ranks = factors_of(layer)
    if factors:
        ops.add_low_rank_(y, x, *factors, widths, ranks, True)
    return y


def _arranged(layer: Any) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    return layer.lrq_q, layer.lrq_facts, layer.lrq_flags, [int(field) for field in layer.lrq_weight_shape]
