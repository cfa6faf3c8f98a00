"""Experts that are multiplied one after the other, as an op that torch.compile does not look into: which expert gets what, and
whether any, is known only when it runs.
"""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lrq_vllm.expert_stack import Routing

__all__ = ["OpaqueExperts"]

_numbers = count()
_by_number: "WeakValueDictionary[int, OpaqueExperts]" = WeakValueDictionary()


class OpaqueExperts:
    """An ExpertLinear (expert_backends.py) with so many outputs, through that op."""

    def __init__(self, linear: Callable[[Tensor, int, Routing], Tensor], outputs: int) -> None:
        self.linear = linear
        self._outputs = outputs
        number = next(_numbers)
        # As a tensor it is no constant of a graph, and layers that are alike are compiled once.
        self._number = torch.tensor(number)
        _by_number[number] = self

    def __call__(self, x: Tensor, slots_per_row: int, routing: Routing) -> Tensor:
        """y [S, out] in x's dtype."""
        return _experts_linear(x, routing.expert_of, slots_per_row, routing.experts, self._number, self._outputs)


@torch.library.custom_op("lrq::experts_linear", mutates_args=())
def _experts_linear(
    x: Tensor, expert_of: Tensor, slots_per_row: int, experts: int, number: Tensor, outputs: int
) -> Tensor:  # fmt: skip
    return _by_number[int(number)].linear(x, slots_per_row, Routing(expert_of, experts))


@_experts_linear.register_fake
def _(x: Tensor, expert_of: Tensor, slots_per_row: int, experts: int, number: Tensor, outputs: int) -> Tensor:
    return x.new_empty((expert_of.shape[0], outputs))
