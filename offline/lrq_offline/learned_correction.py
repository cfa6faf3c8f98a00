"""A low-rank correction that is learned together with the scales of the weight beside it.

    y = W_hat Q(x) + U (V^T x)

U [out, k] and V [in, k] start where LRC's closed form (low_rank_correction.py) ends. Their columns are of very different sizes,
and AdamW moves every element about as far as any other: what it moves are columns divided by their own root mean square at the
start, so that the rate of the scales fits them too, whatever the width.
"""

import torch
from torch import Tensor, nn

from lrq_offline.low_rank_correction import LowRankPair

__all__ = ["LearnedCorrection"]


class LearnedCorrection(nn.Module):
    """U and V with gradients; a column of zeros stays one. dtype: of the products with them."""

    u_size: Tensor
    v_size: Tensor

    def __init__(self, u: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("u_size", _column_size(u))
        self.register_buffer("v_size", _column_size(v))
        self.u = nn.Parameter(u.float() / self.u_size)
        self.v = nn.Parameter(v.float() / self.v_size)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U and V in ``dtype``."""
        return (self.u * self.u_size).to(self.dtype), (self.v * self.v_size).to(self.dtype)

    @torch.no_grad()
    def pair(self) -> LowRankPair:
        """What they have become."""
        return LowRankPair(self.u.double() * self.u_size, self.v.double() * self.v_size)


def _column_size(factor: Tensor) -> Tensor:
    return factor.float().square().mean(dim=0).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
