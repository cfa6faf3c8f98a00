"""W8A8 and W4A8: 8-bit activations times 8- or 4-bit weights, in integers."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.integer_backends import IntegerBackend, LayerInput, choose_integer_backend
from lrq_vllm.kernels.reference import (
    IntegerWeight,
    Static,
    integer_linear,
    integer_weight,
    quantize_per_token,
    quantize_static,
)
from lrq_vllm.layer_self_test import check_layer
from lrq_vllm.layer_weights import LayerWeights

__all__ = ["LrqW4A8LinearMethod", "LrqW8A8LinearMethod"]

logger = logging.getLogger(f"vllm.{__name__}")


class _IntegerLinearMethod(LinearMethodBase):
    """What both schemes share; they differ in how they quantize the activations."""

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._bits = manifest.weight.bits
        self._name = f"{manifest.scheme} {modules[0]}"
        self._weights = LayerWeights(manifest, modules)
        self._backend: IntegerBackend | None = None

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Register the parameters that the loader fills."""
        layer.lrq_in_features, layer.lrq_dtype = input_size_per_partition, params_dtype
        self._weights.create(layer, input_size_per_partition, output_partition_sizes, input_size, extra["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and bring the weight into the layout of the kernel that will run."""
        packed = self._weights.take(layer)
        self._prepare_activations(layer)
        # Column sums are taken here, from this rank's share of the inputs.
        weight = integer_weight(*packed, self._bits, layer.lrq_in_features)
        x = LayerInput(layer.lrq_in_features, layer.lrq_dtype, static=self._static(layer) is not None)
        backend = choose_integer_backend(weight, x)
        backend.prepare(layer, weight, x)
        self._backend = backend
        layer.lrq_kernel = backend.name
        logger.debug("%s runs on %s", self._name, backend.name)
        name = f"{self._name} on {backend.name}"
        check_layer(name, partial(self.apply, layer), partial(self._reference, layer, weight), weight.q, x.features, x.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        assert self._backend is not None
        y = self._backend.linear(layer, x.reshape(-1, x.shape[-1]), self._static(layer), bias)
        return y.view(*x.shape[:-1], -1)

    def _reference(self, layer: Any, weight: IntegerWeight, x: Tensor) -> Tensor:
        static = self._static(layer)
        tokens = quantize_per_token(x) if static is None else quantize_static(x, *static)
        return integer_linear(tokens, weight, None, x.dtype)

    def _prepare_activations(self, layer: Any) -> None:
        """Settle the activation parameters after loading; dynamic quantization has none."""

    def _static(self, layer: Any) -> Static | None:
        """The calibrated step and zero-point of the input; None quantizes each token by itself."""
        return None


@register_weight_loader_v2_supported_method
class LrqW8A8LinearMethod(_IntegerLinearMethod):
    """8-bit weights per channel, 8-bit activations with one calibrated step per tensor."""

    def _prepare_activations(self, layer: Any) -> None:
        for name in ("input_step", "input_zero_point"):
            value = self._weights.shared_value(getattr(layer, name).data, name)
            setattr(layer, name, Parameter(value.clone(), requires_grad=False))

    def _static(self, layer: Any) -> Static | None:
        return layer.input_step, layer.input_zero_point


@register_weight_loader_v2_supported_method
class LrqW4A8LinearMethod(_IntegerLinearMethod):
    """4-bit weights per channel, 8-bit activations with a step for each token."""
