#!/usr/bin/env python3
"""Microseconds of one mixture-of-experts layer with random weights: our grouped kernels, and vLLM's bfloat16 experts.

    python bench/experts.py --out bench/results/experts-h100.json        # a GPU; bf16 needs vLLM beside lrq
    python bench/experts.py --layers qwen3-30b-a3b --schemes w4a16 --tokens 1 16 --out experts.json
    python bench/experts.py --small --out experts.json                   # any machine: that it runs, not how fast

The layer is all that follows the router: routes, both products with the quantization of their input, SiLU and the weighted sum
of the choices. A time is the median of replays of a CUDA graph of layers with different random routings, so that few experts
are in the cache. For every cell each product is timed alone in several divisions of work, and the layer with the best of them
("best") and with what the kernels choose by themselves ("chosen"). A result that is not its twin's is listed as wrong.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from linear import reason, timed
from measured_on import measured_on
from torch import Tensor

from lrq_vllm.checkpoint.packing import packed_width
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.activation_quant import quantize_per_token, quantize_static
from lrq_vllm.kernels.expert_routes import Routes, expert_routes
from lrq_vllm.kernels.grouped_gemm import Launch, grouped_integer_linear, grouped_weight_only_linear
from lrq_vllm.kernels.reference import IntegerWeight
from lrq_vllm.kernels.reference_experts import experts_integer_linear, experts_weight_only_linear

Product = Callable[[Tensor], Tensor]
Weight = IntegerWeight | tuple[Tensor, Tensor, Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter multiplies the bit patterns of bfloat16 numbers.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
BLOCKS = (16, 32, 64)
LAUNCHES = (Launch(32, 128, 4, 4), Launch(64, 128, 4, 4), Launch(128, 64, 4, 4), Launch(128, 64, 8, 4), Launch(128, 128, 8, 3))
ROUTINGS = 8
WRONG = 0.05  # relative error against the twin: a rounding of SiLU to 16 bits moves some activations by a whole step


class Layer(NamedTuple):
    """Sizes of a mixture of experts."""

    experts: int
    choices: int
    hidden: int
    intermediate: int


class Scheme(NamedTuple):
    """What a product computes."""

    bits: int
    integer: bool
    static: bool = False


class Routing(NamedTuple):
    """What a router says of M tokens."""

    ids: Tensor  # int32 [M, choices]
    weights: Tensor  # float32 [M, choices]


Cell = Callable[[Tensor, list[Routing]], dict[str, Any]]
"""From x [M, hidden] and as many routings as are timed to what stands in a row."""

LAYERS = {"mixtral-8x7b": Layer(8, 2, 4096, 14336), "qwen3-30b-a3b": Layer(128, 8, 2048, 768)}
SMALL = Layer(4, 2, 64, 32)
SCHEMES = {
    "w4a16": Scheme(4, integer=False),
    "w3a16": Scheme(3, integer=False),
    "w4a8": Scheme(4, integer=True),
    "w8a8": Scheme(8, integer=True, static=True),
}


def main() -> None:
    arguments = parsed()
    layers = {"small": SMALL} if arguments.small else {name: LAYERS[name] for name in arguments.layers}
    tokens = [1, 5] if arguments.small else arguments.tokens
    rows: list[dict[str, Any]] = []
    result = {
        **measured_on("lrq", "torch", "vllm", "triton"),
        "unit": "microseconds, median" if DEVICE.type == "cuda" else "Triton's interpreter: no timings",
        "layers": {name: layer._asdict() for name, layer in layers.items()},
        "rows": rows,
    }
    for name, layer in layers.items():
        routings = {count: [random_routing(layer, count) for _ in range(ROUTINGS)] for count in tokens}
        for scheme in ("routes", "bf16", *arguments.schemes):
            for row in measured(CANDIDATES[scheme], layer, routings):
                rows.append({"layer": name, "scheme": scheme, **row})
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            torch.cuda.empty_cache()
        show(name, layer, rows, tokens)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--small", action="store_true", help="one tiny layer, instead of --layers and --tokens")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not arguments.small and DEVICE.type != "cuda":
        parser.error("There is no NVIDIA GPU here: times need one. --small runs everything once on a tiny layer without it.")
    return arguments


def random_routing(layer: Layer, tokens: int) -> Routing:
    """Every token chooses different experts, all of them equally often."""
    scores = torch.rand(tokens, layer.experts, device=DEVICE)
    weights, ids = scores.topk(layer.choices)
    return Routing(ids.to(torch.int32), weights / weights.sum(dim=1, keepdim=True))


def measured(make: Callable[[Layer], Cell], layer: Layer, routings: dict[int, list[Routing]]) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    try:
        cell = make(layer)
    except Exception as error:
        return [{"tokens": count, "why_not": reason(error)} for count in routings]
    rows = []
    for count, some in routings.items():
        x = torch.randn(count, layer.hidden, device=DEVICE, dtype=DTYPE)
        try:
            rows.append({"tokens": count, **cell(x, some)})
        except Exception as error:
            rows.append({"tokens": count, "why_not": reason(error)})
    return rows


def median_us(calls: list[Product], x: Tensor) -> float:
    """Of one call; without a GPU of one round of calls."""
    if DEVICE.type == "cuda":
        return statistics.median(timed(calls, x))
    begin = time.perf_counter()
    for call in calls[:1]:
        call(x)
    return (time.perf_counter() - begin) * 1e6


def routes_of(routing: Routing, layer: Layer, block: int) -> Routes:
    return expert_routes(routing.ids.flatten(), layer.experts, block)


def routes_cell(layer: Layer) -> Cell:
    """The routes alone: they are part of every other time of ours."""

    def cell(x: Tensor, routings: list[Routing]) -> dict[str, Any]:
        calls: list[Product] = [lambda x, one=one: routes_of(one, layer, BLOCKS[0]).slots for one in routings]
        return {"best_us": median_us(calls, x)}

    return cell


def bf16_cell(layer: Layer) -> Cell:
    """vLLM's own Triton kernels."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    if DEVICE.type != "cuda":
        raise RuntimeError("needs a GPU")
    first = torch.randn(layer.experts, 2 * layer.intermediate, layer.hidden, device=DEVICE, dtype=DTYPE) / layer.hidden**0.5
    second = torch.randn(layer.experts, layer.hidden, layer.intermediate, device=DEVICE, dtype=DTYPE) / layer.hidden**0.5

    def cell(x: Tensor, routings: list[Routing]) -> dict[str, Any]:
        calls: list[Product] = [lambda x, one=one: fused_experts(x, first, second, one.weights, one.ids) for one in routings]
        return {"best_us": median_us(calls, x)}

    return cell


def quantized_cell(scheme: Scheme, layer: Layer) -> Cell:
    """Our kernels, compared with their twins first."""
    first = random_weight(scheme, layer.experts, 2 * layer.intermediate, layer.hidden)
    second = random_weight(scheme, layer.experts, layer.hidden, layer.intermediate)
    silu_and_mul = silu_and_mul_of_vllm() or silu_and_mul_of_torch

    def mixture(x: Tensor, routing: Routing, block: int, launches: tuple[Launch | None, Launch | None]) -> Tensor:
        routes = routes_of(routing, layer, block)
        middle = silu_and_mul(product(scheme, x, layer.choices, first, routes, launches[0]))
        return weighted_sum(product(scheme, middle, 1, second, routes, launches[1]), routing)

    def cell(x: Tensor, routings: list[Routing]) -> dict[str, Any]:
        expert_of = routings[0].ids.flatten()
        middle = silu_and_mul_of_torch(twin(scheme, x, layer.choices, first, expert_of))
        wanted = weighted_sum(twin(scheme, middle, 1, second, expert_of), routings[0]).float()
        chosen, best = [], []
        for block in blocks_for(len(expert_of), layer.experts):
            got = mixture(x, routings[0], block, (None, None)).float()
            error = ((got - wanted).norm() / wanted.norm()).item()
            if not error < WRONG:
                raise RuntimeError(f"wrong: relative error {error:.3f} with blocks of {block}")
            routes = [routes_of(one, layer, block) for one in routings]
            times = [
                launch_times(scheme, x, layer.choices, first, routes),
                launch_times(scheme, middle, 1, second, routes),
            ]
            fastest = tuple(min(one, key=lambda launch: one[launch]) for one in times)
            for launches, found in (((None, None), chosen), (fastest, best)):
                calls: list[Product] = [lambda x, one=one: mixture(x, one, block, launches) for one in routings]  # noqa: B023
                found.append({
                    "us": median_us(calls, x), "block": block, "error": error, "launches": launches,
                    "products_us": [one[launch] for one, launch in zip(times, launches, strict=True)],
                })  # fmt: skip
        rows = {"chosen": min(chosen, key=lambda row: row["us"]), "best": min(best, key=lambda row: row["us"])}
        return {f"{name}_{key}": value for name, row in rows.items() for key, value in row.items()}

    return cell


def launch_times(scheme: Scheme, x: Tensor, per_row: int, weight: Weight, routes: list[Routes]) -> dict[Launch | None, float]:
    """Of one product, quantization of its input included. None: the kernel's own choice. Those that do not fit are left out."""
    found: dict[Launch | None, float] = {}
    for launch in (None, *LAUNCHES):
        calls: list[Product] = [lambda x, one=one, by=launch: product(scheme, x, per_row, weight, one, by) for one in routes]
        try:
            found[launch] = median_us(calls, x)
        except Exception as error:
            if launch is None:
                raise
            print(f"  {launch} does not run: {reason(error)}", flush=True)
    return found


def blocks_for(slots: int, experts: int) -> list[int]:
    """Those that leave fewer than three quarters of an average expert's places empty, and the smallest."""
    return [block for block in BLOCKS if block == BLOCKS[0] or block < 4 * slots / experts]


def random_weight(scheme: Scheme, experts: int, outputs: int, inputs: int) -> Weight:
    """The checkpoint's tensors with uniform integers, or with their sums."""
    bits = scheme.bits
    kind, shape = (torch.int8 if bits == 8 else torch.int32), (experts, outputs, packed_width(inputs, bits))
    info = torch.iinfo(kind)
    q = torch.randint(info.min, info.max + 1, shape, dtype=kind, device=DEVICE)
    step = torch.rand(experts, outputs, 1, device=DEVICE) * 4 / (2**bits * inputs**0.5)
    zero_point = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, (experts, outputs, 1), device=DEVICE).to(torch.uint8)
    if not scheme.integer:
        return q, step, zero_point
    each = [reference.integer_weight(*one, bits, inputs) for one in zip(q, step, zero_point, strict=True)]
    stacks = (torch.stack([getattr(one, name) for one in each]) for name in ("step", "zero_point", "total"))
    return IntegerWeight(q, *stacks, bits)


@functools.cache
def static_grid() -> tuple[Tensor, Tensor]:
    """Of values between -4 and 4."""
    return torch.tensor([8 / 255], device=DEVICE), torch.tensor([128], dtype=torch.uint8, device=DEVICE)


def product(scheme: Scheme, x: Tensor, per_row: int, weight: Weight, routes: Routes, launch: Launch | None) -> Tensor:
    if isinstance(weight, IntegerWeight):
        tokens = quantize_static(x, *static_grid()) if scheme.static else quantize_per_token(x)
        return grouped_integer_linear(tokens, per_row, weight, routes, x.dtype, launch=launch)
    return grouped_weight_only_linear(x, per_row, *weight, scheme.bits, routes, launch=launch)


def twin(scheme: Scheme, x: Tensor, per_row: int, weight: Weight, expert_of: Tensor) -> Tensor:
    if isinstance(weight, IntegerWeight):
        tokens = reference.quantize_static(x, *static_grid()) if scheme.static else reference.quantize_per_token(x)
        return experts_integer_linear(tokens, per_row, expert_of, weight, x.dtype)
    return experts_weight_only_linear(x, per_row, expert_of, *weight, scheme.bits)


def weighted_sum(y: Tensor, routing: Routing) -> Tensor:
    """[M, N] from y [M * choices, N]."""
    return torch.bmm(routing.weights.to(y.dtype).unsqueeze(1), y.unflatten(0, routing.ids.shape)).squeeze(1)


def silu_and_mul_of_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def silu_and_mul_of_vllm() -> Product | None:
    """One kernel, where vLLM has it for this device."""
    if DEVICE.type != "cuda":
        return None
    try:
        import vllm._custom_ops  # noqa: F401 (loads the extension)
    except ImportError:
        return None

    def silu_and_mul(x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], x.shape[1] // 2), dtype=x.dtype, device=x.device)
        torch.ops._C.silu_and_mul(out, x)
        return out

    return silu_and_mul


CANDIDATES: dict[str, Callable[[Layer], Cell]] = {
    "routes": routes_cell,
    "bf16": bf16_cell,
    **{name: functools.partial(quantized_cell, scheme) for name, scheme in SCHEMES.items()},
}


def show(name: str, layer: Layer, rows: list[dict[str, Any]], tokens: list[int]) -> None:
    """A line of times for each scheme, and how the best of them divide the work."""
    print(f"{name} {tuple(layer)}".ljust(44) + "".join(f"{count:>10}" for count in tokens), flush=True)
    for scheme in CANDIDATES:
        mine = [row for row in rows if (row["layer"], row["scheme"]) == (name, scheme)]
        for kind in ("best", "chosen"):
            if any(f"{kind}_us" in row for row in mine) or (kind == "best" and mine):
                cells = "".join(f"{row[f'{kind}_us']:>10.1f}" if f"{kind}_us" in row else f"{'-':>10}" for row in mine)
                reasons = " | ".join(sorted({row["why_not"] for row in mine if "why_not" in row}))
                print(f"  {scheme:<8} {kind:<33}{cells}  {reasons}", flush=True)
        for row in mine:
            if "best_launches" in row:
                first, second = (tuple(launch) if launch else "chosen" for launch in row["best_launches"])
                print(f"    {row['tokens']} tokens: blocks of {row['best_block']}, {first} and {second}", flush=True)


if __name__ == "__main__":
    main()
