"""A layer whose weight is laid out for Hopper GPUs: what all schemes share."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm.kernels.arranged_linear import prepare
from lrq_vllm.kernels.arranged_weight import ArrangedWeight
from lrq_vllm.kernels.reference import Static

__all__ = ["arranged_linear", "keep_arranged"]


def keep_arranged(layer: Any, weight: ArrangedWeight, dtype: torch.dtype, *, static: bool = False) -> None:
    """Put the weight on the layer, as parameters, and compile its kernels. dtype: of activations; static: calibrated."""
    prepare(weight.shape, dtype, weight.q.device, static=static)
    layer.lrq_q = Parameter(weight.q, requires_grad=False)
    layer.lrq_facts = Parameter(weight.facts, requires_grad=False)
    layer.lrq_weight_shape = weight.shape


def arranged_linear(layer: Any, x: Tensor, bias: Tensor | None, static: Static | None = None) -> Tensor:
    """y [tokens, out] of x [tokens, in], in x's dtype."""
    from lrq_vllm.kernels import ops

    step, zero_point = static or (None, None)
    bits, integer, outputs, *_ = layer.lrq_weight_shape
    return ops.arranged_linear(x, layer.lrq_q, layer.lrq_facts, bits, integer, outputs, bias, step, zero_point)
