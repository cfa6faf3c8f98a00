"""Start the other processes of a run on several GPUs, and end with them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
import torch.distributed as dist

from lrq_offline.ranks import Ranks
from lrq_offline.weight_transfers import transfers_between
from lrq_vllm.errors import LrqError

__all__ = ["started_ranks"]


@contextmanager
def started_ranks(count: int, device: torch.device, work: Callable[[Ranks], None]) -> Iterator[Ranks]:
    """This process as rank 0 of ``count``; meanwhile the others do ``work``, which must be picklable. One rank starts nothing.

    If one of the others fails, this process ends too, and it is said why: its next sum would never return. The exit code is 2
    where the reason is an LrqError, else 1.
    """
    if count == 1:
        yield Ranks()
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "ranks").as_uri()
        reasons = context.SimpleQueue()
        others = [
            context.Process(target=_other, args=(Ranks(n, count), device, meeting, work, reasons)) for n in range(1, count)
        ]
        ending = threading.Event()
        for process in others:
            process.daemon = True
            process.start()
        threading.Thread(target=_watch, args=(others, reasons, ending), daemon=True).start()
        try:
            _join(Ranks(0, count), device, meeting)
            yield Ranks(0, count)
            ending.set()
            # Each waits for the others in this call.
            dist.destroy_process_group()
            for process in others:
                process.join()
        except Exception as error:
            ending.set()
            # A sum also fails when its other half is gone; that half has said why.
            if isinstance(error, LrqError) or reasons.empty():
                raise
            raise LrqError(reasons.get()) from error
        finally:
            ending.set()
            for process in others:
                process.terminate()
            if dist.is_initialized():
                dist.destroy_process_group()
            transfers_between.cache_clear()


def _join(ranks: Ranks, device: torch.device, meeting: str) -> None:
    place = None
    if device.type == "cuda":
        torch.cuda.set_device(ranks.rank)
        place = torch.device("cuda", ranks.rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=ranks.rank, world_size=ranks.size, device_id=place)


def _other(
    ranks: Ranks, device: torch.device, meeting: str, work: Callable[[Ranks], None], reasons: "SimpleQueue[str]"
) -> None:
    # Ctrl-C reaches every process; rank 0 says what it means and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _join(ranks, device, meeting)
    try:
        work(ranks)
    except LrqError as error:
        reasons.put(str(error))
        sys.exit(1)
    dist.destroy_process_group()


def _watch(others: list[BaseProcess], reasons: "SimpleQueue[str]", ending: threading.Event) -> None:
    running = list(others)
    while running:
        done = multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if process.sentinel in done]:
            running.remove(process)
            process.join()
            if process.exitcode and not ending.is_set():
                fixable = not reasons.empty()
                said = reasons.get() if fixable else "a GPU's process failed, see above; the same command goes on from here."
                print(f"lrq-offline: {said}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(2 if fixable else 1)
