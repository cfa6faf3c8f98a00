"""W4A16, W3A16 and W2A16: 16-bit activations times 4-, 3- or 2-bit weights, per channel or per group."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from lrq_vllm.kernels.reference import weight_only_linear
from lrq_vllm.linear_method import LrqLinearMethod, Product
from lrq_vllm.weight_only_backends import PackedWeight, WeightOnlyBackend, choose_weight_only_backend

__all__ = ["LrqWeightOnlyLinearMethod"]


@register_weight_loader_v2_supported_method
class LrqWeightOnlyLinearMethod(LrqLinearMethod):
    """One step per channel or per group of inputs; where the weight is unpacked is up to the backend."""

    _backend: WeightOnlyBackend

    def _prepare(self, layer: Any, packed: tuple[Tensor, Tensor, Tensor]) -> tuple[str, Product]:
        weight = PackedWeight(*packed, self._bits, layer.lrq_in_features, layer.lrq_dtype)
        self._backend = choose_weight_only_backend(weight)
        self._backend.prepare(layer, weight)
        return self._backend.name, lambda x: weight_only_linear(x, *packed, self._bits, None)

    def _multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._backend.linear(layer, x, bias)
