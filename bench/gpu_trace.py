"""What a GPU did for a while: for how much of the time it had something to do, and the kernels that took the longest."""

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["begin_trace", "end_trace"]

KERNELS = 16  # named one by one
CHARACTERS = 90  # of a kernel's name; those that begin with the same count as one


def begin_trace(worker: Any) -> None:
    """``worker``: keeps the trace until its end."""
    torch.cuda.synchronize()
    worker.gpu_trace = profile(activities=[ProfilerActivity.CUDA])
    worker.gpu_trace.start()


def end_trace(worker: Any) -> dict[str, Any]:
    """Milliseconds in which the GPU was busy; milliseconds and runs of each kernel. Overlapping kernels count twice there."""
    torch.cuda.synchronize()
    worker.gpu_trace.stop()
    spans = [
        (event.start_ns(), event.end_ns(), event.name())
        for event in worker.gpu_trace.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for first, last, name in spans:
        kernel = kernels[name[:CHARACTERS]]
        kernel[0] += (last - first) / 1e6
        kernel[1] += 1
    longest = sorted(kernels, key=lambda name: -kernels[name][0])[:KERNELS]
    return {
        "busy_ms": round(union_ns(spans) / 1e6, 3),
        "kernels_ms_and_runs": {name: [round(kernels[name][0], 3), kernels[name][1]] for name in longest},
    }


def union_ns(spans: list[tuple[int, int, str]]) -> int:
    """Kernels that begin before another has ended count once."""
    busy = end = 0
    for first, last, _ in sorted(spans):
        busy += max(last - max(first, end), 0)
        end = max(end, last)
    return busy
