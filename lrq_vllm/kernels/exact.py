"""A layer whose result does not depend on the order of its sums: they are taken in float64, in plain torch, on any device.

float64 holds sums of integers exactly, and sums of 16-bit products to many more digits than are left when the result is
rounded. So the layer may be whole, or shared by processes that have some of its inputs each (``ranks``): its result is the
same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lrq_vllm.kernels import reference
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind, IntegerWeight, QuantizedTokens

__all__ = [
    "ONE_RANK",
    "ExactArithmetic",
    "InputRanks",
    "add_low_rank",
    "integer_linear",
    "quantize_input",
    "weight_only_linear",
]


class InputRanks(Protocol):
    """The processes that have a layer's inputs; all of them get what is returned."""

    def total(self, values: Tensor) -> Tensor:
        """The sum of every process's values, element by element."""

    def largest(self, values: Tensor) -> Tensor:
        """The largest of every process's values, element by element."""


class _OneRank:
    def total(self, values: Tensor) -> Tensor:
        return values

    def largest(self, values: Tensor) -> Tensor:
        return values


ONE_RANK: InputRanks = _OneRank()
"""One process has all inputs."""


def quantize_input(x: Tensor, grid: InputGrid, ranks: InputRanks) -> QuantizedTokens:
    """As reference.quantize_input. x [T, K]: this process's inputs; a token's own step is that of all processes' inputs."""
    if grid.kind is InputKind.STATIC:
        return reference.quantize_input(x, grid)
    bounds = ranks.largest(torch.cat([-x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1))
    # Beside these two a token has the same range everywhere.
    tokens = reference.quantize_input(torch.cat([x, -bounds[:, :1], bounds[:, 1:]], dim=1), grid)
    q = tokens.q[:, :-2]
    return tokens._replace(q=q, total=q.sum(dim=1, keepdim=True, dtype=torch.int32))


def integer_linear(
    x: QuantizedTokens, weight: IntegerWeight, bias: Tensor | None, out_dtype: torch.dtype, ranks: InputRanks, *, grouped: bool
) -> Tensor:
    """As reference.integer_linear, y [T, N]. x and weight: this process's inputs; bias [N]: the whole layer's. grouped: whether
    steps are those of groups of inputs; this process may have one group alone.
    """
    sums = reference.integer_sums(x, weight)
    if grouped and weight.groups == 1:
        sums, weight = sums * weight.step.double(), weight._replace(step=torch.ones_like(weight.step))
    return reference.scaled_sums(ranks.total(sums), x, weight, bias, out_dtype)


def weight_only_linear(
    x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None, ranks: InputRanks
) -> Tensor:
    """As reference.weight_only_linear, y [T, N] in x's dtype. x [T, K] and the weight: this process's inputs."""
    weight = reference.dequantize_weight(qweight, step, zero_point, bits, x.shape[1]).to(x.dtype)
    y = ranks.total(x.double() @ weight.double().T)
    return (y if bias is None else y + bias.double()).to(x.dtype)


def add_low_rank(y: Tensor, x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], ranks: InputRanks) -> Tensor:
    """As reference.add_low_rank. y [T, N]: the whole product; x [T, K] and each V: this process's inputs."""
    shrunk = [ranks.total(x.double() @ v.double()).to(x.dtype) for _, v in pairs]
    added = [part.double() @ u.double().T for part, (u, _) in zip(shrunk, pairs, strict=True)]
    return (y.double() + torch.cat(added, dim=1)).to(y.dtype)


@dataclass(frozen=True)
class ExactArithmetic:
    """What experts compute with, by the names that it has in reference.py, for inputs that ``ranks`` share. grouped: as for
    :func:`integer_linear`.
    """

    ranks: InputRanks
    grouped: bool

    def quantize_per_token(self, x: Tensor) -> QuantizedTokens:
        """Of this process's inputs, with steps of all processes' inputs."""
        return quantize_input(x, PER_TOKEN, self.ranks)

    def quantize_static(self, x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
        """As reference.quantize_static."""
        return reference.quantize_static(x, step, zero_point)

    def quantize_rows(self, x: Tensor, step: Tensor, zero_point: Tensor) -> QuantizedTokens:
        """As reference.quantize_rows."""
        return reference.quantize_rows(x, step, zero_point)

    def integer_linear(self, x: QuantizedTokens, weight: IntegerWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """:func:`integer_linear` of these ranks."""
        return integer_linear(x, weight, bias, out_dtype, self.ranks, grouped=self.grouped)

    def weight_only_linear(
        self, x: Tensor, qweight: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None
    ) -> Tensor:
        """:func:`weight_only_linear` of these ranks."""
        return weight_only_linear(x, qweight, step, zero_point, bits, bias, self.ranks)
