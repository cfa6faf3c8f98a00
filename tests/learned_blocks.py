"""Small formulas for learning to work on, instead of Transformer layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lrq_offline.hidden_states import HiddenStates

__all__ = ["WIDTH", "Gain", "states"]

WIDTH = 8


class Gain(nn.Module):
    """x times one learned number, which ``curve`` bends."""

    def __init__(self, value: float, curve: Callable[[Tensor], Tensor] = lambda gain: gain) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(value))
        self.curve = curve

    def forward(self, x: Tensor) -> Tensor:
        return x * self.curve(self.gain)


def states(values: Tensor) -> HiddenStates:
    return HiddenStates(values, torch.device("cpu"))
