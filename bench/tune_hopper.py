#!/usr/bin/env python3
"""Find the fastest kernel for Hopper GPUs for every layer and number of tokens, and write the package's table of them.

    python bench/tune_hopper.py --timings bench/results/hopper-tuning-h100.json
    python bench/tune_hopper.py --layers 8192x28672 57344x8192 --table table.json --timings timings.json

Every candidate is timed as bench/linear.py times layers, quantization of activations included, in PASSES over all of them: a
GPU that grows hot slows down. One that is less than 1.5 % faster than its neighbour's does not count: each kernel of a table is
compiled when a model is loaded.
"""

import argparse
import datetime
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from linear import CACHE_BYTES, SHAPES, timed

from lrq_vllm.kernels import cuda_kernel, stream_linear, tile_linear
from lrq_vllm.kernels.arranged_weight import CHUNK, STRIPE, ArrangedWeight, WeightShape, no_flags
from lrq_vllm.kernels.hopper_table import STREAM, Tile
from lrq_vllm.kernels.quantize_tokens import quantize_tokens

TABLE = Path(__file__).parents[1] / "lrq_vllm" / "kernels" / "hopper_table.json"
FORMS = [
    *(WeightShape(bits, integer, 0, 0) for bits, integer in ((8, True), (4, True), (4, False), (3, False))),
    *(WeightShape(bits, integer, 0, 0, grouped=True) for bits, integer in ((4, False), (3, False), (4, True))),
]
SCHEMES = {form.scheme: form for form in FORMS}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
TILES = [
    *(Tile(tokens, split, blocks) for tokens in (16, 32, 64) for blocks in (1, 2) for split in (1, 2, 4, 8)),
    *(Tile(tokens, split) for tokens in (96, 128, 192, 256) for split in (1, 2)),
    *(Tile(tokens, blocks=blocks, even=most) for tokens in (16, 32, 64) for blocks in (1, 2) for most in (2, 4, 8)),
    *(Tile(tokens, share=share, even=2) for tokens in (128, 192, 256) for share in (1, 2)),
    *(Tile(tokens, share=2) for tokens in (128, 192, 256)),
    *(Tile(tokens, share=share, team=1) for tokens in (128, 160) for share in (1, 2)),
]
PROCESSORS = 132  # of an H100 and of an H200
PASSES = 3
WORTH = 1.015
# Of a group (arranged_weight.py): zero-point 8, and 1.0 for its step.
GROUP_WORD = torch.tensor([8, 0, 0x80, 0x3F], dtype=torch.uint8)


def main() -> None:
    arguments = parsed()
    device = torch.device("cuda")
    compile_all(arguments.schemes, device)
    layers: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    gpu = torch.cuda.get_device_name()
    about = {"device": gpu, "date": datetime.date.today().isoformat()}
    for scheme in arguments.schemes:
        for outputs, inputs in arguments.layers:
            weights = random_weights(SCHEMES[scheme]._replace(out_features=outputs, in_features=inputs), device)
            found = []
            for tokens in arguments.tokens:
                times = measured(weights, tokens)
                found.append((tokens, times))
                cells = {name_of(tile): round(time, 2) for tile, time in times.items()}
                timings.append(
                    {"scheme": scheme, "out_features": outputs, "in_features": inputs, "tokens": tokens, "us": cells}
                )
            choices = [(most, name_of(tile) if tile is STREAM else list(tile)) for most, tile in fastest(found)]
            layer = {"gpu": gpu, "scheme": scheme, "out_features": outputs, "in_features": inputs, "choices": choices}
            layers.append(layer)
            print(scheme, f"{outputs}x{inputs}", *(f"{most}:{tile}" for most, tile in choices), flush=True)
            arguments.timings.write_text(json.dumps({**about, "unit": "microseconds, median", "rows": timings}) + "\n")
    known = json.loads(arguments.table.read_text())["layers"] if arguments.table.exists() else []
    tuned = [place_of(layer) for layer in layers]
    arguments.table.write_text(table_text([layer for layer in known if place_of(layer) not in tuned] + layers))


def parsed() -> argparse.Namespace:
    def layer(text: str) -> tuple[int, int]:
        outputs, inputs = text.split("x")
        return int(outputs), int(inputs)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument(
        "--layers", nargs="+", type=layer, default=list(SHAPES.values()), metavar="OUTxIN", help="default: Llama-3-8B's"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--table", type=Path, default=TABLE, help="JSON file to write; other layers in it stay; default: the package's own"
    )
    parser.add_argument("--timings", type=Path, required=True, help="JSON file for everything that was measured")
    return parser.parse_args()


def compile_all(schemes: list[str], device: torch.device) -> None:
    compile_plans(
        [plan_of(SCHEMES[scheme], tile) for scheme in schemes for tile in TILES if exists(tile, SCHEMES[scheme])], device
    )


def compile_plans(plans: list[tile_linear.Plan], device: torch.device) -> None:
    torch.zeros(1, device=device)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda plan: cuda_kernel.compiled(plan.source(), device), plans))


def exists(tile: Tile, shape: WeightShape) -> bool:
    return (tile.team == 2 or shape.bits == 8) and (tile.tokens <= 128 or not (shape.integer and shape.grouped))


def plan_of(shape: WeightShape, tile: Tile) -> tile_linear.Plan:
    """The kernel with such a tile for 16-bit activations in bfloat16, or for integers."""
    return tile_linear.plan(shape.bits, *tile, integer=shape.integer, grouped=shape.grouped)


def random_weights(shape: WeightShape, device: torch.device) -> list[ArrangedWeight]:
    """As many as the cache cannot hold. Totals of groups, which are floats, have the bits of such as are next to 0."""
    stripes, chunks, width = shape.out_features // STRIPE, shape.in_features // CHUNK, shape.chunk_bytes
    weights = []
    for _ in range(max(2, math.ceil(CACHE_BYTES / (stripes * chunks * width)))):
        facts = torch.randint(0, 9, (stripes, 3, STRIPE), dtype=torch.int32, device=device)
        facts[:, 0] = torch.rand(stripes, STRIPE, device=device).view(torch.int32)
        q = torch.randint(0, 256, (stripes, chunks, width), dtype=torch.uint8, device=device)
        if shape.grouped:
            q[..., -4 * STRIPE :] = GROUP_WORD.to(device).repeat(STRIPE)
        weights.append(ArrangedWeight(q, facts, no_flags(device), shape))
    return weights


def measured(weights: list[ArrangedWeight], tokens: int) -> dict[Tile | None, float]:
    """Microseconds of every kernel that makes sense for so many tokens."""
    shape = weights[0].shape
    x = torch.randn(tokens, shape.in_features, device=weights[0].q.device, dtype=torch.bfloat16)

    def layer(weight: ArrangedWeight, tile: Tile | None) -> Any:
        if tile is STREAM:
            return lambda x: stream_linear.stream_linear(x, weight, None)
        plan = plan_of(shape, tile)
        if shape.integer:
            return lambda x: tile_linear.tile_linear(quantize_tokens(x), weight, None, plan)
        return lambda x: tile_linear.tile_linear(x, weight, None, plan)

    some = weights if tokens <= 256 else weights[:4]
    times: dict[Tile | None, list[float]] = {tile: [] for tile in (STREAM, *TILES) if sensible(tile, tokens, shape)}
    for _ in range(PASSES):
        for tile, found in times.items():
            found.append(median(timed([layer(weight, tile) for weight in some], x)))
    return {tile: median(found) for tile, found in times.items()}


def sensible(tile: Tile | None, tokens: int, shape: WeightShape) -> bool:
    if tile is STREAM:
        return tokens <= stream_linear.MOST_TOKENS
    rows = -(-tokens // tile.tokens)
    tiles = rows * -(-shape.out_features // 128)
    fits = rows <= max(2, tokens / 128) and tile.tokens < 2 * max(tokens, 16)
    few = tile.split == 1 or tiles * tile.split <= 4 * PROCESSORS
    another = tile.even <= 2 or tiles * tile.even // 2 < PROCESSORS * tile.blocks  # than with a smaller number
    return fits and few and another and exists(tile, shape)


def fastest(found: list[tuple[int, dict[Tile | None, float]]]) -> list[tuple[int | None, Tile | None]]:
    """From the most tokens down: the neighbour's kernel, if it is as good."""
    choices: list[tuple[int | None, Tile | None]] = []
    for tokens, times in reversed(found):
        best = min(times, key=times.__getitem__)
        if choices and times.get(choices[-1][1], math.inf) <= WORTH * times[best]:
            continue
        choices.append((tokens if choices else None, best))
    return choices[::-1]


def place_of(layer: dict[str, Any]) -> tuple[Any, ...]:
    return layer["gpu"], layer["scheme"], layer["out_features"], layer["in_features"]


def name_of(tile: Tile | None) -> str:
    return "stream" if tile is STREAM else "/".join(map(str, tile))


def table_text(layers: list[dict[str, Any]]) -> str:
    """JSON with a line for each layer."""
    lines = ",\n".join(f"  {json.dumps(layer)}" for layer in layers)
    return '{"layers": [\n' + lines + "\n]}\n"


if __name__ == "__main__":
    main()
