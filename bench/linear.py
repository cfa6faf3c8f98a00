#!/usr/bin/env python3
"""Microseconds of one linear layer with random weights, ours against every stock path, on the same tensors in one run.

    python bench/linear.py --out bench/results/linear-h100.json                          # needs vLLM for CUDA beside lrq
    python bench/linear.py --schemes w4a16 --shapes gate_up --tokens 1 16 --skip Humming

A time is the median of replays of a CUDA graph in which layers of equal shape, more weight memory than the cache holds, run
one after the other. "floor" is what reading the weight once takes at the speed at which such a GPU copies memory, or the
products at the tensor cores' peak.
A candidate that does not run, or whose result is not the product, is listed with the reason.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from linear_peers import Candidate, Layer, all_candidates
from measured_on import measured_on, memory_tb_per_s
from torch import Tensor

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 16, 64, 256, 1024, 8192)
BITS = {"bf16": 16, "w8a8": 8, "w4a8": 4, "w4a16": 4, "w3a16": 3, "w4a16-g128": 4, "w4a8-g128": 4}
OPERATIONS_PER_US = {"w8a8": 1979e6, "w4a8": 1979e6, "w4a8-g128": 1979e6}  # dense int8 on a Hopper GPU; 16-bit products: half
# Relative error of y for round-to-nearest of a normal weight, with room.
ERRORS = {"bf16": 0.01, "w8a8": 0.05, "w4a8": 0.25, "w4a16": 0.25, "w3a16": 0.5, "w4a16-g128": 0.2, "w4a8-g128": 0.2}
CACHE_BYTES = 200e6
REPLAYS = 9


def main() -> None:
    arguments = parsed()
    memory = memory_tb_per_s()
    candidates = [
        candidate
        for candidate in all_candidates()
        if candidate.scheme in ("bf16", *arguments.schemes) and candidate.name not in arguments.skip
    ]
    if arguments.warm_up:
        warm_up(arguments)
    rows: list[dict[str, Any]] = []
    result = {
        **measured_on("lrq", "torch", "vllm", "triton", "humming-kernels"),
        "unit": "microseconds, median",
        "memory_tb_per_s": memory,
        "rows": rows,
    }
    for shape in arguments.shapes:
        outputs, inputs = SHAPES[shape]
        weight = torch.randn(outputs, inputs, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        for candidate in candidates:
            for row in measured(candidate, weight, arguments.tokens, memory * 1e6):
                rows.append({"shape": shape, "candidate": candidate.name, "scheme": candidate.scheme, **row})
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        show(shape, rows, arguments.tokens)
    summarize(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=list(BITS)[1:])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--skip", nargs="*", default=[], metavar="CANDIDATE")
    parser.add_argument(
        "--warm-up", type=int, metavar="SECONDS", help="first compile Humming's kernels, in processes of their own"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def measured(candidate: Candidate, weight: Tensor, tokens: list[int], bytes_per_us: float) -> list[dict[str, Any]]:
    nbytes = weight.numel() * BITS[candidate.scheme] // 8
    try:
        layers = candidate.make(weight, max(2, math.ceil(CACHE_BYTES / nbytes)))
    except Exception as error:
        return [{"tokens": count, "why_not": reason(error)} for count in tokens]
    rows = []
    for count in tokens:
        x = torch.randn(count, weight.shape[1], device="cuda", dtype=torch.bfloat16)
        try:
            y = layers[0](x).float()
        except Exception as error:
            rows.append({"tokens": count, "why_not": reason(error)})
            continue
        wanted = x.float() @ weight.T
        error = ((y - wanted).norm() / wanted.norm()).item()
        if not error < ERRORS[candidate.scheme]:
            rows.append({"tokens": count, "why_not": f"wrong: relative error {error:.3f}"})
            continue
        operations = OPERATIONS_PER_US.get(candidate.scheme, 989e6)
        floor = max(nbytes / bytes_per_us, 2 * count * weight.numel() / operations)
        del y, wanted
        times = timed(layers if count <= 256 else layers[:4], x)
        rows.append({"tokens": count, "us": statistics.median(times), "us_all": times, "floor_us": floor, "error": error})
    return rows


def timed(layers: list[Layer], x: Tensor) -> list[float]:
    for layer in layers:
        layer(x)
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), max(1, 24 // len(layers)) if x.shape[0] <= 256 else 1
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for layer in layers:
                layer(x)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(layers)))
    return sorted(times)


def show(shape: str, rows: list[dict[str, Any]], tokens: list[int]) -> None:
    print(f"{shape} {SHAPES[shape]}".ljust(29) + "".join(f"{count:>9}" for count in tokens), flush=True)
    for name, scheme in dict.fromkeys((row["candidate"], row["scheme"]) for row in rows if row["shape"] == shape):
        mine = [row for row in rows if (row["shape"], row["candidate"], row["scheme"]) == (shape, name, scheme)]
        cells = "".join(f"{row['us']:>9.1f}" if "us" in row else f"{'-':>9}" for row in mine)
        reasons = {row["why_not"] for row in mine if "why_not" in row}
        print(f"  {scheme:<11} {name:<14} {cells}  {' | '.join(reasons)[:90]}", flush=True)


def summarize(rows: list[dict[str, Any]]) -> None:
    """Ours against the fastest stock path of the same scheme, cell by cell, and against the floor where tokens are few."""
    ratios: dict[str, list[float]] = {}
    floors: dict[str, list[str]] = {}
    for row in rows:
        if row["candidate"] == "lrq" and "us" in row:
            place = ("shape", "scheme", "tokens")
            same = [other for other in rows if all(other[key] == row[key] for key in place) and other["candidate"] != "lrq"]
            best = min((other for other in same if "us" in other), key=lambda other: other["us"], default=None)
            if best is not None:
                ratios.setdefault(row["scheme"], []).append(best["us"] / row["us"])
                if best["us"] < 0.98 * row["us"]:
                    where = f"{row['scheme']} {row['shape']} {row['tokens']}"
                    print(f"slower: {where}: {row['us']:.1f}, {best['candidate']} {best['us']:.1f}")
            if row["tokens"] <= 16:
                cell = f"{row['shape']} {row['tokens']}: {row['floor_us'] / row['us']:.0%}"
                floors.setdefault(row["scheme"], []).append(cell)
    for scheme, values in ratios.items():
        mean = math.exp(statistics.fmean(map(math.log, values)))
        print(f"{scheme}: best stock time / ours, geometric mean {mean:.2f}, least {min(values):.2f}, of {len(values)} cells")
        print(f"{scheme}: of the memory's speed: {', '.join(floors.get(scheme, []))}")


def warm_up(arguments: argparse.Namespace) -> None:
    """Humming compiles a kernel in seconds; here all shapes at a time. What is not ready in time is compiled later."""
    wanted = [
        (place, shape)
        for place, candidate in enumerate(all_candidates())
        if candidate.name == "Humming" and candidate.scheme in arguments.schemes
        for shape in arguments.shapes
    ]
    process = multiprocessing.get_context("spawn").Process
    jobs = [process(target=compile_one, args=(*pair, arguments.tokens), daemon=True) for pair in wanted]
    for job in jobs:
        job.start()
    deadline = time.monotonic() + arguments.warm_up
    for job in jobs:
        job.join(max(deadline - time.monotonic(), 0))
    for job in jobs:
        job.terminate()


def compile_one(place: int, shape: str, tokens: list[int]) -> None:
    weight = torch.randn(*SHAPES[shape], device="cuda")
    layer = all_candidates()[place].make(weight, 1)[0]
    for count in tokens:
        layer(torch.randn(count, weight.shape[1], device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


if __name__ == "__main__":
    main()
