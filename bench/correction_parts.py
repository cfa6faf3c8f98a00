#!/usr/bin/env python3
"""Microseconds of a low-rank correction and of a rotation alone, ours against cuBLAS and Triton, in one run on one GPU.

    python bench/correction_parts.py --out bench/results/correction-parts-h200.json

Corrections: layers of Llama 3 8B as vLLM fuses them, ranks of 10% of each part's smaller side; factors stream from memory, as
there are more of them than the cache holds. "floor": U and V read once at the memory's speed. Rotation: of what goes into down;
"floor": x read and written once.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from linear import CACHE_BYTES, timed
from measured_on import measured_on, memory_tb_per_s
from torch import Tensor

from lrq_vllm.checkpoint.hadamard import paley_order
from lrq_vllm.kernels import hadamard, low_rank
from lrq_vllm.kernels.low_rank import Factors
from lrq_vllm.kernels.rotate_tokens import rotate_tokens

LAYERS = {"qkv": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "gate_up": (4096, [14336, 14336]), "down": (14336, [4096])}
SHARE = 0.1
ROTATED = 14336
TOKENS = (1, 8, 16, 32, 64, 256, 4096)
MOST_TOKENS = 32  # of our kernels for a correction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    bytes_per_us = memory_tb_per_s() * 1e6
    rows: list[dict[str, Any]] = []
    for row in (*corrections(), *rotations()):
        row["floor_us"] = row.pop("bytes") / bytes_per_us
        rows.append(row)
        print(" ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True)
        result = {
            **measured_on("lrq", "torch", "triton"),
            "unit": "microseconds, median of graph replays; bfloat16",
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def corrections() -> Iterator[dict[str, Any]]:
    """A row for each layer and number of tokens."""
    for layer, (inputs, widths) in LAYERS.items():
        nbytes = 2 * sum(rank_of(inputs, width) * (inputs + width) for width in widths)
        made = [random_factors(inputs, widths) for _ in range(max(2, math.ceil(CACHE_BYTES / nbytes)))]
        for tokens in TOKENS:
            x, y = (torch.randn(tokens, size, device="cuda").bfloat16() for size in (inputs, sum(widths)))
            row = {"what": "correction", "layer": layer, "tokens": tokens, "bytes": nbytes}
            row["cublas_us"] = median([adding(low_rank.add_to_many_, y, factors) for factors in made], x)
            if tokens <= MOST_TOKENS:
                row["ours_us"] = median([adding(low_rank.add_to_few_, y, factors) for factors in made], x)
            yield row


def rank_of(inputs: int, width: int) -> int:
    return math.ceil(SHARE * min(width, inputs))


def random_factors(inputs: int, widths: list[int]) -> Factors:
    sizes = [(width, rank_of(inputs, width)) for width in widths]
    pairs = [
        (torch.randn(width, rank, device="cuda"), torch.randn(inputs, rank, device="cuda") * inputs**-0.5)
        for width, rank in sizes
    ]
    return low_rank.arrange(pairs, torch.bfloat16)


def adding(add: Callable[[Tensor, Tensor, Factors], None], y: Tensor, factors: Factors) -> Callable[[Tensor], Tensor]:
    def layer(x: Tensor) -> Tensor:
        add(y, x, factors)
        return y

    return layer


def rotations() -> Iterator[dict[str, Any]]:
    """A row for each number of tokens."""
    order = paley_order(ROTATED)
    for tokens in TOKENS:
        x = torch.randn(tokens, ROTATED, device="cuda").bfloat16()
        row: dict[str, Any] = {"what": "rotation", "inputs": ROTATED, "tokens": tokens, "bytes": 4 * tokens * ROTATED}
        for name, rotate in (("triton_us", hadamard.rotate), ("ours_us", rotate_tokens)):
            row[name] = median([partial(rotate, block=ROTATED, order=order)] * 4, x)
        yield row


def median(layers: list[Any], x: Tensor) -> float:
    return statistics.median(timed(layers, x))


if __name__ == "__main__":
    main()
