"""The processes of one run, one for each GPU. Each holds its share of the calibration windows and of every weight's rows."""

from dataclasses import dataclass

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

    def own_generator(self, generator: torch.Generator) -> torch.Generator:
        """For draws that are not as many in every process: one that is seeded by ``generator``, the same in all of them, which
        they would drive apart.
        """
        if self.size == 1:
            return generator
        seed = int(torch.randint(2**62, (), generator=generator).item())
        return torch.Generator().manual_seed(seed + self.rank)

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This process's part of dimension 0, which ``size`` divides."""
        return tensor.chunk(self.size)[self.rank].contiguous()

    def all_rows(self, own: Tensor) -> Tensor:
        """What :meth:`own_rows` of every process make together: the same tensor everywhere."""
        if self.size == 1:
            return own
        gathered = own.new_empty((self.size * len(own), *own.shape[1:]))
        _all_gather(gathered, own)
        return gathered

    def joined(self, own: Tensor) -> Tensor:
        """All processes' rows, however many each has, in the order of the processes: the same tensor everywhere."""
        if self.size == 1:
            return own
        counts = self.all_rows(torch.tensor([len(own)], device=own.device)).tolist()
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        parts = self.all_rows(padded).unflatten(0, (self.size, len(padded)))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def own_rows_of_sum(self, tensor: Tensor) -> Tensor:
        """:meth:`own_rows` of the sum over all processes."""
        if self.size == 1:
            return tensor
        own = tensor.new_empty((len(tensor) // self.size, *tensor.shape[1:]))
        _reduce_scatter(own, tensor.contiguous())
        return own

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
