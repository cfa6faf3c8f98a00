"""W4A16, W3A16 and W2A16: 16-bit activations times 4-, 3- or 2-bit weights, per channel or per group."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.kernels.reference import weight_only_linear
from lrq_vllm.layer_self_test import check_layer
from lrq_vllm.layer_weights import LayerWeights
from lrq_vllm.weight_only_backends import PackedWeight, WeightOnlyBackend, choose_weight_only_backend

__all__ = ["LrqWeightOnlyLinearMethod"]

logger = logging.getLogger(f"vllm.{__name__}")


@register_weight_loader_v2_supported_method
class LrqWeightOnlyLinearMethod(LinearMethodBase):
    """One step per channel or per group of inputs; where the weight is unpacked is up to the backend."""

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._bits = manifest.weight.bits
        self._weights = LayerWeights(manifest, modules)
        self._name = f"{manifest.scheme} {modules[0]}"
        self._backend: WeightOnlyBackend | None = None

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Register the parameters that the loader fills."""
        layer.lrq_in_features, layer.lrq_dtype = input_size_per_partition, params_dtype
        self._weights.create(layer, input_size_per_partition, output_partition_sizes, input_size, extra["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and bring the weight into the layout of the kernel that will run."""
        weight = PackedWeight(*self._weights.take(layer), self._bits, layer.lrq_in_features, layer.lrq_dtype)
        backend = choose_weight_only_backend(weight)
        backend.prepare(layer, weight)
        self._backend = backend
        layer.lrq_kernel = backend.name
        logger.debug("%s runs on %s", self._name, backend.name)
        check_layer(
            f"{self._name} on {backend.name}", partial(self.apply, layer),
            lambda x: weight_only_linear(x, weight.q, weight.step, weight.zero_point, self._bits, None),
            weight.q, layer.lrq_in_features, layer.lrq_dtype,
        )  # fmt: skip

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        assert self._backend is not None
        return self._backend.linear(layer, x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)
