"""Who multiplies 16-bit activations with 4-, 3- or 2-bit weights on which device, or says why it cannot run."""

import logging
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm import exact_ops
from lrq_vllm.arranged_layer import arranged_linear, keep_arranged
from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.kernel_choice import HOPPER, REFERENCE, TRITON, first_that_can, why_not_reference
from lrq_vllm.kernels.arranged_linear import why_not
from lrq_vllm.kernels.arranged_weight import WeightShape, arrange
from lrq_vllm.kernels.reference import dequantize_weight

__all__ = ["PackedWeight", "WeightOnlyBackend", "choose_weight_only_backend", "weight_only_candidates"]

logger = logging.getLogger(f"vllm.{__name__}")


class PackedWeight(NamedTuple):
    """A weight as the checkpoint stores it: words [out, width], steps and zero-points [out, groups]; dtype: of activations."""

    q: Tensor
    step: Tensor
    zero_point: Tensor
    bits: int
    in_features: int
    dtype: torch.dtype


class WeightOnlyBackend(Protocol):
    """Multiplies with a prepared weight; the arithmetic is that of reference.weight_only_linear."""

    name: str

    def why_not(self, weight: PackedWeight) -> str | None:
        """The reason why this backend cannot run with this weight, on its device, or None if it can."""

    def prepare(self, layer: Any, weight: PackedWeight) -> None:
        """Put the weight on the layer in this backend's layout, as parameters."""

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [tokens, out] in x's dtype."""


def choose_weight_only_backend(weight: PackedWeight) -> WeightOnlyBackend:
    """The first backend that can run, or the one that LRQ_KERNEL names.

    Raises SettingsError with every backend's reason if none can.
    """
    return first_that_can(weight_only_candidates(weight), weight.q.device)


def weight_only_candidates(weight: PackedWeight) -> list[tuple[WeightOnlyBackend, str | None]]:
    """Every backend, the best first, and the reason why it cannot run with this weight, or None if it can."""
    backends: tuple[WeightOnlyBackend, ...] = (HopperBackend(), TritonBackend(), ExpandedBackend(), ReferenceBackend())
    return [(backend, backend.why_not(weight)) for backend in backends]


class HopperBackend:
    """Our kernels for Hopper GPUs, as one opaque op: the weight is laid out for them at load and kept in its bits."""

    name = HOPPER

    def why_not(self, weight: PackedWeight) -> str | None:
        """Needs a Hopper GPU, and sizes that fit."""
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return f"takes 16-bit activations, not {weight.dtype}"
        groups = weight.step.shape[1]
        shape = WeightShape(weight.bits, False, len(weight.q), weight.in_features, groups > 1)
        return why_not(weight.q.device, shape, groups)

    def prepare(self, layer: Any, weight: PackedWeight) -> None:
        """Lay the weight out and compile what it may need."""
        q, zero_point = unpack(weight.q, weight.bits, weight.in_features), weight.zero_point.to(torch.int32)
        keep_arranged(layer, arrange(q, weight.step, zero_point, None, weight.bits, integer=False), weight.dtype)

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The fastest kernel for the number of tokens."""
        return arranged_linear(layer, x, bias)


class TritonBackend:
    """Our Triton kernel, as an opaque op: it unpacks the checkpoint's own words."""

    name = TRITON

    def why_not(self, weight: PackedWeight) -> str | None:
        """Needs CUDA."""
        return None if weight.q.is_cuda else "needs a CUDA device"

    def prepare(self, layer: Any, weight: PackedWeight) -> None:
        """Keep the checkpoint's layout."""
        _keep(layer, weight)

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Unpacked tile by tile."""
        from lrq_vllm.kernels import ops

        return ops.weight_only_linear(x, layer.lrq_q, layer.lrq_step, layer.lrq_zero_point, layer.lrq_bits, bias)


class ExpandedBackend:
    """The CPU: the weight is expanded to the activations' dtype at load, and torch multiplies. No memory is saved."""

    name = "expanded"

    _expansion_logged = False

    def why_not(self, weight: PackedWeight) -> str | None:
        """Needs the CPU."""
        return None if weight.q.device.type == "cpu" else "needs the CPU"

    def prepare(self, layer: Any, weight: PackedWeight) -> None:
        """Expand, and say so once."""
        if not ExpandedBackend._expansion_logged:
            ExpandedBackend._expansion_logged = True
            logger.info(
                "lrq on a CPU: %d-bit weights are expanded to %s at load (no memory is saved while serving).",
                weight.bits, str(weight.dtype).removeprefix("torch."),
            )  # fmt: skip
        expanded = dequantize_weight(weight.q, weight.step, weight.zero_point, weight.bits, weight.in_features)
        layer.lrq_weight = Parameter(expanded.to(weight.dtype), requires_grad=False)

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """torch's own product."""
        return torch.nn.functional.linear(x, layer.lrq_weight, bias)


class ReferenceBackend:
    """Any device: the definition itself, with sums in float64 (kernels/exact.py)."""

    name = REFERENCE

    def why_not(self, weight: PackedWeight) -> str | None:
        """Has to be asked for."""
        return why_not_reference()

    def prepare(self, layer: Any, weight: PackedWeight) -> None:
        """Keep the checkpoint's layout."""
        _keep(layer, weight)

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Unpacked as a whole, each time."""
        return exact_ops.weight_only_linear(x, layer.lrq_q, layer.lrq_step, layer.lrq_zero_point, layer.lrq_bits, bias)


def _keep(layer: Any, weight: PackedWeight) -> None:
    """Put the weight on the layer as it is, as parameters."""
    for name, value in (("lrq_q", weight.q), ("lrq_step", weight.step), ("lrq_zero_point", weight.zero_point)):
        setattr(layer, name, Parameter(value.contiguous(), requires_grad=False))
    layer.lrq_bits = weight.bits
