"""The cached inputs and outputs of blocks, [samples, seq_len, width]: on the GPU, else in pinned host memory, else on disk."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

__all__ = ["BatchFeeder", "HiddenStates", "HiddenStatesStore"]

logger = logging.getLogger(__name__)


class HiddenStates:
    """One cached tensor [samples, seq_len, width] and the device it is computed on."""

    def __init__(self, stored: Tensor, device: torch.device) -> None:
        self.stored = stored
        self.device = device

    def __len__(self) -> int:
        return len(self.stored)

    def get(self, rows: slice | Tensor) -> Tensor:
        """Those samples on the computing device; rows: a slice or int64 indices on the CPU."""
        if isinstance(rows, Tensor) and self.stored.is_cuda:
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        return self.stored[rows].to(self.device, non_blocking=True)

    def put(self, rows: slice, values: Tensor) -> None:
        """Replace those samples, rounding to the cache's dtype."""
        self.stored[rows].copy_(values)

    def copy(self, other: "HiddenStates") -> None:
        """Replace all samples by those of another cache."""
        self.stored.copy_(other.stored)

    def slices(self, size: int) -> Iterator[slice]:
        """All samples in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


class HiddenStatesStore:
    """Makes caches, each in the fastest place that still has room: the GPU up to a budget, host memory of which it leaves half
    free, a folder.
    """

    def __init__(self, device: torch.device, gpu_bytes: int, folder: Path) -> None:
        self._device = device
        self._gpu_bytes = gpu_bytes
        self._promised = 0  # bytes of host memory that still count as available
        self._folder = folder
        self.places: list[str] = []

    def place_for(self, size: int) -> str:
        """Where the next cache of ``size`` bytes goes; its room is taken from what there is of memory."""
        if self._device.type == "cuda" and size <= self._gpu_bytes:
            self._gpu_bytes -= size
            return "GPU memory"
        if size <= (psutil.virtual_memory().available - self._promised) // 2:
            self._promised += size
            return "host memory"
        return "disk"

    def like(self, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenStates:
        """An uninitialised cache."""
        size = torch.Size(shape).numel() * dtype.itemsize
        place = self.place_for(size)
        if place == "GPU memory":
            return self._made(place, torch.empty(shape, dtype=dtype, device=self._device))
        if place == "host memory":
            pinned = self._device.type == "cuda"
            cache = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            if pinned:  # which takes the memory now; else it is taken when it is written
                self._promised -= size
            return self._made(place, cache)
        # Mapped, not read: the file lives as long as the tensor and is gone with the process. Its room is taken now: a disk
        # that fills up under a mapping ends the process.
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".hidden-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = torch.from_file(file.name, shared=True, size=torch.Size(shape).numel(), dtype=dtype)
        return self._made(place, mapped.view(shape))

    def _made(self, place: str, tensor: Tensor) -> HiddenStates:
        logger.info("%.2f GB of hidden states in %s", tensor.nbytes / 1e9, place)
        self.places.append(place)
        return HiddenStates(tensor, self._device)


class BatchFeeder:
    """Fills two fixed device tensors, inputs and targets [batch, seq_len, width], with one batch after the other.

    Caches in pinned memory are copied one batch ahead on a stream of their own, so that the loop never waits for the host.
    """

    def __init__(self, inputs: HiddenStates, targets: HiddenStates, batches: Tensor) -> None:
        self._sources = (inputs, targets)
        self._batches = batches
        size = batches.shape[1]
        self.inputs, self.targets = (s.stored.new_empty((size, *s.stored.shape[1:]), device=s.device) for s in self._sources)
        self._fixed = (self.inputs, self.targets)
        self._device = inputs.device
        self._on_device = all(source.stored.device.type == self._device.type for source in self._sources)
        if self._on_device:
            self._indices = batches.to(self._device)
            return
        self._stream = torch.cuda.Stream(self._device)
        self._ahead = tuple(torch.empty_like(fixed) for fixed in self._fixed)
        self._staged = -1

    def feed(self, step: int) -> None:
        """Make the batch of ``step`` the contents of ``inputs`` and ``targets``, in the order of the current stream."""
        if self._on_device:
            for source, fixed in zip(self._sources, self._fixed, strict=True):
                torch.index_select(source.stored, 0, self._indices[step], out=fixed)
            return
        if self._staged != step:
            self._stage(step)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for ahead, fixed in zip(self._ahead, self._fixed, strict=True):
            fixed.copy_(ahead)
        if step + 1 < len(self._batches):
            self._stage(step + 1)

    def _stage(self, step: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, ahead in zip(self._sources, self._ahead, strict=True):
                for place, row in enumerate(self._batches[step].tolist()):
                    ahead[place].copy_(source.stored[row], non_blocking=True)
        self._staged = step
