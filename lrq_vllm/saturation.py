"""How many activations lie outside the range that calibration found for a static w8a8 layer: whether traffic has left it.

With LRQ_SATURATION=1 each such layer looks at the first token of every step, on the device and inside CUDA graphs: a sample
that costs one small kernel a layer. Without it nothing is counted.
"""

from typing import Any

import torch
from torch import Tensor

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels import ops
from lrq_vllm.kernels.reference import InputGrid
from lrq_vllm.switches import is_on

__all__ = ["VARIABLE", "asked_for", "check_countable", "clipped_counts", "count_clipped", "start_counting"]

VARIABLE = "LRQ_SATURATION"


def check_countable(manifest: Manifest) -> None:
    """Raises SettingsError for a checkpoint whose activations have no calibrated range."""
    if manifest.activation is None or not manifest.activation.static:
        raise SettingsError(
            f"A {manifest.scheme} checkpoint has no calibrated ranges that activations could leave: only w8a8 has them. Leave "
            "out --count-clipped."
        )


def asked_for() -> bool:
    """Whether the variable is 1. Raises SettingsError for a value of it that is neither 0 nor 1."""
    return is_on(VARIABLE, "to count what is clipped")


def start_counting(layer: torch.nn.Module, device: torch.device) -> None:
    """Give a layer its counters, values clipped and values seen, if they are :func:`asked_for`."""
    if asked_for():
        layer.register_buffer("lrq_clipped", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)


def count_clipped(layer: Any, x: Tensor, grid: InputGrid) -> None:
    """Add what the first token of x [tokens, in] has, if the layer counts. grid: the layer's calibrated one."""
    if hasattr(layer, "lrq_clipped"):
        ops.count_clipped_(layer.lrq_clipped, x, *grid.calibrated)


def clipped_counts(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Layer name -> (values clipped, values seen) since the model was loaded; empty if nothing is counted.

    Waits for the device: for a metrics page, not for every step.
    """
    counting = {name: module.lrq_clipped for name, module in model.named_modules() if hasattr(module, "lrq_clipped")}
    if not counting:
        return {}
    rows = torch.stack(list(counting.values())).tolist()
    return {name: (clipped, seen) for name, (clipped, seen) in zip(counting, rows, strict=True)}
