"""How a scheme's activations are quantized, as the kernels know it."""

from lrq_vllm.checkpoint.schema import ActivationFormat
from lrq_vllm.kernels.reference import InputKind

__all__ = ["input_kind"]


def input_kind(activation: ActivationFormat) -> InputKind:
    """The kind of an integer scheme's inputs."""
    if activation.symmetric:
        return InputKind.CLIPPED
    return InputKind.STATIC if activation.static else InputKind.PER_TOKEN
