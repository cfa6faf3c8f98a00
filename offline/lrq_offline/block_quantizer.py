"""One decoder block from float weights to integers: smooth, find ranges and steps, round or learn."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrq_offline.activation_ranges import best_range
from lrq_offline.block_learning import LearningResult, learn_block
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import Family
from lrq_offline.expert_tokens import TOO_FEW, lend_samples, short_of_tokens
from lrq_offline.gptq import HessianSum, gptq
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.layer_inputs import InputSample, sample_inputs, watch_inputs
from lrq_offline.learned_scales import FixedRounding, FlexRoundScale, LearnedRounding, LrqScale, Rounding
from lrq_offline.quantized_block import (
    ActivationQuantizer,
    FakeQuantizedLinear,
    activation_quantizer,
    fix_weights,
    replace_linears,
)
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_offline.sharded_rounding import ShardedRounding
from lrq_offline.smoothquant import SharedHeads, divide_output, multiply_input, smoothing_scale
from lrq_offline.step_search import search_steps
from lrq_offline.weight_transfers import transfers_between
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, quantize

__all__ = ["BlockQuantizer", "LayerReport", "QuantizedBlock"]

logger = logging.getLogger(__name__)

_SAMPLED_TOKENS = 1024


@dataclass(frozen=True)
class LayerReport:
    """Relative squared error of one layer's output on sampled inputs: rounded to nearest, and in the end.

    fallback: why the layer was only rounded to nearest, although the method does more; None if it was not.
    """

    error_before: float
    error_after: float
    fallback: str | None


@dataclass(frozen=True)
class QuantizedBlock:
    """The outcome. ``ranges``: each layer's static input quantizer, for schemes that have one."""

    ranges: Mapping[str, StepAndZeroPoint]
    learning: LearningResult
    layers: Mapping[str, LayerReport]


@dataclass(frozen=True)
class BlockQuantizer:
    """What is the same for all blocks of a run. ``dtype``: of matrix products (compute.py)."""

    settings: QuantizeSettings
    family: Family
    config: PreTrainedConfig
    dtype: torch.dtype
    ranks: Ranks = ONE_RANK

    def quantize(
        self,
        block: nn.Module,
        inputs: HiddenStates,
        targets: HiddenStates,
        arguments: dict[str, Any],
        generator: torch.Generator,
    ) -> QuantizedBlock:
        """Quantize a float block in place: its linear layers become :class:`FakeQuantizedLinear` with fixed integers.

        inputs: X_q, what the quantized blocks before it produce. targets: block_fp(X), what it should put out. Both of this
        rank's windows; the outcome is the same in every rank.
        """
        samples = self._samples(block, inputs, arguments, generator)
        short = short_of_tokens(self.family, samples)
        lend_samples(self.family, samples, short)
        usable = all(sample.finite for sample in samples.values())
        if usable and self.settings.smooths:
            self._smooth(block, samples, short)
        ranges = self._ranges(block, samples)
        linears = {name: _linear(block, name) for name in self.family.linears}
        weights = {name: linear.weight.detach() for name, linear in linears.items()}
        steps = {name: self._steps(weight) for name, weight in weights.items()}
        nearest = {name: self._nearest(weights[name], steps[name]) for name in weights}
        replace_linears(block, nearest, self._activations(ranges))
        fallbacks = {name: TOO_FEW if name in short else None for name in weights}
        if not usable:
            fallbacks = dict.fromkeys(weights, "its inputs hold NaN or infinite values")
        if usable:
            if self.settings.method == "gptq":
                fallbacks |= self._round_by_gptq(block, weights, steps, inputs, arguments, short)
            if self.settings.learns:
                learned = {name: weight for name, weight in weights.items() if name not in short}
                for name, rounding in self._learned_roundings(learned, steps, generator).items():
                    _quantized_linear(block, name).rounding = rounding
        learning = learn_block(
            block,
            inputs,
            targets,
            arguments,
            self.settings,
            self.settings.rate(self.config.hidden_size),
            generator,
            self.dtype,
            self.ranks,
        )
        fix_weights(block, self.dtype)
        layers = {}
        for group in self.family.linear_groups:
            for name in group:
                linear = _quantized_linear(block, name)
                if not torch.isfinite(linear.rounding()).all():
                    linear.rounding, fallbacks[name] = nearest[name], "learning ended in NaN or infinite values"
                tokens, weight = samples[group[0]].tokens, weights[name].float()
                layers[name] = LayerReport(
                    _output_error(tokens, weight, nearest[name]),
                    _output_error(tokens, weight, linear.rounding),
                    fallbacks[name],
                )
        return QuantizedBlock(ranges, learning, layers)

    def _samples(
        self, block: nn.Module, inputs: HiddenStates, arguments: dict[str, Any], generator: torch.Generator
    ) -> dict[str, InputSample]:
        """By the first layer of each group, of the input that the group reads."""
        places = {group[0]: self.family.seen_at(group) for group in self.family.linear_groups}
        samples = sample_inputs(
            block, inputs, arguments, list(places.values()), _SAMPLED_TOKENS,
            generator, self.settings.batch_size // self.ranks.size, self.dtype, self.ranks,
        )  # fmt: skip
        return {first: samples[place] for first, place in places.items()}

    def _smooth(self, block: nn.Module, samples: dict[str, InputSample], short: frozenset[str]) -> None:
        """SmoothQuant on every group that has a producer; the samples become those of the smoothed block."""
        activation = self.settings.bits.activation
        activation_bits = 8 if activation is None else activation.bits
        # As a server holds them: a float32 model's too, which it runs in bfloat16. 1 + w of a small gain would suffer most.
        stored = torch.float16 if self.config.dtype == torch.float16 else torch.bfloat16
        # From the last to the first: smoothing what a layer puts out changes the weights by which its own input is smoothed.
        for group, producer_name in reversed(list(zip(self.family.linear_groups, self.family.producers, strict=True))):
            if producer_name is None:
                continue  # nobody's output alone: what would be divided is the residual stream
            sample, producer = samples[group[0]], block.get_submodule(producer_name)
            if short.issuperset(group):
                continue
            linears = [_linear(block, name) for name in group]
            stacked = torch.cat([linear.weight.float() for linear in linears])
            heads = self._shared_heads if group[0] == self.family.attention_output else SharedHeads()
            scale = smoothing_scale(sample, stacked, heads, self.settings.bits.weight_bits, activation_bits)
            scale = heads.repeated(divide_output(producer, heads.once(scale), stored, self.family.gain_offset))
            for linear in linears:
                multiply_input(linear, scale)
            for name in self.family.also_reads(group):
                multiply_input(block.get_submodule(name), scale, stored)
            sample.divide(scale)

    @property
    def _shared_heads(self) -> SharedHeads:
        heads = self.config.num_attention_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        return SharedHeads(heads // self.config.num_key_value_heads, size)

    def _ranges(self, block: nn.Module, samples: Mapping[str, InputSample]) -> dict[str, StepAndZeroPoint]:
        rule = self.settings.bits.activation
        if rule is None or not rule.static:
            return {}
        ranges: dict[str, StepAndZeroPoint] = {}
        for group in self.family.linear_groups:
            sample = samples[group[0]]
            weight = torch.cat([_linear(block, name).weight.float() for name in group])
            found = best_range(sample.tokens, sample.low.min(), sample.high.max(), weight, rule.bits)
            ranges |= dict.fromkeys(group, found)
        return ranges

    def _activations(self, ranges: Mapping[str, StepAndZeroPoint]) -> dict[str, ActivationQuantizer | None]:
        return {name: activation_quantizer(self.settings.bits.activation, ranges.get(name)) for name in self.family.linears}

    def _steps(self, weight: Tensor) -> StepAndZeroPoint:
        return search_steps(weight, self.settings.bits.weight_bits, self.settings.group_size, symmetric=self.settings.symmetric)

    def _nearest(self, weight: Tensor, steps: StepAndZeroPoint) -> FixedRounding:
        grouped = weight.float().unflatten(1, (steps.step.shape[1], -1))
        q = quantize(grouped, steps.step.unsqueeze(2), steps.zero_point.unsqueeze(2), self.settings.bits.weight_bits)
        return FixedRounding(q.flatten(1).to(torch.uint8), steps, self.dtype)

    def _learned_roundings(
        self, weights: Mapping[str, Tensor], steps: Mapping[str, StepAndZeroPoint], generator: torch.Generator
    ) -> Mapping[str, Rounding]:
        if self.ranks.size > 1:
            transfers_between(self.ranks, next(iter(weights.values())).device).begin_block()
        return {name: self._learned(weight, steps[name], generator) for name, weight in weights.items()}

    def _learned(self, weight: Tensor, steps: StepAndZeroPoint, generator: torch.Generator) -> Rounding:
        rank, bits = self.settings.matrix_rank(self.config.hidden_size), self.settings.bits.weight_bits
        own, own_steps = self.ranks.own_rows(weight), StepAndZeroPoint(*map(self.ranks.own_rows, steps))
        learned: LearnedRounding
        if rank is None:
            learned = FlexRoundScale(own, own_steps, bits, self.dtype)
        else:
            rank, renews = min(rank, *weight.shape), self.settings.renews
            learned = LrqScale(own, own_steps, bits, rank, generator, self.dtype, renews=renews, ranks=self.ranks)
        return learned if self.ranks.size == 1 else ShardedRounding(learned, self.ranks)

    def _round_by_gptq(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        steps: Mapping[str, StepAndZeroPoint],
        inputs: HiddenStates,
        arguments: dict[str, Any],
        short: frozenset[str],
    ) -> dict[str, str | None]:
        """GPTQ stage by stage, each on the inputs that the layers before it, already rounded, produce.

        By layer that is not ``short`` of tokens: why it was rounded to nearest instead (None: it was not).
        """
        fallbacks: dict[str, str | None] = {}
        for stage in self.family.stages:
            groups = [group for group in stage if not short.issuperset(group)]
            totals = {group[0]: HessianSum() for group in groups}
            observers = {name: _of_quantized(_quantized_linear(block, name), total) for name, total in totals.items()}
            watch_inputs(block, inputs, arguments, observers, self.settings.batch_size // self.ranks.size, self.dtype)
            for group in groups:
                hessian = totals[group[0]].value(self.ranks)
                for name in group:
                    result = gptq(weights[name], hessian, steps[name], self.settings.bits.weight_bits)
                    logger.info("%s: GPTQ with damping %s", name, result.damping)
                    _quantized_linear(block, name).rounding = FixedRounding(result.q, steps[name], self.dtype)
                    fallbacks[name] = None if result.damping is not None else "its inputs' Hessian could not be inverted"
        return fallbacks


def _quantized_linear(block: nn.Module, name: str) -> FakeQuantizedLinear:
    linear = block.get_submodule(name)
    assert isinstance(linear, FakeQuantizedLinear)
    return linear


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _of_quantized(layer: FakeQuantizedLinear, observer: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Shows the observer what the layer multiplies with."""
    return lambda x: observer(layer.quantized_input(x))


def _output_error(tokens: Tensor, weight: Tensor, rounding: Rounding) -> float:
    """|(W_hat - W) x|^2 / |W x|^2 over the sampled tokens."""
    error = (tokens @ (rounding().float() - weight).T).square().sum()
    return (error / (tokens @ weight.T).square().sum().clamp(min=torch.finfo(torch.float32).tiny)).item()
