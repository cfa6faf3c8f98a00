"""Sums of products in float64, in plain torch: rounded to 16 bits, they are the same in whatever order they are taken.

Twins: reference.py, whose sums of integers are exact as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lrq_vllm.kernels.reference import dequantize_weight

__all__ = ["add_low_rank", "weight_only_linear"]


def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """As reference.weight_only_linear: y [T, N] in the dtype of x [T, K]."""
    weight = dequantize_weight(qweight, step, zero_point, bits, x.shape[1]).to(x.dtype)
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def add_low_rank(y: Tensor, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """As reference.add_low_rank: y [T, N] + U (V^T x) for x [T, K], in y's dtype."""
    shrunk = [(x.double() @ v.double()).to(x.dtype) for _, v in pairs]
    added = [part.double() @ u.double().T for part, (u, _) in zip(shrunk, pairs, strict=True)]
    return (y.double() + torch.cat(added, dim=1)).to(y.dtype)
