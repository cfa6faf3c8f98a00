"""W4A16, W3A16 and W2A16: 16-bit activations times 4-, 3- or 2-bit weights, per channel or per group."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels.reference import dequantize_weight
from lrq_vllm.layer_weights import LayerWeights

__all__ = ["LrqWeightOnlyLinearMethod"]

logger = logging.getLogger(f"vllm.{__name__}")


@register_weight_loader_v2_supported_method
class LrqWeightOnlyLinearMethod(LinearMethodBase):
    """On CUDA the weight stays packed and our Triton kernel unpacks it; on a CPU it is expanded to 16 bits at load."""

    _expansion_logged = False

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._bits = manifest.weight.bits
        self._scheme = manifest.scheme
        self._weights = LayerWeights(manifest, modules)

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Register the parameters that the loader fills."""
        layer.lrq_in_features, layer.lrq_dtype = input_size_per_partition, params_dtype
        self._weights.create(layer, input_size_per_partition, output_partition_sizes, input_size, extra["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came; on a CPU, expand. Raises SettingsError on a device without a kernel."""
        packed = self._weights.take(layer)
        device = packed[0].device.type
        if device == "cuda":
            for name, value in zip(("lrq_q", "lrq_step", "lrq_zero_point"), packed, strict=True):
                setattr(layer, name, Parameter(value.contiguous(), requires_grad=False))
            layer.lrq_kernel = f"triton {self._scheme}"
        elif device == "cpu":
            self._log_expansion(layer.lrq_dtype)
            weight = dequantize_weight(*packed, self._bits, layer.lrq_in_features).to(layer.lrq_dtype)
            layer.lrq_weight = Parameter(weight, requires_grad=False)
            layer.lrq_kernel = "torch linear (expanded)"
        else:
            raise SettingsError(f"lrq has no {self._scheme} kernel for {device}. Serve on an NVIDIA GPU or on a CPU.")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        if hasattr(layer, "lrq_weight"):
            return torch.nn.functional.linear(x, layer.lrq_weight, bias)
        from lrq_vllm.kernels import ops

        packed = (layer.lrq_q, layer.lrq_step, layer.lrq_zero_point)
        y = ops.weight_only_linear(x.reshape(-1, x.shape[-1]), *packed, self._bits, bias)
        return y.view(*x.shape[:-1], -1)

    def _log_expansion(self, dtype: torch.dtype) -> None:
        if not LrqWeightOnlyLinearMethod._expansion_logged:
            LrqWeightOnlyLinearMethod._expansion_logged = True
            logger.info(
                "lrq %s on a CPU: %d-bit weights are expanded to %s at load (no memory is saved while serving).",
                self._scheme, self._bits, str(dtype).removeprefix("torch."),
            )  # fmt: skip
