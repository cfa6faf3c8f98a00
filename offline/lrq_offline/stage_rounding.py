"""A block's layers rounded stage by stage, each on the inputs that the layers before it, already rounded, produce.

By GPTQ, and with a low-rank correction by whatever rounds: low_rank_correction.py has the mathematics.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import Family
from lrq_offline.gptq import HessianSum, gptq
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.layer_inputs import watch_inputs
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.low_rank_correction import Moments, MomentSums, corrected
from lrq_offline.quantized_block import quantized_linear
from lrq_offline.ranks import Ranks
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, quantize

__all__ = ["RoundedLayer", "StageRounding", "in_cell", "nearest", "steps_of", "steps_of_all"]

logger = logging.getLogger(__name__)

# Of a step. Half of one would leave the weights that GPTQ moved at the edge of their cells, where any change undoes it.
_HALF_CELL = 0.25
_SEARCHED_TOGETHER = 2**24  # elements
_NOT_INVERTED = "its inputs' Hessian could not be inverted"


@dataclass(frozen=True)
class RoundedLayer:
    """fallback: why a layer was rounded to nearest instead; None if it was not. target: beside a correction that is going to be
    learned, the weight [out, in] whose rounding to nearest is what came of it; float32.
    """

    fallback: str | None
    target: Tensor | None = None


@dataclass(frozen=True)
class StageRounding:
    """What is the same for all blocks of a kind. family: as they have it. dtype: of matrix products. factor_dtype: of U and V
    in the checkpoint.
    """

    settings: QuantizeSettings
    family: Family
    dtype: torch.dtype
    factor_dtype: torch.dtype
    ranks: Ranks

    def __call__(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        steps: Mapping[str, StepAndZeroPoint],
        inputs: HiddenStates,
        arguments: dict[str, Any],
        batches: Sequence[slice | Tensor],
        short: frozenset[str],
        moments: Mapping[str, Moments] | None = None,
    ) -> dict[str, RoundedLayer]:
        """Round the layers of ``block``, which compute with fake-quantized inputs already, in place.

        batches: the rows of ``inputs`` that are looked at. moments: for corrections, by the first layer of each group; None
        takes them of the quantized block itself. Returns what became of each layer that is not ``short`` of tokens.
        """
        layers: dict[str, RoundedLayer] = {}
        for stage in self.family.stages:
            groups = [group for group in stage if not short.issuperset(group)]
            if self.settings.corrects:
                quantizers = {group[0]: quantized_linear(block, group[0]).quantized_input for group in groups}
                found = moments or self.moments(block, quantizers, inputs, arguments, batches)
                for group in groups:
                    for name in group:
                        layers[name] = self._correct(block, name, weights[name], found[group[0]])
                continue
            totals = {group[0]: HessianSum() for group in groups}
            observers = {name: _shown(block, name, total) for name, total in totals.items()}
            watch_inputs(block, inputs, arguments, observers, batches, self.dtype)
            for group in groups:
                hessian = totals[group[0]].value(self.ranks)
                for name in group:
                    result = gptq(weights[name], hessian, steps[name], self.settings.bits.weight_bits)
                    logger.info("%s: GPTQ with damping %s", name, result.damping)
                    quantized_linear(block, name).rounding = FixedRounding(result.q, steps[name], self.dtype)
                    layers[name] = RoundedLayer(None if result.damping is not None else _NOT_INVERTED)
        return layers

    def moments(
        self,
        block: nn.Module,
        quantizers: Mapping[str, Callable[[Tensor], Tensor]],
        inputs: HiddenStates,
        arguments: dict[str, Any],
        batches: Iterable[slice | Tensor],
    ) -> dict[str, Moments]:
        """Of what ``block`` gives some layers for ``inputs``, and of what their quantizers, by the same names, make of it."""
        totals = {name: MomentSums() for name in quantizers}

        def observer(name: str) -> Callable[[Tensor], None]:
            return lambda x: totals[name](x, quantizers[name](x))

        watch_inputs(block, inputs, arguments, {name: observer(name) for name in totals}, batches, self.dtype)
        return {name: total.value(self.ranks) for name, total in totals.items()}

    def _correct(self, block: nn.Module, name: str, weight: Tensor, moments: Moments) -> RoundedLayer:
        layer, settings = quantized_linear(block, name), self.settings
        bits = settings.bits.weight_bits
        dampings: list[float | None] = []

        def rounded(target: Tensor) -> FixedRounding:
            own_steps = steps_of(target, settings)
            if settings.method != "gptq" and not settings.learns:
                return nearest(target, own_steps, bits)
            result = gptq(target, moments.yy.float(), own_steps, bits)
            dampings.append(result.damping)
            return FixedRounding(result.q, own_steps)

        result = corrected(weight, moments, settings.correction_rank_of(weight.shape), rounded, settings.correction_rounds)
        if result is None:
            return RoundedLayer(_NOT_INVERTED)
        logger.info("%s: corrected, relative error on calibration data %s", name, result.objectives)
        layer.rounding = FixedRounding(*result.rounding.quantized(), self.dtype)
        layer.correct(result.pair.u.to(self.factor_dtype), result.pair.v.to(self.factor_dtype), self.dtype)
        learned = in_cell(result.target, result.rounding) if settings.learns else None
        return RoundedLayer(_NOT_INVERTED if None in dampings else None, learned)


def in_cell(weight: Tensor, rounding: FixedRounding) -> Tensor:
    """The weight [out, in] that is nearest to ``weight`` among those which, rounded to nearest, give the same integers."""
    q, (step, _) = rounding.quantized()
    half = step.repeat_interleave(q.shape[1] // step.shape[1], dim=1) * _HALF_CELL
    return rounding() + (weight - rounding()).clamp(-half, half)


def steps_of(weight: Tensor, settings: QuantizeSettings) -> StepAndZeroPoint:
    """The first steps of a weight [out, in], as the settings say."""
    return search_steps(weight, settings.bits.weight_bits, settings.group_size, symmetric=settings.symmetric)


def steps_of_all(weights: Mapping[str, Tensor], settings: QuantizeSettings) -> dict[str, StepAndZeroPoint]:
    """As :func:`steps_of` each of them. Small weights that are equally wide are searched together: experts are many."""
    steps: dict[str, StepAndZeroPoint] = {}
    waiting: dict[int, list[str]] = {}

    def search(names: list[str]) -> None:
        rows = [len(weights[name]) for name in names]
        found = steps_of(torch.cat([weights[name] for name in names]), settings)
        steps.update(zip(names, map(StepAndZeroPoint, *(part.split(rows) for part in found)), strict=True))

    for name, weight in weights.items():
        together = waiting.setdefault(weight.shape[1], [])
        if together and sum(weights[other].numel() for other in together) + weight.numel() > _SEARCHED_TOGETHER:
            search(together)
            together.clear()
        together.append(name)
    for together in waiting.values():
        search(together)
    return steps


def nearest(weight: Tensor, steps: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32) -> FixedRounding:
    """A weight [out, in] rounded to nearest with these steps [out, groups]."""
    grouped = weight.float().unflatten(1, (steps.step.shape[1], -1))
    q = quantize(grouped, steps.step.unsqueeze(2), steps.zero_point.unsqueeze(2), bits)
    return FixedRounding(q.flatten(1).to(torch.uint8), steps, dtype)


def _shown(block: nn.Module, name: str, total: HessianSum) -> Callable[[Tensor], None]:
    """Shows ``total`` what the layer multiplies with."""
    layer = quantized_linear(block, name)
    return lambda x: total(layer.quantized_input(x))
