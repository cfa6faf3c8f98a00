"""Rows of weights that travel between processes: what copies into the others' memory give is what torch.distributed gives."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_offline import weight_transfers
from lrq_offline.rank_processes import started_ranks
from lrq_offline.ranks import Ranks
from lrq_offline.weight_transfers import PeerTransfers, transfers_between


class OneMemory:
    """Stands for the memory of several GPUs: each thread is a rank, and all see the same tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.lock = threading.Lock()
        self.tensors: dict[tuple[Any, ...], list[Tensor]] = {}
        self.made: dict[tuple[Any, ...], int] = {}
        self.size = size

    def buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        with self.lock:
            number = self.made[rank, shape, dtype] = self.made.get((rank, shape, dtype), 0) + 1
            memory = self.tensors.setdefault(
                (shape, dtype, number), [torch.full(shape, 99, dtype=dtype) for _ in range(self.size)]
            )
        return FakeBuffer(memory[rank], memory, self.barrier)


class FakeBuffer(weight_transfers._SharedBuffer):
    def __init__(self, own: Tensor, of_ranks: list[Tensor], barrier: threading.Barrier) -> None:
        self.own, self.of_ranks = own, of_ranks
        self._handle = SimpleNamespace(barrier=lambda: barrier.wait(timeout=20))


@pytest.fixture(params=[2, 3])
def on_all_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    size: int = request.param
    memory, local = OneMemory(size), threading.local()
    monkeypatch.setattr(weight_transfers, "_SharedBuffer", lambda shape, dtype, _: memory.buffer(local.rank, shape, dtype))

    def run(work: Callable[[PeerTransfers, Ranks], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            local.rank = rank
            ranks = Ranks(rank, size)
            return work(PeerTransfers(ranks, torch.device("cpu")), ranks)

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(as_rank, range(size)))

    return run


def test_all_rows_are_those_of_every_rank_in_order(on_all_ranks: Callable[..., list[Any]]) -> None:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def work(transfers: PeerTransfers, ranks: Ranks) -> list[Tensor]:
        first, second = (transfers.gatherer((6, 4), torch.float32) for _ in range(2))
        one, two = first(ranks.own_rows(weight)), second(ranks.own_rows(-weight))
        return [one.clone(), two.clone(), first(ranks.own_rows(3 * weight)).clone()]

    for got in on_all_ranks(work):
        assert all(torch.equal(tensor, factor * weight) for tensor, factor in zip(got, (1, -1, 3), strict=True))


def test_each_rank_gets_its_rows_of_the_sum_to_the_bit(on_all_ranks: Callable[..., list[Any]]) -> None:
    parts = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()

    def work(transfers: PeerTransfers, ranks: Ranks) -> list[Tensor]:
        return [transfers.own_rows_of_sum(factor * parts[ranks.rank]) for factor in (1, 2)]

    results = on_all_ranks(work)
    expected = parts[0] + parts[1] + (parts[2] if len(results) == 3 else 0)
    for number, factor in enumerate((1, 2)):
        assert torch.equal(torch.cat([result[number] for result in results]), factor * expected)


def test_the_next_block_uses_the_same_memory(on_all_ranks: Callable[..., list[Any]]) -> None:
    def work(transfers: PeerTransfers, ranks: Ranks) -> bool:
        weight = torch.ones(6, 4)
        first = transfers.gatherer((6, 4), torch.float32)(ranks.own_rows(weight))
        other = transfers.gatherer((6, 4), torch.float32)(ranks.own_rows(weight))
        transfers.begin_block()
        again = transfers.gatherer((6, 4), torch.float32)(ranks.own_rows(weight))
        return first.data_ptr() == again.data_ptr() != other.data_ptr()

    assert all(on_all_ranks(work))


@pytest.mark.parametrize("works", [True, False])
def test_gpus_that_cannot_share_memory_are_found_out(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared_buffer(*_: Any) -> None:
        if not works:
            raise RuntimeError("pidfd_getfd: Operation not permitted")

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.setattr(weight_transfers, "_SharedBuffer", shared_buffer)
    assert weight_transfers._peers_reach_each_other(Ranks(0, 1), torch.device("cpu")) is works


def check_on_gpus(ranks: Ranks) -> None:
    device = torch.device("cuda", ranks.rank)
    transfers = transfers_between(ranks, device)
    assert isinstance(transfers, PeerTransfers)
    generator = torch.Generator(device).manual_seed(ranks.rank)
    for shape in ((4096, 1024), (14336, 4096), (1024, 512)):
        gather = transfers.gatherer(shape, torch.bfloat16)
        for _ in range(3):
            tensor = torch.randn(shape, device=device, generator=generator).bfloat16()
            own = transfers.own_rows_of_sum(tensor)
            assert torch.equal(own, ranks.own_rows_of_sum(tensor))
            assert torch.equal(gather(own), ranks.all_rows(own))
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_transfer_what_nccl_does() -> None:
    with started_ranks(2, torch.device("cuda", 0), check_on_gpus) as ranks:
        check_on_gpus(ranks)
