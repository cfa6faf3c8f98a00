"""How large a difference of a block's output is: all channels alike, or as much as it changes what the model predicts.

A small difference d of a token's hidden state changes the model's predictions by about d^T F d / 2 nats (KL divergence),
where F is the Fisher information: the second moments of the gradients of log-probabilities with respect to that hidden state.
Here F is that of all tokens together (BRECQ, arXiv 2102.05426, section 3.3, takes each output's own square instead).
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PLAIN", "OutputMetric", "fisher_metric"]

logger = logging.getLogger(__name__)

# Share of the identity in F, whose moments are those of some thousand tokens. Between 0.005 and 0.2 KL on validation text
# differs by 3% at most, as between 32 and 128 windows (bench/results/fisher-damping-small-h200.json).
_DAMPING = 0.05


@dataclass(frozen=True)
class OutputMetric:
    """factor: C [width, width] with F = C C^T, lower triangular, in the dtype of the block's products; None for |d|^2."""

    factor: Tensor | None = None

    def __call__(self, differences: Tensor) -> Tensor:
        """Vectors [..., width], float32, whose lengths are those of ``differences`` [..., width] in this metric."""
        if self.factor is None:
            return differences
        return (differences.to(self.factor.dtype) @ self.factor).float()

    def mean_square(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean of the squared elements of the differences' vectors, float32 scalar, with a gradient for ``output``."""
        output, targets = output.float(), targets.float()
        if self.factor is None:
            return functional.mse_loss(output, targets)
        mean: Tensor = _MeanSquare.apply(output - targets, self.factor)  # type: ignore[no-untyped-call]
        return mean


class _MeanSquare(torch.autograd.Function):
    """What autograd makes of OutputMetric's vectors, with fewer passes over them."""

    @staticmethod
    def forward(ctx: Any, differences: Tensor, factor: Tensor) -> Tensor:
        vectors = differences.to(factor.dtype) @ factor
        ctx.save_for_backward(vectors, factor)
        return torch.linalg.vector_norm(vectors, dtype=torch.float32).square() / vectors.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        vectors, factor = ctx.saved_tensors
        return (vectors * (gradients[0] * (2 / vectors.numel())) @ factor.T).float(), None


PLAIN = OutputMetric()


def fisher_metric(moments: Tensor, dtype: torch.dtype) -> OutputMetric:
    """From second moments of gradients [width, width], of any size: F has a mean of 1 on its diagonal.

    PLAIN where they hold NaN or infinite values, or nothing but zeros, with a warning.
    """
    moments = moments.double()
    size = moments.diagonal().mean()
    if not torch.isfinite(moments).all() or size <= 0:
        logger.warning("the gradients of a block's output say nothing (all zero, NaN or infinite): its channels count alike")
        return PLAIN
    identity = torch.eye(len(moments), dtype=torch.float64, device=moments.device)
    return OutputMetric(torch.linalg.cholesky((1 - _DAMPING) * moments / size + _DAMPING * identity).to(dtype))
