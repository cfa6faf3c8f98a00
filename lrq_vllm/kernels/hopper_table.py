"""Which of the kernels for Hopper GPUs is the fastest for a layer and a number of tokens: measured, hopper_table.json.

bench/tune_hopper.py writes the table, for the GPU that it runs on. Layers that it does not know take the plans of the most
similar one, and GPUs that it does not know those of any.
"""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lrq_vllm.kernels.arranged_weight import WeightShape

__all__ = ["STREAM", "Tile", "choices", "chosen"]


class Tile(NamedTuple):
    """Arguments of tile_linear.plan."""

    tokens: int
    split: int = 1
    blocks: int = 1
    share: int = 1
    team: int = 2
    even: int = 0


STREAM = None
"""In place of a tile: stream_linear."""


def chosen(tokens: int, weight: WeightShape, gpu: str) -> Tile | None:
    """The tile for so many tokens, or STREAM. gpu: its name."""
    return next(tile for most, tile in choices(weight, gpu) if most is None or tokens <= most)


@cache
def choices(weight: WeightShape, gpu: str) -> list[tuple[int | None, Tile | None]]:
    """Up to how many tokens (None: any number) which kernel is the fastest; the numbers rise."""
    measured = [layer for layer in _table() if layer["scheme"] == weight.scheme]
    on_such = [layer for layer in measured if layer["gpu"] == gpu] or measured
    nearest = min(on_such, key=lambda layer: _distance(weight, layer["out_features"], layer["in_features"]))
    return [(most, STREAM if tile == "stream" else Tile(*tile)) for most, tile in nearest["choices"]]


def _distance(weight: WeightShape, out_features: int, in_features: int) -> float:
    return abs(math.log(weight.out_features / out_features)) + abs(math.log(weight.in_features / in_features))


@cache
def _table() -> list[dict[str, Any]]:
    table: dict[str, Any] = json.loads(files("lrq_vllm.kernels").joinpath("hopper_table.json").read_text())
    return list(table["layers"])
