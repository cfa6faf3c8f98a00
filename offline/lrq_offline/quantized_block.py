"""A decoder block whose linear layers compute with quantized weights and, where the scheme asks, quantized activations."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrq_offline.affine import fake_quantize, fake_quantize_per_token
from lrq_offline.learned_scales import FixedRounding, Rounding
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.schema import ActivationFormat

__all__ = [
    "ActivationQuantizer",
    "FakeQuantizedLinear",
    "activation_quantizer",
    "fix_weights",
    "held_weights",
    "replace_linears",
]

# x and a dtype to x_hat in that dtype.
ActivationQuantizer = Callable[[Tensor, torch.dtype], Tensor]


def activation_quantizer(rule: ActivationFormat | None, static: StepAndZeroPoint | None) -> ActivationQuantizer | None:
    """What a scheme does to a layer's input: nothing, one fixed step (``static``), or a step for each token."""
    if rule is None:
        return None
    if static is None:
        return lambda x, dtype: fake_quantize_per_token(x, rule.bits, dtype)
    return lambda x, dtype: fake_quantize(x, static, rule.bits, dtype)


class FakeQuantizedLinear(nn.Module):
    """y = Q(x) W_hat^T + bias, where ``rounding`` gives W_hat and Q is the activations' fake quantizer (None: x as is)."""

    bias: Tensor | None

    def __init__(self, rounding: Rounding, bias: Tensor | None, activation: ActivationQuantizer | None) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("bias", bias)
        self.activation = activation
        self._held: Tensor | None = None

    def hold_weight(self, held: bool) -> None:
        """Compute W_hat once, without gradients, and use it until it is let go."""
        with torch.no_grad():
            self._held = self.rounding() if held else None

    def quantized_input(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Q(x), of x's shape, computed in float32 and then rounded to ``dtype``."""
        return x.to(dtype) if self.activation is None else self.activation(x, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the weight's dtype or what autocast makes of it."""
        weight = self.rounding() if self._held is None else self._held
        # Autocast to that dtype then finds nothing left to do, which saves a pass over x.
        return nn.functional.linear(self.quantized_input(x, weight.dtype), weight, self.bias)


@contextmanager
def held_weights(block: nn.Module) -> Iterator[None]:
    """For passes in which nothing is learned: every quantized layer computes its W_hat once instead of for each batch."""
    layers = [module for module in block.modules() if isinstance(module, FakeQuantizedLinear)]
    for layer in layers:
        layer.hold_weight(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.hold_weight(False)


def fix_weights(block: nn.Module, dtype: torch.dtype) -> None:
    """Replace what each quantized layer of a block has learned by the integers that came of it."""
    for module in block.modules():
        if isinstance(module, FakeQuantizedLinear) and not isinstance(module.rounding, FixedRounding):
            module.rounding = FixedRounding(*module.rounding.quantized(), dtype)


def replace_linears(
    block: nn.Module, roundings: Mapping[str, Rounding], activations: Mapping[str, ActivationQuantizer | None]
) -> None:
    """Make each linear layer of ``block`` that is named in ``roundings`` a :class:`FakeQuantizedLinear`, in place."""
    for name, rounding in roundings.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block.set_submodule(name, FakeQuantizedLinear(rounding, linear.bias, activations.get(name)))
