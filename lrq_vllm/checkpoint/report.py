"""lrq_report.json, read strictly: what a run says of itself, or an error that names everything that is missing."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrq_vllm.errors import CheckpointError, one_paragraph

__all__ = ["REPORT_NAME", "BlockResult", "Curve", "LayerResult", "RunReport", "Scalar", "read_report"]

REPORT_NAME = "lrq_report.json"

Scalar = str | int | float | None

_NUMBER = int | float
# The form of the file: an object with these keys, a list of one form, or a mapping from any name to one form.
_ANY_NAME = "*"
_CURVES = ("step", "train", "held_out")
# An error that could not be measured, because activations were not finite, is null.
_ERROR = _NUMBER | None
_LAYER = {"error_before": _ERROR, "error_after": _ERROR, "fallback": str | None}
_BLOCK = {
    "block": int,
    "error_before": _ERROR,
    "error_after": _ERROR,
    "seconds": _NUMBER,
    "steps": int,
    "curve": {"step": [int], "train": [_NUMBER | None], "held_out": [_NUMBER | None]},
    "layers": {_ANY_NAME: _LAYER},
}
_REPORT = {
    "tool_version": str,
    "model": str,
    "settings": {_ANY_NAME: str | int | float | None},
    "quantized_linears": {"modules": int, "float_bytes": int, "bytes": int},
    "checkpoint_bytes": int,
    "source_bytes": int,
    "warnings": [str],
    "blocks": [_BLOCK],
    "seconds": _NUMBER,
}


@dataclass(frozen=True)
class Curve:
    """Losses at some steps; None where one was not measured. All three are equally long, and empty if nothing was learned."""

    step: tuple[int, ...]
    train: tuple[float | None, ...]
    held_out: tuple[float | None, ...]


@dataclass(frozen=True)
class LayerResult:
    """One linear layer. Errors are relative squared errors; fallback says why it was only rounded to nearest, if it was."""

    error_before: float
    error_after: float
    fallback: str | None


@dataclass(frozen=True)
class BlockResult:
    """One decoder block; block counts from 1, layers are named as inside the block (``mlp.down_proj``)."""

    block: int
    error_before: float
    error_after: float
    seconds: float
    steps: int
    curve: Curve
    layers: Mapping[str, LayerResult]


@dataclass(frozen=True)
class RunReport:
    """One run of ``lrq-offline quantize``. linear_*: of the quantized linear layers alone; source and checkpoint: of all."""

    tool_version: str
    model: str
    settings: Mapping[str, Scalar]
    linears: int
    linear_float_bytes: int
    linear_bytes: int
    source_bytes: int
    checkpoint_bytes: int
    warnings: tuple[str, ...]
    blocks: tuple[BlockResult, ...]
    seconds: float

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every layer name that some block has, in the order of the file."""
        return tuple(dict.fromkeys(name for block in self.blocks for name in block.layers))


def read_report(folder: Path) -> RunReport:
    """The report in a checkpoint's folder. Raises CheckpointError if there is none or it is not of this version's form."""
    path = folder / REPORT_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {REPORT_NAME}. Give a folder that `lrq-offline quantize` of this version wrote."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Quantize again.") from error
    problems = list(_misfits(data, _REPORT, "")) or list(_contradictions(data))
    if problems:
        raise CheckpointError(f"{path} cannot be shown: " + one_paragraph(problems, "Quantize again with this version of lrq."))
    linears = data["quantized_linears"]
    return RunReport(
        tool_version=data["tool_version"],
        model=data["model"],
        settings=data["settings"],
        linears=linears["modules"],
        linear_float_bytes=linears["float_bytes"],
        linear_bytes=linears["bytes"],
        source_bytes=data["source_bytes"],
        checkpoint_bytes=data["checkpoint_bytes"],
        warnings=tuple(data["warnings"]),
        blocks=tuple(_block(block) for block in data["blocks"]),
        seconds=data["seconds"],
    )


def _misfits(value: Any, form: Any, place: str) -> Iterator[str]:
    """What keeps ``value`` from having ``form``: ``curve is missing``, ``steps is no int``; place is where value stands."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            yield f"{place or 'the file'} is no object"
            return
        for name in value if _ANY_NAME in form else form:
            inside = f"{place}.{name}" if place else name
            if name in value:
                yield from _misfits(value[name], form.get(_ANY_NAME, form.get(name)), inside)
            else:
                yield f"{inside} is missing"
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for index, item in enumerate(value):
            yield from _misfits(item, form[0], f"{place}[{index}]")
    elif not isinstance(value, form):
        yield f"{place} is {value!r}"


def _contradictions(data: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a file of the right form: numbers that cannot all be true."""
    for needed in ("scheme", "method"):
        if not isinstance(data["settings"].get(needed), str):
            yield f"settings.{needed} is missing"
    if not data["blocks"] or [block["block"] for block in data["blocks"]] != list(range(1, len(data["blocks"]) + 1)):
        yield "blocks does not hold block 1 and those after it"
    for block in data["blocks"]:
        if not block["layers"]:
            yield f"block {block['block']} has no layers"
        if len({len(block["curve"][name]) for name in _CURVES}) != 1:
            yield f"the curves of block {block['block']} have unequal lengths"
    linears = data["quantized_linears"]
    for whole, part in (("source_bytes", "float_bytes"), ("checkpoint_bytes", "bytes")):
        if not 0 < linears[part] <= data[whole]:
            yield f"{whole} is {data[whole]}, of which the quantized linears are {linears[part]}"


def _error(value: float | None) -> float:
    return math.nan if value is None else value


def _block(data: dict[str, Any]) -> BlockResult:
    return BlockResult(
        block=data["block"],
        error_before=_error(data["error_before"]),
        error_after=_error(data["error_after"]),
        seconds=data["seconds"],
        steps=data["steps"],
        curve=Curve(**{name: tuple(data["curve"][name]) for name in _CURVES}),
        layers={
            name: LayerResult(_error(layer["error_before"]), _error(layer["error_after"]), layer["fallback"])
            for name, layer in data["layers"].items()
        },
    )
