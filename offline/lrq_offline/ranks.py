"""The processes of one run, one for each GPU. Each holds its share of the calibration windows and of every weight's rows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ONE_RANK", "Ranks"]

# Renamed in torch 2.13.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Ranks:
    """Process ``rank`` of ``size``. With one process every method gives back what it was given."""

    rank: int = 0
    size: int = 1

    def share(self, samples: Tensor) -> Tensor:
        """This process's samples, [samples / size, ...] of [samples, ...]."""
        return samples[self.rank :: self.size]

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This process's part of dimension 0, which ``size`` divides."""
        return tensor.chunk(self.size)[self.rank].contiguous()

    def all_rows(self, own: Tensor) -> Tensor:
        """What :meth:`own_rows` of every process make together: the same tensor everywhere. Differentiable."""
        if self.size == 1:
            return own
        result: Tensor = _AllRows.apply(own, self.size)  # type: ignore[no-untyped-call]
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place: the same bits everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def smallest(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return tensor


ONE_RANK = Ranks()


class _AllRows(torch.autograd.Function):
    """All-gather; backwards each process receives the sum of all gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, size: int) -> Tensor:
        ctx.size = size
        gathered = own.new_empty((size * len(own), *own.shape[1:]))
        _all_gather(gathered, own)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        own = gradient.new_empty((len(gradient) // ctx.size, *gradient.shape[1:]))
        _reduce_scatter(own, gradient)
        return own, None
