"""W8A8, W4A8 and W4A4: 8- or 4-bit activations times 8- or 4-bit weights, in integers."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

from lrq_vllm.input_fusion import fusion_of
from lrq_vllm.integer_backends import IntegerBackend, LayerInput, choose_integer_backend
from lrq_vllm.kernels.reference import (
    PER_TOKEN,
    InputGrid,
    clipped_grid,
    integer_linear,
    integer_weight,
    quantize_input,
    static_grid,
)
from lrq_vllm.linear_method import LrqLinearMethod, Product
from lrq_vllm.saturation import count_clipped, start_counting
from lrq_vllm.tp_invariance import invariant

__all__ = ["LrqW4A4LinearMethod", "LrqW4A8LinearMethod", "LrqW8A8LinearMethod"]


class _IntegerLinearMethod(LrqLinearMethod):
    """What these schemes share; they differ in how they quantize the activations."""

    _backend: IntegerBackend

    def _prepare(self, layer: Any, packed: tuple[Tensor, Tensor, Tensor]) -> tuple[str, Product]:
        for name in self._calibrated():
            value = self._weights.shared_value(getattr(layer, name).data, name)
            setattr(layer, name, Parameter(value.clone(), requires_grad=False))
        grid = self._grid(layer)
        # Column sums are taken here, from this rank's share of the inputs.
        weight = integer_weight(*packed, self._bits, layer.lrq_in_features)
        fusion = fusion_of(self._module, grid.kind, rotated=self._hadamard is not None, exchanged=invariant())
        given = LayerInput(layer.lrq_in_features, layer.lrq_dtype, grid.kind, fusion)
        self._backend = choose_integer_backend(weight, given)
        self._backend.prepare(layer, weight, given)
        return self._backend.name, lambda x: integer_linear(quantize_input(x, grid), weight, None, x.dtype)

    def _multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._backend.linear(layer, x, self._grid(layer), bias)

    def _calibrated(self) -> tuple[str, ...]:
        """The parameters of the layer that calibration has found for its input."""
        return ()

    def _grid(self, layer: Any) -> InputGrid:
        return PER_TOKEN


@register_weight_loader_v2_supported_method
class LrqW8A8LinearMethod(_IntegerLinearMethod):
    """8-bit weights per channel, 8-bit activations with one calibrated step per tensor."""

    def _calibrated(self) -> tuple[str, ...]:
        return "input_step", "input_zero_point"

    def _grid(self, layer: Any) -> InputGrid:
        return static_grid(layer.input_step, layer.input_zero_point)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As every method; then, after the self-test, start to count what is clipped, if it is asked for."""
        super().process_weights_after_loading(layer)
        start_counting(layer, layer.input_step.device)

    def _multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        count_clipped(layer, x, self._grid(layer))
        return super()._multiply(layer, x, bias)


@register_weight_loader_v2_supported_method
class LrqW4A8LinearMethod(_IntegerLinearMethod):
    """4-bit weights per channel or group of inputs, 8-bit activations with a step for each token."""


@register_weight_loader_v2_supported_method
class LrqW4A4LinearMethod(_IntegerLinearMethod):
    """4-bit weights per channel or group of inputs, 4-bit activations with a step for each token, its range clipped by a
    calibrated ratio.
    """

    def _calibrated(self) -> tuple[str, ...]:
        return ("input_clip",)

    def _grid(self, layer: Any) -> InputGrid:
        return clipped_grid(layer.input_clip)
