"""A decoder block whose linear layers compute with quantized weights and, where the scheme asks, quantized activations."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lrq_offline.affine import fake_quantize, fake_quantize_per_token
from lrq_offline.learned_scales import LearnedRounding
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = [
    "ActivationQuantizer",
    "FakeQuantizedLinear",
    "dynamic_activations",
    "fix_weights",
    "quantized_copy",
    "static_activations",
]

ActivationQuantizer = Callable[[Tensor], Tensor]


def static_activations(quantizer: StepAndZeroPoint, bits: int) -> ActivationQuantizer:
    """Fake quantization with one fixed step for the tensor."""
    return lambda x: fake_quantize(x, quantizer, bits)


def dynamic_activations(bits: int) -> ActivationQuantizer:
    """Fake quantization with a step for each token."""
    return lambda x: fake_quantize_per_token(x, bits)


class FakeQuantizedLinear(nn.Module):
    """y = Q(x) W_hat^T + bias, where ``rounding`` gives W_hat and Q is the activations' fake quantizer (None: x as is)."""

    bias: Tensor | None

    def __init__(self, rounding: LearnedRounding, bias: Tensor | None, activation: ActivationQuantizer | None) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("bias", bias)
        self.activation = activation
        self._fixed_weight: Tensor | None = None

    def fix_weight(self) -> None:
        """Compute W_hat once and keep it: for the passes after learning."""
        with torch.no_grad():
            self._fixed_weight = self.rounding()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        weight = self.rounding() if self._fixed_weight is None else self._fixed_weight
        return nn.functional.linear(x if self.activation is None else self.activation(x), weight, self.bias)


def fix_weights(block: nn.Module) -> None:
    """Let every quantized layer of a block compute its W_hat once and keep it, when nothing is learned any more."""
    for module in block.modules():
        if isinstance(module, FakeQuantizedLinear):
            module.fix_weight()


def quantized_copy(
    block: nn.Module, roundings: Mapping[str, LearnedRounding], activations: Mapping[str, ActivationQuantizer | None]
) -> nn.Module:
    """A copy of a float block in which each linear layer named in ``roundings`` is a :class:`FakeQuantizedLinear`."""
    quantized = copy.deepcopy(block)
    for name, rounding in roundings.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        quantized.set_submodule(name, FakeQuantizedLinear(rounding, linear.bias, activations.get(name)))
    return quantized
