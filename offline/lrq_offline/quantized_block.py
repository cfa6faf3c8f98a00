"""A decoder block whose linear layers compute with quantized weights and, where the scheme asks, quantized activations."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrq_offline.affine import ActivationQuantizer
from lrq_offline.learned_correction import LearnedCorrection
from lrq_offline.learned_experts import ExpertLayers, LearnedExperts
from lrq_offline.learned_scales import FixedRounding, Rounding

__all__ = [
    "FakeQuantizedLinear",
    "fix_weights",
    "held_weights",
    "quantized_linear",
    "replace_linears",
]


class FakeQuantizedLinear(nn.Module):
    """y = Q(x) W_hat^T + bias, where ``rounding`` gives W_hat and Q is the activations' fake quantizer (None: x as is).

    With a correction, + (x V) U^T for U [out, k] and V [in, k]: the buffers, or what ``correction`` has while it learns.
    """

    bias: Tensor | None
    low_rank_u: Tensor | None
    low_rank_v: Tensor | None

    def __init__(self, rounding: Rounding, bias: Tensor | None, activation: ActivationQuantizer | None) -> None:
        super().__init__()
        self.rounding = rounding
        self.register_buffer("bias", bias)
        self.register_buffer("low_rank_u", None)
        self.register_buffer("low_rank_v", None)
        self.activation = activation
        self.correction: LearnedCorrection | None = None
        self._held: Tensor | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

    def correct(self, u: Tensor, v: Tensor, dtype: torch.dtype) -> None:
        """Add U and V, in the 16 bits that they are stored in; ``dtype``: of the products with them."""
        self.low_rank_u, self.low_rank_v, self.correction = u, v, None
        self._factors = u.to(dtype), v.to(dtype)

    def learn_correction(self) -> None:
        """Let U and V, where there are any, be learned from here on, until :meth:`correct` says what they have become."""
        if self._factors is not None:
            assert self.low_rank_u is not None and self.low_rank_v is not None
            self.correction = LearnedCorrection(self.low_rank_u, self.low_rank_v, self._factors[0].dtype)

    def hold_weights(self, held: bool) -> None:
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
        y = nn.functional.linear(self.quantized_input(x, weight.dtype), weight, self.bias)
        factors = self._factors if self.correction is None else self.correction.factors()
        if factors is None:
            return y
        u, v = factors
        return y + nn.functional.linear(nn.functional.linear(x.to(u.dtype), v.T), u)


@contextmanager
def held_weights(block: nn.Module) -> Iterator[None]:
    """For passes in which nothing is learned: every quantized layer computes its W_hat once instead of for each batch."""
    layers = [module for module in block.modules() if isinstance(module, FakeQuantizedLinear | ExpertLayers)]
    for layer in layers:
        layer.hold_weights(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.hold_weights(False)


def fix_weights(block: nn.Module, dtype: torch.dtype) -> None:
    """Replace what each quantized layer of a block has learned by the integers that came of it; experts are apart again."""
    for name, module in list(block.named_modules()):
        if isinstance(module, LearnedExperts):
            block.set_submodule(name, module.apart)
            for layers in module.layers:
                for layer, integers in layers.quantized().items():
                    quantized_linear(block, layer).rounding = FixedRounding(*integers, dtype)
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


def quantized_linear(block: nn.Module, name: str) -> FakeQuantizedLinear:
    """The layer ``name`` of a block whose linear layers have been replaced."""
    linear = block.get_submodule(name)
    assert isinstance(linear, FakeQuantizedLinear)
    return linear
