"""How a layer's input is quantized, from what the manifest says of a scheme's activations and what a layer has loaded."""

from typing import Any

from lrq_vllm.checkpoint.schema import ActivationFormat
from lrq_vllm.kernels.reference import InputGrid, InputKind

__all__ = ["CALIBRATED", "input_grid", "input_kind"]

CALIBRATED: dict[InputKind, tuple[str, ...]] = {
    InputKind.PER_TOKEN: (),
    InputKind.STATIC: ("input_step", "input_zero_point"),
    InputKind.CLIPPED: ("input_clip",),
}
"""The tensors of a module that calibration has found for its input, in the order of reference.InputGrid."""


def input_kind(activation: ActivationFormat) -> InputKind:
    """The kind of an integer scheme's inputs."""
    if activation.symmetric:
        return InputKind.CLIPPED
    return InputKind.STATIC if activation.static else InputKind.PER_TOKEN


def input_grid(kind: InputKind, layer: Any) -> InputGrid:
    """``layer`` has what is calibrated under the names of the checkpoint's tensors."""
    return InputGrid(kind, tuple(getattr(layer, name) for name in CALIBRATED[kind]))
