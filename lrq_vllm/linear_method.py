"""A quantized linear layer of vLLM: what all schemes share. linear_integer.py and linear_weight_only.py say how it multiplies.

y = W_hat Q(x') + bias + U (V^T x'),   x' = H x where the checkpoint rotates the input, else x
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from lrq_vllm.checkpoint.hadamard import OnlineHadamard, refill_tables, rotate
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.kernel_choice import HOPPER
from lrq_vllm.kernels import ops, reference
from lrq_vllm.layer_self_test import check_layer
from lrq_vllm.layer_weights import LayerWeights
from lrq_vllm.low_rank import LowRank, choose_low_rank
from lrq_vllm.tp_invariance import from_all_ranks, invariant, load_own_outputs, own_outputs, shares_inputs

__all__ = ["LrqLinearMethod", "Product"]

logger = logging.getLogger(f"vllm.{__name__}")

Product = Callable[[Tensor], Tensor]
"""y [tokens, out] of x [tokens, in], without bias."""


class LrqLinearMethod(LinearMethodBase, ABC):
    """``modules`` are the checkpoint's modules that vLLM fused into the layer."""

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._bits = manifest.weight.bits
        self._module = modules[0]
        self._name = f"{manifest.scheme} {self._module}"
        self._weights = LayerWeights(manifest, modules)
        self._outputs_of_all_ranks = sum(manifest.quantized[module][0] for module in modules)
        hadamard = manifest.online_hadamard
        self._hadamard = hadamard if hadamard is not None and self._module in hadamard.modules else None
        self._low_rank: LowRank | None = None
        self._on_hopper = False

    def create_weights(
        self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Register the parameters that the loader fills."""
        inputs, outputs, load = input_size_per_partition, output_partition_sizes, extra["weight_loader"]
        layer.lrq_by_outputs = invariant() and shares_inputs(layer)
        if layer.lrq_by_outputs:
            inputs, outputs = input_size, [own_outputs(output_size, layer.tp_size, self._name)]
            load = load_own_outputs
        layer.lrq_in_features, layer.lrq_dtype = inputs, params_dtype
        layer.lrq_whole_outputs = self._outputs_of_all_ranks if invariant() else 0
        self._weights.create(layer, inputs, outputs, input_size, load)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and bring it into the layout of the kernels that will run."""
        packed, pairs = self._weights.take(layer)
        layer.lrq_kernel, product = self._prepare(layer, packed)
        self._on_hopper = layer.lrq_kernel == HOPPER  # the rotation and the correction too
        device, dtype = packed[0].device, layer.lrq_dtype
        if self._hadamard is not None:
            self._prepare_rotation(self._hadamard, device, dtype)
        if pairs:
            self._low_rank = choose_low_rank(device, layer.lrq_kernel)
            self._low_rank.prepare(layer, pairs, dtype)
        logger.debug("%s runs on %s", self._name, layer.lrq_kernel)

        def wanted(x: Tensor) -> Tensor:
            if self._hadamard is not None:
                x = rotate(x, self._hadamard.block, self._hadamard.order).to(x.dtype)
            return reference.add_low_rank(product(x), x, pairs)

        name, served = f"{self._name} on {layer.lrq_kernel}", partial(self._outputs, layer)
        check_layer(name, served, wanted, packed[0], layer.lrq_in_features, dtype)
        if layer.lrq_by_outputs:
            layer.reduce_results = False  # what apply returns is whole

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] to [..., out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if layer.lrq_by_outputs:
            if layer.bias is not None and not layer.skip_bias_add:  # vLLM gives it to one rank only
                bias = layer.bias.chunk(layer.tp_size)[layer.tp_rank]
            y = from_all_ranks(self._outputs(layer, from_all_ranks(rows), bias))
        else:
            y = self._outputs(layer, rows, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _outputs(self, layer: Any, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Those [tokens, out] that this rank has, of rows [tokens, in]."""
        if self._hadamard is not None:
            rows = ops.rotate(rows, self._hadamard.block, self._hadamard.order, self._on_hopper)
        y = self._multiply(layer, rows, bias)
        if self._low_rank is not None:
            y = self._low_rank.add(layer, y, rows)
        return y

    def _prepare_rotation(self, hadamard: OnlineHadamard, device: torch.device, dtype: torch.dtype) -> None:
        refill_tables()
        if device.type == "cuda":
            from lrq_vllm.kernels import hadamard as kernel
            from lrq_vllm.kernels import rotate_tokens

            kernel.check(hadamard.block, hadamard.order, device, hopper=self._on_hopper)
            if self._on_hopper:
                rotate_tokens.prepare(hadamard.block, hadamard.order, dtype, device)

    @abstractmethod
    def _prepare(self, layer: Any, packed: tuple[Tensor, Tensor, Tensor]) -> tuple[str, Product]:
        """Put the weight on the layer for the backend that will run.

        packed: qweight, weight_step and weight_zero_point as loaded. Returns the backend's name and what the reference
        computes of this rank's share of the weight.
        """

    @abstractmethod
    def _multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """W_hat Q(x) + bias, [tokens, out] in x's dtype, of x [tokens, in]."""
