"""A layer whose weight is laid out for Hopper GPUs: what all schemes share."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.input_fusion import Fusion
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.arranged_linear import prepare
from lrq_vllm.kernels.arranged_weight import ArrangedWeight
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind

__all__ = ["arranged_linear", "keep_arranged", "quantized_in_graph"]


def keep_arranged(layer: Any, weight: ArrangedWeight, dtype: torch.dtype, kind: InputKind = InputKind.PER_TOKEN) -> None:
    """Put the weight on the layer, as parameters, and compile its kernels. dtype and kind: of activations."""
    prepare(weight.shape, dtype, weight.q.device, kind)
    layer.lrq_q = Parameter(weight.q, requires_grad=False)
    layer.lrq_facts = Parameter(weight.facts, requires_grad=False)
    layer.lrq_flags = Parameter(weight.flags, requires_grad=False)
    layer.lrq_weight_shape = weight.shape


def arranged_linear(layer: Any, x: Tensor, bias: Tensor | None, grid: InputGrid = PER_TOKEN) -> Tensor:
    """y [tokens, out] of x [tokens, in], in x's dtype."""
    from lrq_vllm.kernels import ops

    bits, integer, outputs, *_ = layer.lrq_weight_shape
    weight = layer.lrq_q, layer.lrq_facts, layer.lrq_flags
    return ops.arranged_linear(x, *weight, bits, integer, outputs, bias, grid.kind, list(grid.calibrated))


def quantized_in_graph(layer: Any, x: Tensor, bias: Tensor | None, grid: InputGrid, fusion: Fusion) -> Tensor:
    """The same for a STATIC grid and torch.compile, which fuses the quantization with what makes x."""
    from lrq_vllm.kernels import ops

    tokens = reference.quantize_input(x, grid)
    total = tokens.total if fusion is Fusion.INTEGERS_AND_TOTALS else None
    bits, _, outputs, *_ = layer.lrq_weight_shape
    weight = layer.lrq_q, layer.lrq_facts, layer.lrq_flags
    return ops.arranged_product(tokens.q, *grid.calibrated, total, *weight, bits, outputs, bias, x.dtype)
