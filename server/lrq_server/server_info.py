"""What /lrq/info says: which model this is, how good it was found to be, and what it runs on."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrq_vllm.checkpoint.report import BlockResult, read_report
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import CheckpointError
from lrq_vllm.golden_replay import Replayed

__all__ = ["ServedModel", "quality_of", "server_info"]

logger = logging.getLogger(f"vllm.{__name__}")


@dataclass(frozen=True)
class ServedModel:
    """What vLLM says once it has loaded. names: that requests give. kernels: of each layer, as vLLM fuses them."""

    names: tuple[str, ...]
    vllm_version: str
    max_model_len: int
    ranks: int
    kv_cache_dtype: str
    kernels: Mapping[str, str]


def server_info(folder: Path, manifest: Manifest, served: ServedModel, self_test: Replayed | None) -> dict[str, Any]:
    """Plain values, for JSON. self_test: what it found; None if there was none."""
    passed = (
        {"result": "passed", "texts": self_test.texts, "mean_difference_nats": self_test.mean_difference} if self_test else {}
    )
    return {
        "lrq_version": version("lrq"),
        "vllm_version": served.vllm_version,
        "model": {"names": list(served.names), "folder": str(folder), "max_model_len": served.max_model_len},
        "scheme": manifest.scheme,
        "weight_bits": manifest.weight.bits,
        "group_size": manifest.weight.group_size,
        "activation": None if manifest.activation is None else manifest.activation.to_dict(),
        "kv_bits": manifest.kv_bits or 16,
        "kv_cache_dtype": served.kv_cache_dtype,
        "tensor_parallel_size": served.ranks,
        "kernels": dict(served.kernels),
        "self_test": passed or {"result": "off"},
        "quality": quality_of(folder),
    }


def quality_of(folder: Path) -> dict[str, Any] | None:
    """What `lrq-offline quantize` measured when it made the checkpoint; None if its report is missing or of another version."""
    try:
        report = read_report(folder)
    except CheckpointError as error:
        logger.warning("/lrq/info has no quality numbers: %s", error)
        return None
    return {
        "method": report.settings["method"],
        "settings": dict(report.settings),
        "linear_bytes": report.linear_bytes,
        "linear_float_bytes": report.linear_float_bytes,
        "blocks": [_errors(block) for block in report.blocks],
        "rounded_to_nearest": _fallbacks(report.blocks),
        "warnings": list(report.warnings),
    }


def _errors(block: BlockResult) -> dict[str, Any]:
    """Relative squared errors of a block's output; null where they could not be measured."""
    numbers = asdict(block)
    measured = {name: numbers[name] for name in ("error_before", "error_after")}
    return {"block": block.block} | {name: None if math.isnan(error) else error for name, error in measured.items()}


def _fallbacks(blocks: Sequence[BlockResult]) -> dict[str, str]:
    """Layer -> why nothing was learned for it."""
    return {
        f"block {block.block} {name}": layer.fallback
        for block in blocks
        for name, layer in block.layers.items()
        if layer.fallback
    }
