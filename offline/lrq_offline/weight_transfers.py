"""How rows of weights and of their gradients travel between the processes of one run.

Where every GPU can write into the others' memory, the copy engines carry them, which takes no multiprocessor from the
computation beside it and, measured between two H100s, half the time of NCCL's kernels. Elsewhere torch.distributed does it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lrq_offline.ranks import Ranks

__all__ = ["PeerTransfers", "Transfers", "transfers_between"]

logger = logging.getLogger(__name__)


class Transfers(Protocol):
    """Every process calls the same methods in the same order."""

    def begin_block(self) -> None:
        """What :meth:`gatherer` and :meth:`scatterer` have given out is not used any more."""

    def gatherer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function from this process's rows to all rows, a tensor [shape] that the function's next call may overwrite."""

    def scatterer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
        """A function from each process's tensor [shape] to terms that make up this process's rows of the sum over all of them,
        tensors that the function's next call may overwrite.
        """


@cache
def transfers_between(ranks: Ranks, device: torch.device) -> Transfers:
    """The fastest that these processes have; all of them get the same. Their memory is that of these processes: once they have
    ended, ``transfers_between.cache_clear()`` gives it back.
    """
    if device.type == "cuda" and _peers_reach_each_other(ranks, device):
        return PeerTransfers(ranks, device)
    return _Collectives(ranks)


def _peers_reach_each_other(ranks: Ranks, device: torch.device) -> bool:
    pairs = ((one, other) for one in range(ranks.size) for other in range(ranks.size) if one != other)
    if not all(torch.cuda.can_device_access_peer(*pair) for pair in pairs):
        return False
    reached = torch.ones((), device=device)
    try:  # containers may forbid it
        _SharedBuffer((ranks.size,), torch.float32, device)
    except (ImportError, RuntimeError) as error:
        logger.warning("The GPUs cannot share memory (%s): NCCL carries what they tell each other, more slowly.", error)
        reached.zero_()
    return ranks.smallest(reached).item() == 1


@dataclass(frozen=True)
class _Collectives:
    """By torch.distributed."""

    ranks: Ranks

    def begin_block(self) -> None:
        """Nothing is kept."""

    def gatherer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return self.ranks.all_rows

    def scatterer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
        return lambda tensor: [self.ranks.own_rows_of_sum(tensor)]


class PeerTransfers:
    """By copies into the other GPUs' memory.

    Each transfer is a barrier (the others have done with what their memory held), the copies, and a barrier (they are there),
    all on the caller's stream, which can be captured in a CUDA graph once every buffer has been used.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._buffers: dict[tuple[Any, ...], _SharedBuffer] = {}
        self._given_out: Counter[tuple[Any, ...]] = Counter()

    def begin_block(self) -> None:
        """The next functions take memory that the block before has used."""
        self._given_out.clear()

    def gatherer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function from this process's rows to all rows, in memory of its own within a block."""
        buffer = self._buffer("all rows", shape, dtype)

        def all_rows(own: Tensor) -> Tensor:
            with buffer.exchange():
                for memory in buffer.of_ranks:
                    memory.chunk(self._ranks.size)[self._ranks.rank].copy_(own)
            return buffer.own.detach()

        return all_rows

    def scatterer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
        """A function to this process's rows of each process's tensor, in the order of the ranks; but of its own tensor they are
        where they were.
        """
        rank, size = self._ranks.rank, self._ranks.size
        buffer = self._buffer("terms", (size, shape[0] // size, *shape[1:]), dtype)

        def own_rows_of_all(tensor: Tensor) -> list[Tensor]:
            parts = tensor.chunk(size)
            with buffer.exchange():
                for other, memory in enumerate(buffer.of_ranks):
                    if other != rank:
                        memory[rank].copy_(parts[other])
            return [parts[rank] if other == rank else buffer.own[other] for other in range(size)]

        return own_rows_of_all

    def _buffer(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> "_SharedBuffer":
        """Memory that no other function has within a block."""
        wanted = (use, shape, dtype)
        self._given_out[wanted] += 1
        key = (*wanted, self._given_out[wanted])
        if key not in self._buffers:
            self._buffers[key] = _SharedBuffer(shape, dtype, self._device)
        return self._buffers[key]


class _SharedBuffer:
    """A tensor of the same shape in every process's GPU, each of which all can write into."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.own = symmetric_memory.empty(shape, dtype=dtype, device=device)
        world = dist.group.WORLD
        assert world is not None
        self._handle: Any = symmetric_memory.rendezvous(self.own, world)
        self.of_ranks = [self._handle.get_buffer(rank, shape, dtype) for rank in range(dist.get_world_size())]

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """What the processes write into each other's memory inside of it waits for all to come, and all wait for it."""
        self._handle.barrier()
        yield
        self._handle.barrier()
