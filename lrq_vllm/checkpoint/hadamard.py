"""Rotations by Hadamard matrices: what ``online_hadamard`` in config.json asks of a server, and the matrices themselves.

    x' = H x,   H = I_(in / B) (x) H_B,   H_B = (P_m (x) S_(B / m)) / sqrt(B)          (x): Kronecker product

S_n is Sylvester's matrix, n a power of two: S[i, j] = (-1)^(number of ones in the binary i & j). P_m is Paley's of order m
(P_1 = [1]); with q prime, a and b in 0 .. q - 1 and chi the quadratic character modulo q (0 at 0, 1 at squares, -1 elsewhere),

    type I,  m = q + 1,     q = 3 mod 4:   P = I + [[0, 1], [-1, Q]],   Q[a, b] = chi(a - b)
    type II, m = 2 (q + 1), q = 1 mod 4:   P = [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]

where 1 and -1 beside Q are a row and a column of them. An order that has both types has type I. All of H is orthogonal.
R. E. A. C. Paley, "On orthogonal matrices", Journal of Mathematics and Physics 12 (1933); QuaRot (arXiv 2404.00456).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["OnlineHadamard", "paley_matrix", "paley_order", "paley_table", "refill_tables", "rotate"]

_LARGEST_ORDER = 1024

_tables: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}
"""Every :func:`paley_table`, by its arguments."""


@dataclass(frozen=True)
class OnlineHadamard:
    """modules: those whose input is rotated while serving, before anything else reads it. block: B. order: m."""

    modules: tuple[str, ...]
    block: int
    order: int

    def to_dict(self) -> dict[str, Any]:
        """The object under ``online_hadamard`` in config.json."""
        return {"modules": list(self.modules), "block": self.block, "order": self.order}

    def problems(self, quantized: Mapping[str, tuple[int, int]]) -> list[str]:
        """What is wrong with it in a checkpoint of these modules, name -> (out, in)."""
        if not self.modules or len(set(self.modules)) != len(self.modules):
            return ["online_hadamard lists no module, or one twice"]
        unknown = [name for name in self.modules if name not in quantized]
        if unknown:
            return [f"online_hadamard lists {unknown[0]}, which is not quantized"]
        size = self.block // self.order if self.order > 0 and self.block > 0 else 0
        if size * self.order != self.block or not _is_power_of_two(size) or not _has_paley_matrix(self.order):
            return [f"no Hadamard matrix has block {self.block} and order {self.order}"]
        return [
            f"online_hadamard's block {self.block} does not divide the {quantized[name][1]} inputs of {name}"
            for name in self.modules
            if quantized[name][1] % self.block
        ]


def paley_order(block: int) -> int | None:
    """The smallest m up to 1024 for which H_B with B = ``block`` exists; None if there is none."""
    power = block & -block  # the largest power of two in it
    orders = (block // power << shift for shift in range(power.bit_length()))
    return next((order for order in orders if order <= _LARGEST_ORDER and _has_paley_matrix(order)), None)


@cache
def paley_matrix(order: int) -> Tensor:
    """P_m, float32 [m, m] of 1 and -1, on the CPU. Only for orders that :func:`paley_order` returns. Not to be changed."""
    with torch.device("cpu"):  # vLLM builds models under another one
        if order == 1:
            return torch.ones(1, 1, dtype=torch.float32)
        if _is_prime(order - 1) and order % 4 == 0:
            return torch.eye(order, dtype=torch.float32) + _bordered(order - 1, -1.0)
        conference = _bordered(order // 2 - 1, 1.0)
        first, second = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float32)
        return torch.kron(conference, first) + torch.kron(torch.eye(order // 2, dtype=torch.float32), second)


def rotate(x: Tensor, block: int, order: int) -> Tensor:
    """H x for every x [in] in the last dimension of x [..., in], computed in float32 and returned so."""
    with torch.autocast(x.device.type, enabled=False):
        y = x.float().reshape(-1, order, block // order)
        if order > 1:
            y = paley_table(order, order, torch.float32, x.device) @ y
        half = 1
        while half < block // order:
            pairs = y.reshape(-1, 2, half)
            y = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1)
            half *= 2
        return (y * block**-0.5).reshape(x.shape)


def paley_table(order: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """P_m, filled up with zeros to [rows, rows]: one tensor for all who ask, at an address that stays. Not to be changed."""
    key = order, rows, dtype, device
    if key not in _tables:
        with torch.inference_mode(False):  # a tensor of that mode could not be written again outside of it
            _tables[key] = torch.empty(rows, rows, dtype=dtype, device=device)
            _fill(_tables[key], order)
    return _tables[key]


def refill_tables() -> None:
    """Write every table again, in its place. What was allocated while vLLM loaded weights loses its values in its sleep mode
    (level 2), after which weights are loaded again; CUDA graphs go on to read the same addresses.
    """
    for (order, *_), table in _tables.items():
        _fill(table, order)


def _fill(table: Tensor, order: int) -> None:
    table.zero_()
    table[:order, :order] = paley_matrix(order)


def _bordered(q: int, left: float) -> Tensor:
    """[[0, 1], [left, Q]], [q + 1, q + 1]."""
    chi = torch.full((q,), -1.0, dtype=torch.float32)
    chi[torch.arange(1, q).square() % q] = 1.0
    chi[0] = 0.0
    index = torch.arange(q)
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float32)
    bordered[0, 1:], bordered[1:, 0] = 1.0, left
    bordered[1:, 1:] = chi[(index.unsqueeze(1) - index) % q]
    return bordered


def _has_paley_matrix(order: int) -> bool:
    if order == 1:
        return True
    return order % 4 == 0 and (_is_prime(order - 1) or (order // 2 % 4 == 2 and _is_prime(order // 2 - 1)))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
