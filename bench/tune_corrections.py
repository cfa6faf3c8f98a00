#!/usr/bin/env python3
"""Find the fastest way to add a low-rank correction to many tokens, for every layer, and write it into the package's table.

    python bench/tune_corrections.py --timings bench/results/correction-tiles-h200.json

Layers of Llama 3 8B as vLLM fuses them, ranks of 10% of each part's smaller side. Candidates: every tile whose kernel adds a
correction as it multiplies, V^T x by cuBLAS in front of it; and the fastest product with the correction added apart, by cuBLAS.
Timed as in tune_hopper.py. The table has to know the layers' products already.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from correction_parts import LAYERS, random_factors
from linear import timed
from measured_on import measured_on
from torch import Tensor
from tune_hopper import (
    PASSES,
    SCHEMES,
    TABLE,
    TILES,
    compile_plans,
    fastest,
    name_of,
    place_of,
    random_weights,
    sensible,
    table_text,
)  # fmt: skip

from lrq_vllm.kernels import arranged_linear, low_rank, tile_linear
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, WeightShape
from lrq_vllm.kernels.hopper_table import APART, Tile
from lrq_vllm.kernels.low_rank import Factors
from lrq_vllm.kernels.quantize_tokens import quantize_tokens

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 4096)
ADDING = [tile for tile in TILES if tile.split == 1 and tile.team == 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["w4a8", "w4a16", "w3a16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--table", type=Path, default=TABLE, help="JSON file to add to; default: the package's own")
    parser.add_argument("--timings", type=Path, required=True, help="JSON file for everything that was measured")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    compile_plans([plan_of(SCHEMES[scheme], tile) for scheme in arguments.schemes for tile in ADDING], device)
    layers = json.loads(arguments.table.read_text())["layers"]
    timings: list[dict[str, Any]] = []
    for scheme in arguments.schemes:
        for name, (inputs, widths) in LAYERS.items():
            shape = SCHEMES[scheme]._replace(out_features=sum(widths), in_features=inputs)
            place = torch.cuda.get_device_name(), scheme, sum(widths), inputs
            entry = next(layer for layer in layers if place_of(layer) == place)
            found = []
            weights = random_weights(shape, device)
            factors = [random_factors(inputs, widths) for _ in weights]
            for tokens in arguments.tokens:
                times = measured(weights, factors, tokens)
                found.append((tokens, times))
                us = {named(tile): round(time, 2) for tile, time in times.items()}
                timings.append({"scheme": scheme, "layer": name, "tokens": tokens, "us": us})
            entry["corrected"] = [(most, named(tile) if tile is APART else list(tile)) for most, tile in fastest(found)]
            print(scheme, name, *(f"{most}:{tile}" for most, tile in entry["corrected"]), flush=True)
            result = {**measured_on("lrq", "torch"), "unit": "microseconds, median; corrections of 10%", "rows": timings}
            arguments.timings.write_text(json.dumps(result) + "\n")
    arguments.table.write_text(table_text(layers))


def named(tile: Tile | None) -> str:
    return "apart" if tile is APART else name_of(tile)


def plan_of(shape: WeightShape, tile: Tile) -> tile_linear.Plan:
    return tile_linear.plan(shape.bits, *tile, integer=shape.integer, grouped=shape.grouped, corrected=True)


def measured(weights: list[ArrangedWeight], factors: list[Factors], tokens: int) -> dict[Tile | None, float]:
    """Microseconds of every way that makes sense for so many tokens."""
    shape, some = weights[0].shape, list(zip(weights, factors, strict=True))
    x = torch.randn(tokens, shape.in_features, device="cuda", dtype=torch.bfloat16)

    def layer(weight: ArrangedWeight, own: Factors, tile: Tile | None) -> Any:
        if tile is APART:
            return lambda x: low_rank.add_low_rank_(arranged_linear.arranged_linear(x, weight, None), x, own, hopper=False)
        plan = plan_of(shape, tile)

        def run(x: Tensor) -> Tensor:
            shrunk = low_rank.shrink(x, own)
            return tile_linear.tile_linear(quantize_tokens(x) if shape.integer else x, weight, None, plan, (shrunk, own))

        return run

    parts = factors[0].parts
    tiles = [tile for tile in ADDING if sensible(tile, tokens, shape) and tile_linear.adds(parts, tile.share)]
    times: dict[Tile | None, list[float]] = {tile: [] for tile in (APART, *tiles)}
    for _ in range(PASSES):
        for tile, found in times.items():
            found.append(median(timed([layer(*one, tile) for one in (some if tokens <= 256 else some[:4])], x)))
    return {tile: median(found) for tile, found in times.items()}


if __name__ == "__main__":
    main()
