"""The cached hidden states: where they are put, what is read back, and the batches that learning is fed with."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lrq_offline import hidden_states
from lrq_offline.hidden_states import BatchFeeder, HiddenStates, HiddenStatesStore

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
SHAPE = (6, 4, 8)
BYTES = 6 * 4 * 8 * 2

SetMemory = Callable[[int], None]


@pytest.fixture
def host_memory(monkeypatch: pytest.MonkeyPatch) -> SetMemory:
    """Sets how many bytes of host memory are free."""

    def set_memory(available: int) -> None:
        monkeypatch.setattr(hidden_states.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))

    return set_memory


def filled(store: HiddenStatesStore) -> tuple[HiddenStates, Tensor]:
    """A cache of random numbers, and these numbers."""
    values = torch.randn(SHAPE).to(torch.bfloat16)
    cache = store.like(SHAPE, torch.bfloat16)
    for rows in cache.slices(4):
        cache.put(rows, values[rows].to(cache.device))
    return cache, values


# --- where ---


def test_what_leaves_half_of_the_host_memory_free_goes_there(tmp_path: Path, host_memory: SetMemory) -> None:
    store = HiddenStatesStore(CPU, 10**12, tmp_path)
    host_memory(2 * BYTES)
    cache, values = filled(store)
    assert store.places == ["host memory"] and list(tmp_path.iterdir()) == []
    assert torch.equal(cache.get(slice(None)), values)


def test_what_does_not_goes_to_the_disk_and_reads_the_same(tmp_path: Path, host_memory: SetMemory) -> None:
    store = HiddenStatesStore(CPU, 0, tmp_path)
    host_memory(2 * BYTES - 2)
    cache, values = filled(store)
    assert store.places == ["disk"]
    assert torch.equal(cache.get(slice(None)), values)
    assert torch.equal(cache.get(torch.tensor([5, 0])), values[[5, 0]])


def test_each_cache_goes_where_there_is_room_at_its_time(tmp_path: Path, host_memory: SetMemory) -> None:
    store = HiddenStatesStore(CPU, 0, tmp_path)
    made = []
    for available in (0, 10**9, 0):
        host_memory(available)
        made.append(filled(store))
    assert store.places == ["disk", "host memory", "disk"]
    # None has written over another.
    assert all(torch.equal(cache.get(slice(None)), values) for cache, values in made)


def test_caches_that_are_not_written_yet_take_room_too(tmp_path: Path, host_memory: SetMemory) -> None:
    host_memory(4 * BYTES)
    store = HiddenStatesStore(CPU, 0, tmp_path)
    for _ in range(4):  # 4 are free, then 3, and of 2 half is no more than one
        store.like(SHAPE, torch.bfloat16)
    assert store.places == ["host memory", "host memory", "host memory", "disk"]


def test_a_cache_on_the_disk_leaves_no_file(tmp_path: Path, host_memory: SetMemory) -> None:
    host_memory(0)
    cache, values = filled(HiddenStatesStore(CPU, 0, tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(cache.get(slice(None)), values)


@pytest.mark.gpu
def test_the_gpu_is_filled_up_to_its_budget_first(tmp_path: Path, host_memory: SetMemory) -> None:
    store = HiddenStatesStore(CUDA, 2 * BYTES + 1, tmp_path)
    made = []
    for available in (10**9, 10**9, 10**9, 0):
        host_memory(available)
        made.append(filled(store))
    assert store.places == ["GPU memory", "GPU memory", "host memory", "disk"]
    for cache, values in made:
        assert cache.get(slice(1, 4)).is_cuda and torch.equal(cache.get(slice(1, 4)).cpu(), values[1:4])
        assert torch.equal(cache.get(torch.tensor([5, 0])).cpu(), values[[5, 0]])


# --- what is read back ---


def test_samples_are_rounded_to_the_caches_dtype_and_no_others_touched() -> None:
    cache = HiddenStates(torch.zeros(SHAPE, dtype=torch.bfloat16), CPU)
    values = torch.randn(2, 4, 8)
    cache.put(slice(2, 4), values)
    assert torch.equal(cache.get(slice(2, 4)), values.to(torch.bfloat16))
    assert not cache.get(torch.tensor([0, 1, 4, 5])).any()


@pytest.mark.parametrize(("size", "expected"), [(1, 6), (4, 2), (6, 1), (100, 1)])
def test_slices_hold_every_sample_once_and_in_order(size: int, expected: int) -> None:
    cache = HiddenStates(torch.zeros(SHAPE), CPU)
    slices = list(cache.slices(size))
    assert len(slices) == expected and max(rows.stop - rows.start for rows in slices) <= size
    assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(len(cache)))


# --- batches ---


def check_batches(inputs: tuple[HiddenStates, Tensor], targets: tuple[HiddenStates, Tensor]) -> None:
    """A feeder over both gives random batches in their order, in tensors that stay the same."""
    batches = torch.stack([torch.randperm(len(inputs[0]))[:2] for _ in range(20)])
    feeder = BatchFeeder(inputs[0], targets[0], batches)
    fixed = (feeder.inputs, feeder.targets)
    for step, rows in enumerate(batches):
        feeder.feed(step)
        assert feeder.inputs is fixed[0] and feeder.targets is fixed[1]
        assert feeder.inputs.device.type == inputs[0].device.type
        assert torch.equal(feeder.inputs.cpu(), inputs[1][rows]) and torch.equal(feeder.targets.cpu(), targets[1][rows])


@pytest.mark.parametrize("places", [("host memory", "host memory"), ("host memory", "disk"), ("disk", "disk")], ids="+".join)
def test_the_feeder_gives_the_batches_in_order(tmp_path: Path, host_memory: SetMemory, places: tuple[str, str]) -> None:
    store = HiddenStatesStore(CPU, 0, tmp_path)
    caches = []
    for place in places:
        host_memory(10**9 if place == "host memory" else 0)
        caches.append(filled(store))
    check_batches(*caches)
    assert store.places == list(places)


def test_inputs_and_targets_may_have_different_dtypes() -> None:
    values = torch.randn(SHAPE).to(torch.bfloat16), torch.randn(SHAPE)
    check_batches(*((HiddenStates(tensor.clone(), CPU), tensor) for tensor in values))


def test_a_batch_may_be_asked_for_again_and_out_of_order() -> None:
    values = torch.arange(6.0).reshape(6, 1, 1)
    cache = HiddenStates(values, CPU)
    feeder = BatchFeeder(cache, cache, torch.tensor([[0, 1], [2, 3], [4, 5]]))
    for step in (0, 0, 2, 1):
        feeder.feed(step)
        assert feeder.inputs.flatten().tolist() == [2 * step, 2 * step + 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "places",
    [("GPU memory", "GPU memory"), ("GPU memory", "host memory"), ("host memory", "disk"), ("disk", "disk")],
    ids="+".join,
)
def test_the_feeder_gives_the_batches_in_order_on_a_gpu(
    tmp_path: Path, host_memory: SetMemory, places: tuple[str, str]
) -> None:
    caches = []
    for place in places:
        host_memory(10**9 if place == "host memory" else 0)
        caches.append(filled(HiddenStatesStore(CUDA, BYTES if place == "GPU memory" else 0, tmp_path)))
    check_batches(*caches)


@pytest.mark.gpu
def test_a_batch_may_be_asked_for_again_and_out_of_order_on_a_gpu() -> None:
    cache = HiddenStates(torch.arange(6.0).reshape(6, 1, 1).pin_memory(), CUDA)
    feeder = BatchFeeder(cache, cache, torch.tensor([[0, 1], [2, 3], [4, 5]]))
    for step in (0, 0, 2, 1):
        feeder.feed(step)
        assert feeder.inputs.flatten().tolist() == [2 * step, 2 * step + 1]
