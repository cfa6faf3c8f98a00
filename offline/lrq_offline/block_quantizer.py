"""One decoder block from float weights to integers: smooth, find ranges and steps, round or learn."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrq_offline.activation_ranges import best_clip, best_range
from lrq_offline.affine import ActivationQuantizer, activation_quantizer
from lrq_offline.block_learning import LearningResult, LearningWindows, learn_block, windows_at_once
from lrq_offline.compute import served_in
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import Family
from lrq_offline.expert_tokens import TOO_FEW, lend_samples, short_of_tokens
from lrq_offline.experts import Experts, experts_of
from lrq_offline.fused_norms import fused_norms
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.input_rotation import InputRotation
from lrq_offline.layer_inputs import InputSample, sample_inputs, watch_inputs
from lrq_offline.learned_experts import ExpertLayers, LearnedExperts
from lrq_offline.learned_scales import FlexRoundScale, LearnedRounding, LrqScale, Rounding
from lrq_offline.low_rank_correction import MomentSums, by_energy
from lrq_offline.output_metric import PLAIN, OutputMetric
from lrq_offline.quantized_block import (
    fix_weights,
    quantized_linear,
    replace_linears,
)
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_offline.sharded_rounding import ShardedRounding
from lrq_offline.smoothquant import SharedHeads, divide_output, multiply_input, smoothing_scale
from lrq_offline.stage_rounding import RoundedLayer, StageRounding, nearest, steps_of_all
from lrq_offline.weight_transfers import transfers_between
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["BlockQuantizer", "LayerReport", "QuantizedBlock"]

logger = logging.getLogger(__name__)

_SAMPLED_TOKENS = 1024


@dataclass(frozen=True)
class LayerReport:
    """Relative squared error of one layer's output on sampled inputs: rounded to nearest, and in the end. Inputs are quantized
    only where a correction makes up for it.

    fallback: why the layer was only rounded to nearest, although the method does more; None if it was not.
    """

    error_before: float
    error_after: float
    fallback: str | None


@dataclass(frozen=True)
class QuantizedBlock:
    """The outcome. By layer, for schemes that have them, ranges: static input quantizers; clips: ratios of inputs."""

    ranges: Mapping[str, StepAndZeroPoint]
    clips: Mapping[str, Tensor]
    learning: LearningResult
    layers: Mapping[str, LayerReport]


@dataclass(frozen=True)
class BlockQuantizer:
    """What is the same for all blocks of a kind. ``family``: as they have it. ``dtype``: of matrix products (compute.py)."""

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
        float_inputs: HiddenStates | None = None,
        hadamard: InputRotation | None = None,
        metric: OutputMetric = PLAIN,
    ) -> QuantizedBlock:
        """Quantize a float block in place: its linear layers become :class:`FakeQuantizedLinear` with fixed integers.

        inputs: X_q, what the quantized blocks before it produce. targets: block_fp(X), what it should put out. float_inputs:
        X, if blocks are to learn from it, or corrections to be found with its moments. All of this rank's windows; the outcome
        is the same in every rank. hadamard: what rotates inputs in ``block`` already, and has to in the quantized one. metric:
        for what learning lowers.
        """
        for experts in experts_of(block):
            experts.ranks = self.ranks
        samples = self._samples(block, inputs, arguments, generator)
        short = short_of_tokens(self.family, samples)
        lend_samples(self.family, samples, short)
        usable = all(sample.finite for sample in samples.values())
        if usable and self.settings.smooths:
            self._smooth(block, samples, short)
        ranges, clips = self._ranges(block, samples), self._clips(block, samples)
        activations = self._activations(ranges, clips)
        rounding = StageRounding(self.settings, self.family, self.dtype, served_in(self.config), self.ranks)
        # A correction fits the windows that it is found with best: those that say how well a block learns must be new to it.
        learns_corrections = self.settings.learns and self.settings.corrects
        windows = LearningWindows.drawn(len(inputs), generator, self.ranks) if learns_corrections else None
        batches = list(inputs.slices(self._batch_size)) if windows is None else windows.learned_from.split(self._batch_size)
        moments = None
        if usable and float_inputs is not None and self.settings.corrects_from_float:
            quantizers = {group[0]: _in_float32(activations[group[0]]) for group in self.family.linear_groups}
            moments = rounding.moments(block, quantizers, float_inputs, arguments, batches)
        linears = {name: _linear(block, name) for name in self.family.linears}
        weights = {name: linear.weight.detach() for name, linear in linears.items()}
        steps = steps_of_all(weights, self.settings)
        bits = self.settings.bits.weight_bits
        rounded = {name: nearest(weights[name], steps[name], bits, self.dtype) for name in weights}
        replace_linears(block, rounded, activations)
        if hadamard is not None:
            hadamard.install(block)
        before = {name: self._output_error(block, name, weights[name], samples) for name in weights}
        fallbacks = {name: TOO_FEW if name in short else None for name in weights}
        if not usable:
            fallbacks = dict.fromkeys(weights, "its inputs hold NaN or infinite values")
        in_stages: Mapping[str, RoundedLayer] = {}
        if usable and (self.settings.method == "gptq" or self.settings.corrects):
            in_stages = rounding(block, weights, steps, inputs, arguments, batches, short, moments)
            fallbacks |= {name: layer.fallback for name, layer in in_stages.items()}
        learns = usable and self.settings.learns
        if learns:
            learned = {name: weight for name, weight in weights.items() if name not in short}
            self._begin_learning(block, learned, steps, ranges, in_stages, generator)
        learned_from = inputs
        if self.settings.learns_from_float:
            assert float_inputs is not None
            learned_from = float_inputs
        with fused_norms(block, self.family) if learns else nullcontext():
            learning = learn_block(
                block,
                learned_from,
                targets,
                arguments,
                self.settings,
                self.settings.rate(self.config.hidden_size),
                windows or LearningWindows.drawn(len(inputs), generator, self.ranks),
                generator,
                self.dtype,
                self.ranks,
                metric,
            )
        fix_weights(block, self.dtype)
        self._fix_corrections(block, inputs, arguments)
        layers = {}
        for name, weight in weights.items():
            linear = quantized_linear(block, name)
            if not torch.isfinite(linear.rounding()).all():
                linear.rounding, fallbacks[name] = rounded[name], "learning ended in NaN or infinite values"
            after = self._output_error(block, name, weight, samples)
            layers[name] = LayerReport(before[name], after, fallbacks[name])
        return QuantizedBlock(ranges, clips, learning, layers)

    @property
    def _batch_size(self) -> int:
        """Windows of this rank at once."""
        return self.settings.batch_size // self.ranks.size

    def _samples(
        self, block: nn.Module, inputs: HiddenStates, arguments: dict[str, Any], generator: torch.Generator
    ) -> dict[str, InputSample]:
        """By the first layer of each group, of the input that the group reads."""
        places = {group[0]: self.family.seen_at(group) for group in self.family.linear_groups}
        at_once = windows_at_once(block) if experts_of(block) else self._batch_size
        samples = sample_inputs(
            block, inputs, arguments, list(places.values()), _SAMPLED_TOKENS,
            generator, at_once, self.dtype, self.ranks,
        )  # fmt: skip
        return {first: samples[place] for first, place in places.items()}

    def _smooth(self, block: nn.Module, samples: dict[str, InputSample], short: frozenset[str]) -> None:
        """SmoothQuant on every group that has a producer; the samples become those of the smoothed block."""
        activation = self.settings.bits.activation
        activation_bits = 8 if activation is None else activation.bits
        # As a server holds them. 1 + w of a small gain would suffer most.
        stored = served_in(self.config)
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

    def _clips(self, block: nn.Module, samples: Mapping[str, InputSample]) -> dict[str, Tensor]:
        rule = self.settings.bits.activation
        if rule is None or not rule.symmetric:
            return {}
        clips: dict[str, Tensor] = {}
        for group in self.family.linear_groups:
            weight = torch.cat([_linear(block, name).weight.float() for name in group])
            clips |= dict.fromkeys(group, best_clip(samples[group[0]].tokens, weight, rule.bits))
        return clips

    def _activations(
        self, ranges: Mapping[str, StepAndZeroPoint], clips: Mapping[str, Tensor]
    ) -> dict[str, ActivationQuantizer | None]:
        rule = self.settings.bits.activation
        return {name: activation_quantizer(rule, ranges.get(name), clips.get(name)) for name in self.family.linears}

    def _begin_learning(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        steps: Mapping[str, StepAndZeroPoint],
        ranges: Mapping[str, StepAndZeroPoint],
        in_stages: Mapping[str, RoundedLayer],
        generator: torch.Generator,
    ) -> None:
        """Make these layers learn; one with a correction learns that too, and to round what was rounded beside it."""
        in_experts = self._learn_experts_together(block, weights, steps, ranges, generator)
        weights = {name: weight for name, weight in weights.items() if name not in in_experts}
        targets = {name: layer.target for name, layer in in_stages.items() if layer.target is not None}
        steps_of_targets = {name: quantized_linear(block, name).rounding.quantized()[1] for name in targets}
        roundings = self._learned_roundings({**weights, **targets}, {**steps, **steps_of_targets}, generator)
        for name, rounding in roundings.items():
            quantized_linear(block, name).rounding = rounding
        for name in targets:
            quantized_linear(block, name).learn_correction()

    def _learn_experts_together(
        self,
        block: nn.Module,
        weights: Mapping[str, Tensor],
        steps: Mapping[str, StepAndZeroPoint],
        ranges: Mapping[str, StepAndZeroPoint],
        generator: torch.Generator,
    ) -> frozenset[str]:
        """Put one module in the place of a block's experts, in which those with ``weights`` learn. Returns their layers."""
        names, experts = self.family.experts, range(self.family.expert_count)
        learning = [] if names is None else [expert for expert in experts if names.output_of(expert) in weights]
        if names is None or not learning:
            return frozenset()
        order = [*learning, *(expert for expert in experts if expert not in learning)]

        def layers(of_experts: list[str]) -> ExpertLayers:
            learned, decided = of_experts[: len(learning)], of_experts[len(learning) :]
            above_each_other = torch.cat([weights[name] for name in learned])
            their_steps = StepAndZeroPoint(
                *(torch.cat(parts) for parts in zip(*(steps[name] for name in learned), strict=True))
            )
            return ExpertLayers(
                of_experts,
                self._learned_rounding(above_each_other, their_steps, generator, weights=len(learned)),
                [quantized_linear(block, name).rounding for name in decided],
                self.settings.bits.activation,
                [ranges[name] for name in of_experts if name in ranges],
            )

        gate, up = (layers([names.inputs_of(expert)[place] for expert in order]) for place in range(2))
        down = layers([names.output_of(expert) for expert in order])
        apart = block.get_submodule(names.module)
        assert isinstance(apart, Experts)
        block.set_submodule(names.module, LearnedExperts(apart, order, gate, up, down))
        return frozenset(name for kind in (gate, up, down) for name in kind.names)

    def _learned_roundings(
        self, weights: Mapping[str, Tensor], steps: Mapping[str, StepAndZeroPoint], generator: torch.Generator
    ) -> Mapping[str, Rounding]:
        if self.ranks.size > 1:
            transfers_between(self.ranks, next(iter(weights.values())).device).begin_block()
        return {name: self._learned(weight, steps[name], generator) for name, weight in weights.items()}

    def _learned(self, weight: Tensor, steps: StepAndZeroPoint, generator: torch.Generator) -> Rounding:
        own, own_steps = self.ranks.own_rows(weight), StepAndZeroPoint(*map(self.ranks.own_rows, steps))
        learned = self._learned_rounding(own, own_steps, generator, ranks=self.ranks)
        return learned if self.ranks.size == 1 else ShardedRounding(learned, self.ranks)

    def _learned_rounding(
        self,
        weight: Tensor,
        steps: StepAndZeroPoint,
        generator: torch.Generator,
        *,
        weights: int = 1,
        ranks: Ranks = ONE_RANK,
    ) -> LearnedRounding:
        """Of these rows, which are those of one weight that ``ranks`` have, or of several ``weights`` above each other."""
        rank, bits = self.settings.matrix_rank(self.config.hidden_size), self.settings.bits.weight_bits
        if rank is None:
            return FlexRoundScale(weight, steps, bits, self.dtype)
        rank = min(rank, ranks.size * len(weight) // weights, weight.shape[1])
        return LrqScale(
            weight, steps, bits, rank, generator, self.dtype, weights=weights,
            renews=self.settings.renews, fading=self.settings.fading, ranks=ranks,
        )  # fmt: skip

    def _fix_corrections(self, block: nn.Module, inputs: HiddenStates, arguments: dict[str, Any]) -> None:
        """What learned corrections have become, in the order of what their columns add to outputs, and in 16 bits."""
        layers = {name: quantized_linear(block, name) for name in self.family.linears}
        pairs = {name: layer.correction.pair() for name, layer in layers.items() if layer.correction is not None}
        if not pairs:
            return
        inner = {name: MomentSums() for name in pairs}

        def observer(name: str) -> Callable[[Tensor], None]:
            def observe(x: Tensor) -> None:
                z = x.double() @ pairs[name].v
                inner[name](z, z)

            return observe

        observers = {name: observer(name) for name in pairs}
        watch_inputs(block, inputs, arguments, observers, inputs.slices(self._batch_size), self.dtype)
        stored = served_in(self.config)
        for name, pair in pairs.items():
            ordered = by_energy(pair, inner[name].value(self.ranks).xx)
            layers[name].correct(ordered.u.to(stored), ordered.v.to(stored), self.dtype)

    def _output_error(self, block: nn.Module, name: str, weight: Tensor, samples: Mapping[str, InputSample]) -> float:
        """|W_hat x + U V^T x - W x|^2 / |W x|^2 over the sampled tokens x; with a correction, W_hat Q(x)."""
        tokens = samples[next(group[0] for group in self.family.linear_groups if name in group)].tokens
        layer, outputs = quantized_linear(block, name), tokens @ weight.float().T
        x = layer.quantized_input(tokens) if self.settings.corrects else tokens
        found = x @ layer.rounding().float().T
        if layer.low_rank_u is not None and layer.low_rank_v is not None:
            found += tokens @ layer.low_rank_v.float() @ layer.low_rank_u.float().T
        size = outputs.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return ((found - outputs).square().sum() / size).item()


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _in_float32(activation: ActivationQuantizer | None) -> Callable[[Tensor], Tensor]:
    return lambda x: x if activation is None else activation(x, torch.float32)
