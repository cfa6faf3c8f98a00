"""Which of the kernels for Hopper GPUs is the fastest for a layer and a number of tokens: measured, hopper_table.json.

bench/tune_hopper.py writes the table, for the GPU that it runs on, and bench/tune_corrections.py adds to it. Layers that it
does not know take the plans of the most similar one, and GPUs that it does not know those of any.
"""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lrq_vllm.kernels.arranged_weight import WeightShape

__all__ = ["APART", "STREAM", "Tile", "choices", "chosen", "correcting", "correcting_choices"]


class Tile(NamedTuple):
    """Arguments of tile_linear.plan."""

    tokens: int
    split: int = 1
    blocks: int = 1
    share: int = 1
    team: int = 2
    even: int = 0

    def divided_alike(self) -> "Tile":
        """The same, or if it deals out work evenly, so that how a sum is divided depends on the number of outputs, the nearest
        tile with a fixed division.
        """
        return self._replace(split=self.even, share=1, even=0) if self.even else self


STREAM = None
"""In place of a tile: stream_linear."""

APART = None
"""In place of a tile whose kernel adds a low-rank correction: another kernel adds it."""


def chosen(tokens: int, weight: WeightShape, gpu: str) -> Tile | None:
    """The tile for so many tokens, or STREAM. gpu: its name."""
    return next(tile for most, tile in choices(weight, gpu) if most is None or tokens <= most)


@cache
def choices(weight: WeightShape, gpu: str) -> list[tuple[int | None, Tile | None]]:
    """Up to how many tokens (None: any number) which kernel is the fastest; the numbers rise."""
    nearest = _nearest([layer for layer in _table() if layer["scheme"] == weight.scheme], weight, gpu)
    tiles = [(most, STREAM if tile == "stream" else Tile(*tile)) for most, tile in nearest["choices"]]
    if not weight.whole_outputs:
        return tiles
    return [(most, tile if tile is STREAM else tile.divided_alike()) for most, tile in tiles]


def correcting(tokens: int, weight: WeightShape, gpu: str) -> Tile | None:
    """The tile whose kernel multiplies so many tokens and adds a low-rank correction, or APART."""
    return next(tile for most, tile in correcting_choices(weight, gpu) if most is None or tokens <= most)


@cache
def correcting_choices(weight: WeightShape, gpu: str) -> list[tuple[int | None, Tile | None]]:
    """As :func:`choices`. Another kernel corrects in schemes for which nothing was measured."""
    measured = [layer for layer in _table() if layer["scheme"] == weight.scheme and "corrected" in layer]
    if not measured:
        return [(None, APART)]
    choices = _nearest(measured, weight, gpu)["corrected"]
    return [(most, APART if tile == "apart" else Tile(*tile)) for most, tile in choices]


def _nearest(layers: list[dict[str, Any]], weight: WeightShape, gpu: str) -> dict[str, Any]:
    on_such = [layer for layer in layers if layer["gpu"] == gpu] or layers
    outputs = weight.whole_outputs or weight.out_features
    return min(on_such, key=lambda layer: _distance(outputs, layer["out_features"], weight.in_features, layer["in_features"]))


def _distance(outputs: int, measured_outputs: int, inputs: int, measured_inputs: int) -> float:
    return abs(math.log(outputs / measured_outputs)) + abs(math.log(inputs / measured_inputs))


@cache
def _table() -> list[dict[str, Any]]:
    table: dict[str, Any] = json.loads(files("lrq_vllm.kernels").joinpath("hopper_table.json").read_text())
    return list(table["layers"])
