#!/usr/bin/env python3
"""Microseconds that a low-rank correction adds to a quantized linear layer, with random weights, in one run on one GPU.

    python bench/correction_speed.py --out bench/results/correction-speed-h200.json

For each shape, number of tokens and rank (a share of the smaller side): the layer without a correction, with it, and with a
rotated input besides. "branch floor" is what reading U and V once takes at the speed of memory, or its products at the tensor
cores' peak, the larger: no kernel adds less while the layer itself is bound by the same.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from linear import CACHE_BYTES, SHAPES, timed
from measured_on import measured_on, memory_tb_per_s
from torch import Tensor

from lrq_vllm.checkpoint.hadamard import paley_order
from lrq_vllm.kernels import low_rank, ops, reference
from lrq_vllm.kernels.arranged_linear import arranged_linear, prepare, prepare_correction
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, arrange
from lrq_vllm.kernels.reference import InputGrid

TOKENS = (1, 16, 256, 4096)
SHARES = (0.05, 0.10, 0.20, 0.30)
OPERATIONS_PER_US = 989e6  # dense bfloat16 on a Hopper GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    memory = memory_tb_per_s()
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            rows += measured(shape, tokens, memory * 1e6)
            show(rows[-len(SHARES) - 1 :])
            result = {
                **measured_on("lrq", "torch", "triton"),
                "unit": "microseconds, median of graph replays; bfloat16; w4a4",
                "memory_tb_per_s": memory,
                "rows": rows,
            }
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(shape: str, tokens: int, bytes_per_us: float) -> list[dict[str, Any]]:
    """The rows of one shape and number of tokens: rank 0 in three schemes, then each share."""
    outputs, inputs = SHAPES[shape]
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    schemes = {"w8a8": (8, static_grid()), "w4a8": (4, reference.PER_TOKEN), "w4a4": (4, clipped_grid())}
    plain = {name: median(layers(outputs, inputs, *scheme), x) for name, scheme in schemes.items()}
    base = {"shape": shape, "tokens": tokens}
    rows = [{**base, "share": 0.0, "rank": 0, "us": plain["w4a4"], "w4a8_us": plain["w4a8"], "w8a8_us": plain["w8a8"]}]
    for share in SHARES:
        rank = math.ceil(share * min(outputs, inputs))
        nbytes, operations = 2 * rank * (outputs + inputs), 2 * tokens * rank * (outputs + inputs)
        corrected = layers(outputs, inputs, *schemes["w4a4"], rank=rank)
        rotated = layers(outputs, inputs, *schemes["w4a4"], rank=rank, rotate=True)
        rows.append(
            {
                **base, "share": share, "rank": rank, "us": median(corrected, x), "rotated_us": median(rotated, x),
                "branch_floor_us": max(nbytes / bytes_per_us, operations / OPERATIONS_PER_US),
            }
        )  # fmt: skip
    return rows


def layers(
    outputs: int, inputs: int, bits: int, grid: InputGrid, *, rank: int = 0, rotate: bool = False
) -> list[Any]:  # fmt: skip
    """Equal layers, more weight memory than the cache holds; checked against the reference."""
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randint(0, 2**bits, (outputs, inputs), device="cuda", generator=generator)
    step = torch.rand(outputs, 1, device="cuda", generator=generator) * 0.01 + 0.001
    zero = torch.randint(0, 2**bits, (outputs, 1), device="cuda", generator=generator)
    shift = 128 if bits == 8 else 0
    total = q.sum(dim=1, dtype=torch.int32) - inputs * zero.flatten().int()
    weight = arrange((q - shift).int(), step, zero.int() - shift, total, bits, integer=True)
    prepare(weight.shape, torch.bfloat16, torch.device("cuda"), grid.kind)
    u = (torch.randn(outputs, rank, device="cuda", generator=generator) / 8).bfloat16()
    v = (torch.randn(inputs, rank, device="cuda", generator=generator) / inputs**0.5).bfloat16()
    order = paley_order(inputs)

    def layer(weight: ArrangedWeight, u: Tensor, v: Tensor) -> Any:
        factors = low_rank.arrange([(u, v)], torch.bfloat16) if rank else None
        if factors is not None:
            prepare_correction(weight.shape, factors)

        def run(x: Tensor) -> Tensor:
            if rotate:
                x = ops.rotate(x, inputs, order, True)
            return arranged_linear(x, weight, None, grid, factors)

        return run

    copies = max(2, math.ceil(CACHE_BYTES / (outputs * inputs * bits / 8)))
    made = [layer(weight.copy(), u.clone(), v.clone()) for _ in range(copies)]
    check(made[0], (q, step, zero), grid, u, v, order if rotate else None)
    return made


def check(
    layer: Any, weight: tuple[Tensor, Tensor, Tensor], grid: InputGrid, u: Tensor, v: Tensor, order: int | None
) -> None:  # fmt: skip
    """Stop if a layer does not compute what it is timed for."""
    from lrq_vllm.checkpoint.hadamard import rotate

    q, step, zero = weight
    x = torch.randn(5, q.shape[1], device="cuda", dtype=torch.bfloat16)
    given = x if order is None else rotate(x, q.shape[1], order).to(x.dtype)
    tokens = reference.quantize_input(given, grid)
    wanted = (tokens.q.double() - tokens.zero_point) * tokens.step @ ((q.double() - zero) * step).T
    wanted = wanted + given.double() @ v.double() @ u.double().T
    error = ((layer(x).double() - wanted).norm() / wanted.norm()).item()
    # A rotation by the kernel may round a value to the neighbouring integer.
    if not error < (5e-3 if order is None else 5e-2):
        sys.exit(f"a layer of {list(q.shape)} is wrong: relative error {error:.4f}")


def static_grid() -> InputGrid:
    step, zero = torch.tensor([8 / 255], device="cuda"), torch.tensor([127], dtype=torch.uint8, device="cuda")
    return reference.static_grid(step, zero)


def clipped_grid() -> InputGrid:
    return reference.clipped_grid(torch.tensor([0.8], device="cuda"))


def median(made: list[Any], x: Tensor) -> float:
    return statistics.median(timed(made if len(x) <= 256 else made[:4], x))


def show(rows: list[dict[str, Any]]) -> None:
    plain = rows[0]
    print(
        f"{plain['shape']} {SHAPES[plain['shape']]} tokens {plain['tokens']}: w8a8 {plain['w8a8_us']:.1f}, "
        f"w4a8 {plain['w4a8_us']:.1f}, w4a4 {plain['us']:.1f} us"
    )
    for row in rows[1:]:
        added = row["us"] - plain["us"]
        print(
            f"  rank {row['rank']:>5} ({row['share']:.0%}): +{added:.1f} us = {added / plain['us']:.0%} (floor "
            f"{row['branch_floor_us']:.1f}); with rotation {row['rotated_us']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
