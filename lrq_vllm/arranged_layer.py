"""A layer whose weight is laid out for Hopper GPUs: what all schemes share."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.kernels.arranged_weight import ArrangedWeight

__all__ = ["Static", "arranged_linear", "keep_arranged"]

Static = tuple[Tensor, Tensor]
"""The calibrated step (float32 [1]) and zero-point (uint8 [1]) of a layer's input."""


def keep_arranged(layer: Any, weight: ArrangedWeight) -> None:
    """Put the weight on the layer, as parameters."""
    layer.lrq_q = Parameter(weight.q, requires_grad=False)
    layer.lrq_facts = Parameter(weight.facts, requires_grad=False)
    layer.lrq_bits, layer.lrq_integer, layer.lrq_out_features = weight.bits, weight.integer, weight.out_features


def arranged_linear(layer: Any, x: Tensor, bias: Tensor | None, static: Static | None = None) -> Tensor:
    """y [tokens, out] of x [tokens, in], in x's dtype."""
    from lrq_vllm.kernels import ops

    step, zero_point = static or (None, None)
    bits, integer, outputs = layer.lrq_bits, layer.lrq_integer, layer.lrq_out_features
    return ops.arranged_linear(x, layer.lrq_q, layer.lrq_facts, bits, integer, outputs, bias, step, zero_point)
