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
from pathlib import Path

import torch
import torch.distributed as dist

from lrq_offline.ranks import Ranks

__all__ = ["started_ranks"]


@contextmanager
def started_ranks(count: int, device: torch.device, work: Callable[[Ranks], None]) -> Iterator[Ranks]:
    """This process as rank 0 of ``count``; meanwhile the others do ``work``, which must be picklable. One rank starts nothing.

    If one of the others fails, it prints why, and this process ends too (exit code 1): its next sum would never return.
    """
    if count == 1:
        yield Ranks()
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "ranks").as_uri()
        others = [context.Process(target=_other, args=(Ranks(n, count), device, meeting, work)) for n in range(1, count)]
        ending = threading.Event()
        for process in others:
            process.daemon = True
            process.start()
        threading.Thread(target=_watch, args=(others, ending), daemon=True).start()
        try:
            _join(Ranks(0, count), device, meeting)
            yield Ranks(0, count)
            ending.set()
            # Each waits for the others in this call.
            dist.destroy_process_group()
            for process in others:
                process.join()
        finally:
            ending.set()
            for process in others:
                process.terminate()
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(ranks: Ranks, device: torch.device, meeting: str) -> None:
    place = None
    if device.type == "cuda":
        torch.cuda.set_device(ranks.rank)
        place = torch.device("cuda", ranks.rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=ranks.rank, world_size=ranks.size, device_id=place)


def _other(ranks: Ranks, device: torch.device, meeting: str, work: Callable[[Ranks], None]) -> None:
    # Ctrl-C reaches every process; rank 0 says what it means and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _join(ranks, device, meeting)
    work(ranks)
    dist.destroy_process_group()


def _watch(others: list[BaseProcess], ending: threading.Event) -> None:
    running = list(others)
    while running:
        done = multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if process.sentinel in done]:
            running.remove(process)
            process.join()
            if process.exitcode and not ending.is_set():
                print("lrq-offline: a GPU's process failed, see above; the same command goes on from here.", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)
