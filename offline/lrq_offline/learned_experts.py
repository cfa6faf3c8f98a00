"""The experts of a block while they are learned: all of them in a few operations, with their weights above each other.

Each expert's layers by themselves would take some hundred launches a step, and the host would have to know how many tokens each
expert has. Here the weights of a kind of layer are one tensor, which is scaled and rounded at once, and their products are
grouped ones, which find the tokens of each expert on the device. An expert that no token of a step meets has gradients of zero:
AdamW decays it and goes on with what it has in motion.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.affine import activation_quantizer
from lrq_offline.experts import Experts
from lrq_offline.learned_scales import LearnedRounding, Rounding
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.schema import ActivationFormat

__all__ = ["ExpertLayers", "LearnedExperts", "learned_experts_of"]

# The compute capability on which torch.nn.functional.grouped_mm has been seen to ask the host for nothing.
_GROUPED_ON = (9, 0)


class ExpertLayers(nn.Module):
    """One layer of every expert, such as all gate projections; calling it gives their W_hat [experts, out, in].

    names: of these layers within the block, first those that ``learned`` has above each other [learned * out, in], then those
    of the experts with the integers ``decided``. quantizers: of their inputs, for schemes with static ones, in that order.
    """

    def __init__(
        self,
        names: Sequence[str],
        learned: LearnedRounding,
        decided: Sequence[Rounding],
        activation: ActivationFormat | None,
        quantizers: Sequence[StepAndZeroPoint] = (),
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.learned = learned
        self._decided = torch.stack([rounding() for rounding in decided]) if decided else None
        self._activation = activation
        self._static = (
            StepAndZeroPoint(*(torch.stack(parts) for parts in zip(*quantizers, strict=True))) if quantizers else None
        )
        self._held: Tensor | None = None

    @property
    def count(self) -> int:
        """Of the layers that are learned."""
        return len(self.names) - (0 if self._decided is None else len(self._decided))

    def hold_weights(self, held: bool) -> None:
        """Compute W_hat once, without gradients, and use it until it is let go."""
        with torch.no_grad():
            self._held = self() if held else None

    def quantized_input(self, x: Tensor, expert: Tensor, dtype: torch.dtype) -> Tensor:
        """Q(x) in ``dtype`` for x [rows, in], each row that of one ``expert`` [rows]."""
        of_rows = None
        if self._static is not None:
            of_rows = StepAndZeroPoint(*(part.view(-1, 1)[expert] for part in self._static))
        quantizer = activation_quantizer(self._activation, of_rows)
        return x.to(dtype) if quantizer is None else quantizer(x, dtype)

    def forward(self) -> Tensor:
        """W_hat [experts, out, in], with gradients."""
        if self._held is not None:
            return self._held
        weight = self.learned().unflatten(0, (self.count, -1))
        return weight if self._decided is None else torch.cat([weight, self._decided])

    def quantized(self) -> Mapping[str, tuple[Tensor, StepAndZeroPoint]]:
        """By name, the integers of the layers that are learned, and their steps."""
        q, quantizer = self.learned.quantized()
        parts = (tensor.chunk(self.count) for tensor in (q, *quantizer))
        return {
            name: (of_layer, StepAndZeroPoint(step, zero_point))
            for name, of_layer, step, zero_point in zip(self.names, *parts, strict=False)
        }


class LearnedExperts(nn.Module):
    """In the place of ``apart`` in a block. order: which experts, by their places there, the layers are of.

    What the experts put out is what they do apart, but for the order of sums.
    """

    places: Tensor
    _numbers: Tensor

    def __init__(self, apart: Experts, order: Sequence[int], gate: ExpertLayers, up: ExpertLayers, down: ExpertLayers) -> None:
        super().__init__()
        # In a tuple, so that it is no part of the block while this is.
        self._apart = (apart,)
        self.gate, self.up, self.down, self.act_fn = gate, up, down, apart[0].get_submodule("act_fn")
        device = gate.learned.weight.device
        self.register_buffer("places", torch.tensor(order, device=device).argsort())
        self.register_buffer("_numbers", torch.arange(len(order), device=device))

    @property
    def apart(self) -> Experts:
        """The experts as modules of their own, with the weights that they had before."""
        return self._apart[0]

    @property
    def layers(self) -> tuple[ExpertLayers, ExpertLayers, ExpertLayers]:
        """Gate, up and down."""
        return self.gate, self.up, self.down

    @property
    def asks_host(self) -> bool:
        """Whether a call waits for the device to say how many tokens each expert has."""
        return not _on_device(self.places)

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """As :meth:`Experts.forward`."""
        choices = chosen.shape[1]
        expert = self.places[chosen].flatten()
        order = expert.argsort(stable=True)
        back = order.argsort()
        expert = expert[order]
        ends = torch.searchsorted(expert, self._numbers, right=True).to(torch.int32)
        # Rows change places, each once: backwards too, where a sum of rows that were read twice would come in any order.
        rows = _reordered(x.unsqueeze(1).expand(-1, choices, -1).reshape(-1, x.shape[1]), order, back)
        gate, up, down = self.gate(), self.up(), self.down()
        inputs = self.gate.quantized_input(rows, expert, gate.dtype)
        inner = self.act_fn(_grouped_linear(inputs, gate, ends)) * _grouped_linear(inputs, up, ends)
        made = _grouped_linear(self.down.quantized_input(inner, expert, down.dtype), down, ends)
        by_token = _reordered(made, back, order).float().unflatten(0, (-1, choices))
        return (by_token * shares.float().unsqueeze(2)).sum(dim=1).to(x.dtype)


def learned_experts_of(block: nn.Module) -> list[LearnedExperts]:
    """Those in ``block``."""
    return [module for module in block.modules() if isinstance(module, LearnedExperts)]


def _on_device(tensor: Tensor) -> bool:
    known = hasattr(nn.functional, "grouped_mm")  # older versions of torch have none
    return known and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == _GROUPED_ON


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y [rows, out] = x W^T with, of ``weight`` [experts, out, in], the expert's whose rows of x [rows, in] end at ``ends``."""
    if _on_device(x):
        return nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([nn.functional.linear(*pair) for pair in zip(x.split(sizes), weight.unbind(), strict=True)])


def _reordered(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """x[order], for an order of the rows of x and the one that undoes it."""
    result: Tensor = _Reordered.apply(x, order, back)  # type: ignore[no-untyped-call]
    return result


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0][back], None, None
