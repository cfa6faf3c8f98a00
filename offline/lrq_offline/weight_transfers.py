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
        """What :meth:`gatherer` has given out is not used any more."""

    def gatherer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function from this process's rows to all rows, a tensor [shape] that the function's next call may overwrite."""

    def own_rows_of_sum(self, tensor: Tensor) -> Tensor:
        """This process's rows of the sum over all processes."""


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

    def own_rows_of_sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.own_rows_of_sum(tensor)


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
        """The next :meth:`gatherer` takes memory that the block before has used."""
        self._given_out.clear()

    def gatherer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function from this process's rows to all rows, in memory of its own within a block."""
        key = (shape, dtype)
        self._given_out[key] += 1
        buffer = self._buffer("all rows", *key, self._given_out[key])

        def all_rows(own: Tensor) -> Tensor:
            with buffer.exchange():
                for memory in buffer.of_ranks:
                    memory.chunk(self._ranks.size)[self._ranks.rank].copy_(own)
            return buffer.own.detach()

        return all_rows

    def own_rows_of_sum(self, tensor: Tensor) -> Tensor:
        """This process's rows of the sum, added in the order of the ranks."""
        rank, parts = self._ranks.rank, tensor.chunk(self._ranks.size)
        buffer = self._buffer("parts of a sum", (self._ranks.size, *parts[0].shape), tensor.dtype)
        with buffer.exchange():
            for other, memory in enumerate(buffer.of_ranks):
                if other != rank:
                    memory[rank].copy_(parts[other])
        received = [parts[rank] if other == rank else buffer.own[other] for other in range(self._ranks.size)]
        total = received[0] + received[1]
        for part in received[2:]:
            total += part
        return total

    def _buffer(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, *rest: int) -> "_SharedBuffer":
        key = (use, shape, dtype, *rest)
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
