"""One layer of all experts, and which of them each slot goes to, as the backends take them."""

from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from lrq_vllm.kernels.expert_routes import Routes, expert_routes

__all__ = ["ExpertStack", "Routing"]


class ExpertStack(NamedTuple):
    """One layer of all experts of this rank, as the checkpoint stores it.

    q [experts, out, words], step and zero_point [experts, out, groups]; static: the calibrated step and zero-point of each
    expert's input, float32 and uint8 [experts, 1], or None.
    """

    q: Tensor
    step: Tensor
    zero_point: Tensor
    static: tuple[Tensor, Tensor] | None
    bits: int
    in_features: int


class Routing:
    """Of S slots, a slot being one choice of one token. expert_of: int64 [S], negative where no expert of this rank has it.

    of_all_ranks: how many experts all ranks have, where nothing may depend on how they share them (tp_invariance.py), else 0.
    """

    def __init__(self, expert_of: Tensor, experts: int, of_all_ranks: int = 0) -> None:
        self.expert_of = expert_of
        self.experts = experts
        self.of_all_ranks = of_all_ranks

    @cached_property
    def routes(self) -> Routes:
        """For the grouped kernels, in blocks of as many slots as an expert gets on average, within what they take."""
        average = len(self.expert_of) / (self.of_all_ranks or self.experts)
        block = 16 if average <= 16 else 32 if average <= 32 else 64
        return expert_routes(self.expert_of, self.experts, block)
