"""Integer products on a CPU where groups of inputs have steps of their own. Twin: reference.integer_linear.

Whole numbers are multiplied in float32, which holds a group's sum exactly below 2^24: 15 * 255 for each input, so up to 4,386
of them. The groups are added up in float64, as the reference does it, so that both round to the same 16 bits. vLLM and torch
have no integer product for CPUs that takes a step per group.
"""

import torch
from torch import Tensor

from lrq_vllm.kernels.reference import QuantizedTokens

__all__ = ["grouped_linear"]


def grouped_linear(x: QuantizedTokens, centred: Tensor, step: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [T, N] in ``dtype``. centred: q - zero_point, int8 [G, N, K / G]; step float32 [G, N]."""
    tokens = (x.q.float() - x.zero_point).unflatten(1, (len(step), -1))
    total = torch.zeros((len(x.q), step.shape[1]), dtype=torch.float64)
    for group, part in enumerate(centred):
        total.addcmul_((tokens[:, group] @ part.float().T).double(), step[group].double())
    y = total.float() * x.step
    return (y if bias is None else y + bias.float()).to(dtype)
