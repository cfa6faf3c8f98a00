"""The products of a mixture of experts in plain torch: the definition of correct for grouped_gemm.py.

Letters as in reference.py, and E experts, S slots. A slot is one choice of one token, as in expert_routes.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens, integer_linear, weight_only_linear

__all__ = ["experts_integer_linear", "experts_weight_only_linear"]


def experts_weight_only_linear(
    x: Tensor, slots_per_row: int, expert_of: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int,
    linear: Callable[..., Tensor] = weight_only_linear,
) -> Tensor:  # fmt: skip
    """y [S, N] in x's dtype: y[s] = x[s // slots_per_row] W_hat_e^T for e = expert_of[s], 0 if that is outside 0 to E - 1.

    x [S / slots_per_row, K]; expert_of int [S]. The checkpoint's tensors of each expert, stacked: qweight [E, N, width], step
    float32 [E, N, G], zero_point uint8 [E, N, G]. linear: what computes one expert's layer.
    """

    def product(expert: int, rows: Tensor) -> Tensor:
        return linear(x[rows], qweight[expert], step[expert], zero_point[expert], bits, None)

    return _by_expert(product, slots_per_row, expert_of, step.shape[:2], x.dtype)


def experts_integer_linear(
    x: QuantizedTokens, slots_per_row: int, expert_of: Tensor, weight: IntegerWeight, out_dtype: torch.dtype
) -> Tensor:
    """y [S, N] in ``out_dtype``, as :func:`experts_weight_only_linear`.

    x.q [S / slots_per_row, K]. The weight's tensors have one more dimension in front, the experts.
    """
    q, step, zero_point, total, bits = weight

    def product(expert: int, rows: Tensor) -> Tensor:
        tokens = QuantizedTokens(*(tensor[rows] for tensor in x))
        one = IntegerWeight(q[expert], step[expert], zero_point[expert], total[expert], bits)
        return integer_linear(tokens, one, None, out_dtype)

    return _by_expert(product, slots_per_row, expert_of, weight.step.shape[:2], out_dtype)


def _by_expert(
    product: Callable[[int, Tensor], Tensor], slots_per_row: int, expert_of: Tensor, sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """``product(expert, rows)`` of the rows of each expert's slots. sizes: E, N."""
    experts, out_features = sizes
    y = torch.zeros((len(expert_of), out_features), dtype=dtype, device=expert_of.device)
    for expert in range(experts):
        slots = (expert_of == expert).nonzero().squeeze(1)
        y[slots] = product(expert, slots // slots_per_row)
    return y
