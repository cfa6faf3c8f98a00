"""FlexRound and LRQ: weights whose rounding is learned through a scale for every element.

    W_hat = s1 * (clamp(round(W / (s1 * exp(S2))) + z, 0, 2^b - 1) - z)

FlexRound (arXiv 2306.00317): S2 is a full matrix plus a row vector r.
LRQ (arXiv 2407.11534, section 2): S2 = L U + r + c, with L [out, k] and U [k, in].
Both start at S2 = 0, that is, at round-to-nearest. Only s1, z and the integers outlive the learning.
"""

import math

import torch
from torch import Tensor, nn

from lrq_offline.affine import straight_through_round
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["FlexRoundScale", "FrozenRounding", "LearnedRounding", "LrqScale", "QuantizedWeight"]

QuantizedWeight = tuple[Tensor, StepAndZeroPoint]


class LearnedRounding(nn.Module):
    """One weight W [out, in] under quantization; calling it gives W_hat [out, in] with gradients.

    initial: steps and zero-points [out, groups]. The step s1 is learned as its logarithm, the zero-point stays.
    """

    weight: Tensor
    zero_point: Tensor

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("weight", weight.float())
        self.register_buffer("zero_point", initial.zero_point.float().unsqueeze(2))
        self.log_step = nn.Parameter(initial.step.float().log().unsqueeze(2))

    def log_scale(self) -> Tensor | None:
        """S2 [out, in], or None for no scale at all. Methods override this."""
        return None

    def _step_and_integers(self) -> tuple[Tensor, Tensor]:
        step = self.log_step.exp()  # [out, groups, 1]
        groups = step.shape[1]
        log_scale = self.log_scale()
        weight = self.weight if log_scale is None else self.weight * torch.exp(-log_scale)
        q = straight_through_round(weight.unflatten(1, (groups, -1)) / step) + self.zero_point
        return step, q.clamp(0, 2**self.bits - 1)

    def forward(self) -> Tensor:
        """W_hat [out, in], float32, also under autocast: rounding decisions must not depend on it."""
        with torch.autocast(self.weight.device.type, enabled=False):
            step, q = self._step_and_integers()
            return (step * (q - self.zero_point)).flatten(1)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """Integers uint8 [out, in] on the unsigned grid, with steps and zero-points [out, groups]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            step, q = self._step_and_integers()
        return q.flatten(1).to(torch.uint8), StepAndZeroPoint(step.squeeze(2), self.zero_point.squeeze(2))


class FrozenRounding(LearnedRounding):
    """Round-to-nearest: nothing is learned."""

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int) -> None:
        super().__init__(weight, initial, bits)
        self.log_step.requires_grad_(False)


class FlexRoundScale(LearnedRounding):
    """S2 [out, in] and r [out, 1], both zero at the start."""

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int) -> None:
        super().__init__(weight, initial, bits)
        self.matrix = nn.Parameter(torch.zeros_like(self.weight))
        self.row = nn.Parameter(torch.zeros_like(self.weight[:, :1]))

    def log_scale(self) -> Tensor:
        """S2 + r."""
        return self.matrix + self.row


class LrqScale(LearnedRounding):
    """S2 = L U + r + c: L, r and c zero at the start, U Kaiming-uniform with a = sqrt(5). rank is capped by W's sides."""

    def __init__(self, weight: Tensor, initial: StepAndZeroPoint, bits: int, rank: int, generator: torch.Generator) -> None:
        super().__init__(weight, initial, bits)
        out_features, in_features = weight.shape
        rank = min(rank, out_features, in_features)
        self.left = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
        right = torch.empty(rank, in_features)
        nn.init.kaiming_uniform_(right, a=math.sqrt(5), generator=generator)
        self.right = nn.Parameter(right.to(weight.device))
        self.row = nn.Parameter(torch.zeros_like(self.weight[:, :1]))
        self.column = nn.Parameter(torch.zeros_like(self.weight[:1]))

    def log_scale(self) -> Tensor:
        """L U + r + c."""
        return self.left @ self.right + self.row + self.column
