"""Every kernel again in plain torch: the definition of correct. Exact, unhurried, and free of Triton and vLLM.

Letters: T tokens, N output features, K input features, G groups of inputs that share a step (1 = per channel).

Kernels see int8 operands, so grids are shifted by 128 where a value has 8 bits: q is the unsigned grid's q - 128 and a
zero-point is the unsigned grid's zero_point - 128. Those of 4-bit activations are shifted by 8, which leaves no zero-point.
Differences q - zero_point are the same either way. 3- and 4-bit weights stay on their unsigned grid, and so do their
zero-points.

    y[t, n] = step_w[n] * step_x[t] * sum_k (q_w[n, k] - z_w[n]) * (q_x[t, k] - z_x[t])

The sum is evaluated as  sum_k q_w q_x  -  z_x * sum_k (q_w - z_w)  -  z_w * sum_k q_x,  in integers: the only roundings
are the quantization of x and the final conversion. Integer sums fit int32 for K <= 33,025. Where groups of inputs have steps of
their own, this is the sum of a group; groups are added as floats, each times its step_w.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lrq_vllm.checkpoint.affine import clipped_token_step_and_zero_point, quantize, token_step_and_zero_point
from lrq_vllm.checkpoint.packing import unpack

__all__ = [
    "PER_TOKEN",
    "InputGrid",
    "InputKind",
    "IntegerWeight",
    "QuantizedTokens",
    "add_low_rank",
    "clipped_grid",
    "count_clipped",
    "dequantize_weight",
    "integer_linear",
    "integer_weight",
    "quantize_clipped",
    "quantize_input",
    "quantize_per_token",
    "quantize_rows",
    "quantize_static",
    "static_grid",
    "weight_only_linear",
]


class InputKind(IntEnum):
    """How a layer's input is quantized before the integer product."""

    PER_TOKEN = 1  # 8 bits, asymmetric: each token by its own minimum and maximum
    STATIC = 2  # 8 bits, asymmetric: every token by one calibrated step and zero-point
    CLIPPED = 3  # 4 bits, symmetric: each token by its own largest magnitude times a calibrated ratio


class InputGrid(NamedTuple):
    """How a layer's input is quantized, and what calibration has found for it: a step and a zero-point, a ratio, or nothing."""

    kind: InputKind
    calibrated: tuple[Tensor, ...]


PER_TOKEN = InputGrid(InputKind.PER_TOKEN, ())


def static_grid(step: Tensor, zero_point: Tensor) -> InputGrid:
    """step float32 [1]; zero_point uint8 [1], on the unsigned grid."""
    return InputGrid(InputKind.STATIC, (step, zero_point))


def clipped_grid(ratio: Tensor) -> InputGrid:
    """ratio float32 [1], in (0, 1]."""
    return InputGrid(InputKind.CLIPPED, (ratio,))


_SHIFT = 128  # unsigned 8-bit grid to int8


class QuantizedTokens(NamedTuple):
    """8- or 4-bit activations of T tokens."""

    q: Tensor  # int8 [T, K]
    step: Tensor  # float32 [T, 1]
    zero_point: Tensor  # int32 [T, 1], on q's shifted grid
    total: Tensor  # int32 [T, 1], sum over K of q


class IntegerWeight(NamedTuple):
    """A weight as the integer kernels take it. ``bits`` is 8 (q is int8 [N, K]) or 4 (q is int32 words [N, ceil(K/8)]).

    4-bit weights may have G groups of inputs; step, zero_point and total are [N, G] then.
    """

    q: Tensor
    step: Tensor  # float32 [N]
    zero_point: Tensor  # int32 [N], on q's grid
    total: Tensor  # int32 [N], sum over K, or over the group, of q - zero_point
    bits: int

    @property
    def groups(self) -> int:
        """Of inputs that share a step; 1 for a step per channel."""
        return 1 if self.step.dim() == 1 else self.step.shape[1]


def quantize_input(x: Tensor, grid: InputGrid) -> QuantizedTokens:
    """Quantize x [T, K] (floating point) as ``grid`` says."""
    match grid.kind:
        case InputKind.PER_TOKEN:
            return quantize_per_token(x)
        case InputKind.STATIC:
            return quantize_static(x, *grid.calibrated)
        case InputKind.CLIPPED:
            return quantize_clipped(x, *grid.calibrated)


def quantize_clipped(x: Tensor, ratio: Tensor) -> QuantizedTokens:
    """Quantize x [T, K] to -8 .. 7 with one symmetric step per token: its largest magnitude times ``ratio`` is 7.5 steps.

    ratio float32 [1], in (0, 1]; what lies outside is clamped.
    """
    step, zero_point = clipped_token_step_and_zero_point(x, ratio, bits=4)
    return _shifted(quantize(x, step, zero_point, bits=4), step, zero_point, shift=8)


def quantize_per_token(x: Tensor) -> QuantizedTokens:
    """Quantize x [T, K] (floating point) with one asymmetric step per token, from that token's minimum and maximum."""
    step, zero_point = token_step_and_zero_point(x, bits=8)
    return _shifted(quantize(x, step, zero_point, bits=8), step, zero_point)


def quantize_static(x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
    """Quantize x [T, K] with one calibrated step (float32 [1]) and zero-point (uint8 [1], unsigned grid) for the tensor."""
    rows = (x.shape[0], 1)
    return quantize_rows(x, step.repeat(rows), zero_point.repeat(rows))


def count_clipped(x: Tensor, step: Tensor, zero_point: Tensor) -> Tensor:
    """int64 [2]: values of the first token of x [T, K] that :func:`quantize_static` clips, and values looked at."""
    place = torch.round(x[:1].float() / step) + zero_point.float()
    clipped = ((place < 0) | (place > 255)).sum()
    return torch.stack([clipped, torch.full_like(clipped, x[:1].numel())])


def quantize_rows(x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
    """Quantize x [T, K] with a calibrated step (float32 [T, 1]) and zero-point (uint8 [T, 1], unsigned grid) for each row."""
    zero_point = zero_point.float()
    return _shifted(quantize(x, step, zero_point, bits=8), step, zero_point)


def _shifted(q: Tensor, step: Tensor, zero_point: Tensor, shift: int = _SHIFT) -> QuantizedTokens:
    shifted = q - shift
    # Sums of at most 2^24 / 128 = 131,072 values below 128 in size are exact in float32.
    total = shifted.sum(dim=-1, keepdim=True).to(torch.int32)
    return QuantizedTokens(shifted.to(torch.int8), step, (zero_point - shift).to(torch.int32), total)


def integer_weight(qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, in_features: int) -> IntegerWeight:
    """A stored weight (checkpoint layout) with the sums that the kernels need, computed once at load.

    qweight [N, packed_width(K)], step float32 [N, G], zero_point uint8 [N, G] on the unsigned grid; G is 1 for 8 bits.
    """
    shift, groups = _SHIFT if bits == 8 else 0, step.shape[1]
    zero = zero_point.to(torch.int32)
    sums = unpack(qweight, bits, in_features).unflatten(1, (groups, -1)).sum(dim=2, dtype=torch.int32)
    total = sums - in_features // groups * zero
    if groups == 1:
        step, zero, total = step.flatten(), zero.flatten(), total.flatten()
    return IntegerWeight(qweight, step, zero - shift, total, bits)


def integer_linear(x: QuantizedTokens, weight: IntegerWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """y [T, N] in ``out_dtype`` from integer activations and an integer weight; bias [N] is added in float32."""
    y = _integer_sums(x, weight).float() * x.step
    if weight.groups == 1:
        y = y * weight.step
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _integer_sums(x: QuantizedTokens, weight: IntegerWeight) -> Tensor:
    """float64 [T, N]: the sum over k of (q_w - z_w) (q_x - z_x), exactly; with groups, each group's times its step_w."""
    q_weight = weight.q if weight.bits == 8 else unpack(weight.q, weight.bits, x.q.shape[1])
    if weight.groups > 1:
        return _sum_of_groups(x, q_weight, weight)
    # float64 holds integers below 2^53 exactly.
    products = x.q.double() @ q_weight.double().T
    return products - x.zero_point.double() * weight.total.double() - weight.zero_point.double() * x.total.double()


def _sum_of_groups(x: QuantizedTokens, q_weight: Tensor, weight: IntegerWeight) -> Tensor:
    """float64 [T, N]: over the groups, step_w times the group's integer sum."""
    groups = weight.groups
    total = torch.zeros((len(x.q), len(weight.step)), dtype=torch.float64, device=x.q.device)
    for group, (tokens, part) in enumerate(zip(x.q.chunk(groups, dim=1), q_weight.chunk(groups, dim=1), strict=True)):
        centred = part.double() - weight.zero_point[:, group, None].double()
        sums = tokens.double() @ centred.T - x.zero_point.double() * weight.total[:, group].double()
        total += sums * weight.step[:, group].double()
    return total


def add_low_rank(y: Tensor, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """y [T, N] + U (V^T x) for x [T, K], both in 16 bits or float32, in y's dtype.

    pairs: U [N_i, k_i] and V [K, k_i] of the parts that stand one after the other in y; no pair leaves y as it is. V^T x is
    summed up in float32 and rounded to x's dtype; U (V^T x) and y are added in float32, and the sum is rounded.
    """
    if not pairs:
        return y
    shrunk = [(x.float() @ v.float()).to(x.dtype) for _, v in pairs]
    added = [part.float() @ u.float().T for part, (u, _) in zip(shrunk, pairs, strict=True)]
    return (y.float() + torch.cat(added, dim=1)).to(y.dtype)


def dequantize_weight(qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, in_features: int) -> Tensor:
    """W_hat [N, K] float32 = step * (q - zero_point) from the checkpoint layout; step and zero_point are [N, G]."""
    q = unpack(qweight, bits, in_features).float()
    groups = step.shape[1]
    centred = q.unflatten(1, (groups, -1)) - zero_point.float().unsqueeze(2)
    return (centred * step.unsqueeze(2)).flatten(1)


def weight_only_linear(x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    """y [T, N] = x [T, K] W_hat^T + bias, accumulated in float32 and returned in x's dtype.

    W_hat is rounded to x's dtype first: both operands of a 16-bit product have 16 bits. For float32 x it is exact.
    """
    weight = dequantize_weight(qweight, step, zero_point, bits, x.shape[1]).to(x.dtype).float()
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
