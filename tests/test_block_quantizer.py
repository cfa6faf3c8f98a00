"""One Llama block from float to integers: what smoothing undoes, what methods gain, and what becomes of NaN."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lrq_offline import stage_rounding
from lrq_offline.affine import fake_quantize_per_token
from lrq_offline.block_learning import LearningWindows, run_block
from lrq_offline.block_quantizer import BlockQuantizer, QuantizedBlock
from lrq_offline.config import METHODS, QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.gptq import GptqResult, gptq
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.low_rank_correction import Corrected, Moments
from lrq_offline.quantized_block import FakeQuantizedLinear
from lrq_offline.stage_rounding import in_cell, nearest
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

FAMILY = FAMILIES["llama"]
CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, attention_bias=True, dtype="bfloat16", attn_implementation="sdpa",
)  # fmt: skip


@dataclass
class Problem:
    """A float block, its inputs X [8, 16, 64], and the other arguments of its call."""

    block: nn.Module
    inputs: Tensor
    arguments: dict[str, Any]

    def quantize(
        self,
        scheme: str,
        method: str,
        *,
        damaged: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        iters: int = 30,
        rank: int | None = None,
        **settings: Any,
    ) -> tuple[nn.Module, QuantizedBlock]:
        """A copy of the block, quantized, and what is told of it. damaged: X_q, where it is not X."""
        block = copy.deepcopy(self.block).to(dtype)
        inputs, targets = HiddenStates(self.inputs, CPU), HiddenStates(torch.empty_like(self.inputs), CPU)
        run_block(block, inputs, targets, self.arguments, 4, dtype)
        quantizer = BlockQuantizer(QuantizeSettings(scheme, method, iters=iters, rank=rank, **settings), FAMILY, CONFIG, dtype)
        inputs = inputs if damaged is None else HiddenStates(damaged, CPU)
        generator, float_inputs = torch.Generator().manual_seed(0), HiddenStates(self.inputs, CPU)
        return block, quantizer.quantize(block, inputs, targets, self.arguments, generator, float_inputs)


@pytest.fixture
def problem() -> Problem:
    block = LlamaDecoderLayer(CONFIG, 0).float().eval().requires_grad_(False)
    for name, parameter in block.named_parameters():
        value = torch.rand_like(parameter) + 0.5 if "layernorm" in name else torch.randn_like(parameter) * 0.1
        parameter.copy_(value.to(torch.bfloat16))  # what a checkpoint would hold
    # Inputs that go together, as those of real models do.
    inputs = torch.randn(8, 16, 12) @ torch.randn(12, 64) + 0.3 * torch.randn(8, 16, 64)
    rotary = LlamaRotaryEmbedding(config=CONFIG)(inputs[:1], torch.arange(16).unsqueeze(0))
    return Problem(block, inputs, {"position_embeddings": rotary, "attention_mask": None})


def quantized_linears(block: nn.Module) -> dict[str, FakeQuantizedLinear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, FakeQuantizedLinear)}


def with_outlier_channels(block: nn.Module, factor: float, *, after_linears: bool) -> nn.Module:
    """The same function: some channels are multiplied where they are produced and divided where they are read.

    Those of the norms, and with ``after_linears`` also those of v_proj and up_proj.
    """
    block = copy.deepcopy(block)
    attention, mlp = block.self_attn, block.mlp
    for norm, readers in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        norm.weight[[3, 30]] *= factor
        for reader in readers:
            reader.weight[:, [3, 30]] /= factor
    if after_linears:
        # Value head 1, channel 5, which query heads 2 and 3 read.
        attention.v_proj.weight[16 + 5] *= factor
        attention.v_proj.bias[16 + 5] *= factor
        attention.o_proj.weight[:, [2 * 16 + 5, 3 * 16 + 5]] /= factor
        mlp.up_proj.weight[[7, 70]] *= factor
        mlp.down_proj.weight[:, [7, 70]] /= factor
    return block


def test_smoothed_gains_of_a_float32_model_are_exact_in_bfloat16_which_serves_it(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CONFIG, "dtype", torch.float32)
    block, _ = problem.quantize("w8a8", "smoothquant-rtn")
    for before, after in (
        (problem.block.input_layernorm.weight, block.input_layernorm.weight),
        (problem.block.post_attention_layernorm.weight, block.post_attention_layernorm.weight),
    ):
        assert torch.equal(after.bfloat16().float(), after) and not torch.equal(after, before)


# A row of v_proj or up_proj that is 64 times larger takes part in how the inputs of its own layer are smoothed, and costs
# a little there.
@pytest.mark.parametrize(("after_linears", "most"), [(False, 1.01), (True, 1.01)], ids=["norms", "norms and linears"])
def test_outlier_channels_that_leave_the_function_cost_nothing_after_smoothing(
    problem: Problem, after_linears: bool, most: float
) -> None:
    block = with_outlier_channels(problem.block, 64.0, after_linears=after_linears)
    outliers = Problem(block, problem.inputs, problem.arguments)
    outputs = [p.block(p.inputs, **p.arguments) for p in (problem, outliers)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    smoothed, with_outliers, unsmoothed = (
        p.quantize("w8a8", method)[1].learning.error_after
        for p, method in ((problem, "smoothquant-rtn"), (outliers, "smoothquant-rtn"), (outliers, "rtn"))
    )
    assert with_outliers < most * smoothed
    assert unsmoothed > 20 * smoothed


@pytest.mark.parametrize(
    ("scheme", "method"),
    [*(("w8a8", method) for method in METHODS), ("w4a8", "lrq"), ("w3a16", "gptq"), ("w3a16", "flexround")],
)
def test_every_method_ends_with_integers_of_the_schemes_width(problem: Problem, scheme: str, method: str) -> None:
    block, result = problem.quantize(scheme, method, iters=2)
    linears = quantized_linears(block)
    assert set(linears) == set(result.layers) == set(FAMILY.linears)
    for name, linear in linears.items():
        assert isinstance(linear.rounding, FixedRounding)
        q, quantizer = linear.rounding.quantized()
        assert q.dtype == torch.uint8 and 2 ** (int(scheme[1]) - 1) <= int(q.max()) < 2 ** int(scheme[1])
        assert (quantizer.step > 0).all()
        assert result.layers[name].fallback is None
    assert set(result.ranges) == (set(FAMILY.linears) if scheme == "w8a8" else set())
    assert result.learning.steps == (2 if method in ("lrq", "flexround") else 0)


def test_layers_that_a_server_fuses_share_one_range(problem: Problem) -> None:
    ranges = problem.quantize("w8a8", "rtn")[1].ranges
    for group in FAMILY.linear_groups:
        assert len({(ranges[name].step.item(), ranges[name].zero_point.item()) for name in group}) == 1
    assert len({ranges[group[0]].step.item() for group in FAMILY.linear_groups}) == 4


@pytest.mark.parametrize(
    ("method", "scheme", "dtype"),
    [
        ("gptq", "w3a16", torch.bfloat16),
        ("lrq", "w3a16", torch.float32),
        ("lrq", "w4a8", torch.bfloat16),
        ("flexround", "w3a16", torch.float32),
    ],
    ids=str,
)
def test_methods_lower_the_error_of_round_to_nearest(problem: Problem, method: str, scheme: str, dtype: torch.dtype) -> None:
    rounded, better = (problem.quantize(scheme, m, dtype=dtype)[1] for m in ("rtn", method))
    assert better.learning.error_after < 0.85 * rounded.learning.error_after


def test_layers_report_their_own_error_before_and_after(problem: Problem) -> None:
    nearest = problem.quantize("w3a16", "rtn")[1].layers
    assert all(layer.error_before == layer.error_after for layer in nearest.values())
    for name, layer in problem.quantize("w3a16", "gptq")[1].layers.items():
        assert 0 < layer.error_after < layer.error_before == nearest[name].error_before, name


def test_gptq_sees_inputs_as_they_will_be_quantized_and_as_rounded_layers_produce_them(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessians = []

    def recorded(weight: Tensor, hessian: Tensor, steps: StepAndZeroPoint, bits: int) -> GptqResult:
        hessians.append(hessian)
        return gptq(weight, hessian, steps, bits)

    monkeypatch.setattr(stage_rounding, "gptq", recorded)
    block, _ = problem.quantize("w4a8", "gptq")
    seen: dict[str, Tensor] = {}
    for name in FAMILY.linears:
        block.get_submodule(name).register_forward_pre_hook(lambda module, x, name=name: seen.update({name: x[0]}))
    block(problem.inputs, **problem.arguments)
    for name, hessian in zip(FAMILY.linears, hessians, strict=True):
        # In the finished block, what a layer receives is what the layers before it, rounded by then, produced.
        x = fake_quantize_per_token(seen[name].flatten(0, 1), 8)
        torch.testing.assert_close(hessian, 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-3 * hessian.abs().max().item())


def test_the_same_generator_gives_the_same_integers(problem: Problem) -> None:
    first, second = (quantized_linears(problem.quantize("w4a16", "lrq")[0]) for _ in range(2))
    assert all(torch.equal(first[name].rounding.quantized()[0], second[name].rounding.quantized()[0]) for name in first)


def test_a_rank_beyond_a_weights_sides_is_that_of_its_sides(problem: Problem) -> None:
    first, second = (quantized_linears(problem.quantize("w4a16", "lrq", iters=3, rank=rank)[0]) for rank in (96, 1000))
    assert all(torch.equal(first[name].rounding.quantized()[0], second[name].rounding.quantized()[0]) for name in first)


# --- NaN and infinite values in the inputs ---


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("method", ["gptq", "lrq"])
def test_inputs_with_nan_give_round_to_nearest_and_say_so(problem: Problem, method: str, scheme: str) -> None:
    damaged = problem.inputs.clone()
    damaged[2] = torch.nan
    block, result = problem.quantize(scheme, method, damaged=damaged)
    nearest = quantized_linears(problem.quantize(scheme, "rtn")[0])
    for name, linear in quantized_linears(block).items():
        assert torch.equal(linear.rounding.quantized()[0], nearest[name].rounding.quantized()[0])
        assert result.layers[name].fallback == "its inputs hold NaN or infinite values"
    assert result.learning.steps == 0


@pytest.mark.parametrize(
    ("method", "value", "windows"),
    [("rtn", math.nan, 8), ("smoothquant-rtn", math.nan, 1), ("smoothquant-rtn", math.inf, 1), ("lrq", math.inf, 8)],
)
def test_static_ranges_are_usable_whatever_the_inputs_hold(problem: Problem, method: str, value: float, windows: int) -> None:
    damaged = problem.inputs.clone()
    damaged[:windows, -1] = value
    for step, zero_point in problem.quantize("w8a8", method, damaged=damaged)[1].ranges.values():
        assert step.isfinite().all() and (step > 0).all()
        assert (0 <= zero_point).all() and (zero_point <= 255).all()


# --- low-rank corrections ---


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a8", "w3a16"])
def test_a_correction_lowers_what_any_scheme_leaves(problem: Problem, scheme: str, method: str) -> None:
    plain, corrected = (
        problem.quantize(scheme, method, rotate=False, **options)[1] for options in ({}, {"correction_rank": "25%"})
    )
    assert corrected.learning.error_after < 0.8 * plain.learning.error_after
    assert all(layer.error_after < layer.error_before and layer.fallback is None for layer in corrected.layers.values())


def test_a_correction_is_found_with_the_inputs_that_are_asked_for(problem: Problem) -> None:
    own, others = (
        quantized_linears(
            problem.quantize(
                "w4a4", "gptq", rotate=False, correction_rank=8, correction_statistics=of, damaged=problem.inputs.flip(2)
            )[0]
        )
        for of in ("quantized", "float")
    )
    for name, linear in own.items():
        u, other = linear.low_rank_u, others[name].low_rank_u
        assert u is not None and other is not None and u.dtype == torch.bfloat16
        assert not torch.equal(u, other), name


def test_a_block_learns_from_the_inputs_that_are_asked_for(problem: Problem) -> None:
    def learned(**options: Any) -> dict[str, Tensor]:
        block, _ = problem.quantize("w4a16", "lrq", learning_rate=2e-3, **options)
        return {name: linear.rounding.quantized()[0] for name, linear in quantized_linears(block).items()}

    damaged = problem.inputs + 0.5 * torch.randn_like(problem.inputs)
    undamaged, behind, beside = learned(), learned(damaged=damaged), learned(damaged=damaged, learn_inputs="float")
    for name, q in undamaged.items():
        assert torch.equal(beside[name], q) and not torch.equal(behind[name], q), name


def test_a_layer_that_cannot_be_corrected_is_rounded_and_says_why(problem: Problem) -> None:
    damaged = problem.inputs.clone()
    damaged[0, 0, 0] = float("nan")
    block, result = problem.quantize("w4a4", "gptq", rotate=False, correction_rank=8, damaged=damaged)
    assert all(linear.low_rank_u is None for linear in quantized_linears(block).values())
    assert {layer.fallback for layer in result.layers.values()} == {"its inputs hold NaN or infinite values"}


# --- corrections that are learned ---

LEARNED: dict[str, Any] = {"correction_rank": 6, "iters": 60, "learning_rate": 2e-3, "rotate": False}


def other_inputs(problem: Problem) -> Tensor:
    """X_q as bad blocks before would produce it: no layer's own best rounding or correction makes up for that."""
    return problem.inputs + 0.3 * problem.inputs @ torch.randn(64, 64) / 8


def factors_of(linear: FakeQuantizedLinear) -> tuple[Tensor, Tensor]:
    assert linear.low_rank_u is not None and linear.low_rank_v is not None and linear.correction is None
    return linear.low_rank_u, linear.low_rank_v


@pytest.mark.parametrize("method", ["lrq", "flexround"])
@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a8", "w3a16"])
def test_learning_with_a_correction_leaves_less_than_it_starts_with(problem: Problem, scheme: str, method: str) -> None:
    block, result = problem.quantize(scheme, method, damaged=other_inputs(problem), **LEARNED)
    assert result.learning.error_after < 0.98 * result.learning.error_before
    assert all(layer.fallback is None for layer in result.layers.values())
    for u, v in map(factors_of, quantized_linears(block).values()):
        assert u.dtype == v.dtype == torch.bfloat16


def test_learning_that_finds_nothing_better_keeps_gptq_and_its_correction(problem: Problem) -> None:
    gptq_only, learned = (problem.quantize("w3a16", method, **LEARNED) for method in ("gptq", "lrq"))
    assert learned[1].learning.error_after == learned[1].learning.error_before
    assert learned[1].learning.error_after == pytest.approx(gptq_only[1].learning.error_after, rel=0.02)
    # Sums over the windows in another order: a tie may go the other way.
    for name, linear in quantized_linears(learned[0]).items():
        integers = [layer.rounding.quantized()[0] for layer in (linear, quantized_linears(gptq_only[0])[name])]
        assert (integers[0] != integers[1]).float().mean() < 0.01, name


def test_the_correction_and_the_scale_both_learn(problem: Problem) -> None:
    damaged = other_inputs(problem)
    learned, start = (
        quantized_linears(problem.quantize("w4a8", "lrq", damaged=damaged, **{**LEARNED, "learning_rate": rate})[0])
        for rate in (2e-3, 1e-12)
    )
    for name, linear in learned.items():
        assert not torch.equal(linear.rounding(), start[name].rounding()), name
        after, before = (u.float() @ v.float().T for u, v in map(factors_of, (linear, start[name])))
        assert (after - before).norm() > 0.02 * before.norm(), name


def test_what_is_stored_of_a_learned_correction_gives_the_error_that_is_reported(problem: Problem) -> None:
    damaged = other_inputs(problem)
    block, result = problem.quantize("w4a8", "lrq", damaged=damaged, **LEARNED)
    targets, outputs = problem.block(problem.inputs, **problem.arguments), block(damaged, **problem.arguments)
    error = ((outputs - targets).square().sum() / targets.square().sum()).item()
    assert error == pytest.approx(result.learning.error_after, rel=1e-3)


def test_the_columns_of_a_learned_correction_come_in_the_order_of_what_they_add(problem: Problem) -> None:
    damaged = other_inputs(problem)
    block, _ = problem.quantize("w4a8", "lrq", damaged=damaged, **LEARNED)
    seen: dict[str, Tensor] = {}
    for name in FAMILY.linears:
        block.get_submodule(name).register_forward_pre_hook(lambda module, x, name=name: seen.update({name: x[0]}))
    block(damaged, **problem.arguments)
    for name, linear in quantized_linears(block).items():
        u, v = (factor.float() for factor in factors_of(linear))
        inner = seen[name].flatten(0, 1) @ v
        energy = inner.square().sum(dim=0)
        torch.testing.assert_close(u.T @ u, torch.eye(6), rtol=0, atol=2e-2)
        # What the columns add has nothing in common, which makes the first ones the best correction of their number.
        common = inner.T @ inner - energy.diag()
        assert common.abs().max() < 2e-2 * energy[0] and (energy[1:] < 1.01 * energy[:-1]).all(), name


def test_a_correction_that_will_be_learned_is_found_without_the_held_out_windows(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = LearningWindows(torch.tensor([7, 1, 4, 0, 2, 5]), torch.tensor([6, 3]))
    monkeypatch.setattr(LearningWindows, "drawn", lambda *arguments: windows)
    original = stage_rounding.corrected
    x = problem.block.input_layernorm(problem.inputs).double()
    for method, rows in (("gptq", slice(None)), ("lrq", windows.learned_from)):
        seen: list[Tensor] = []

        def recorded(weight: Tensor, moments: Moments, *others: Any, seen: list[Tensor] = seen) -> Corrected | None:
            seen.append(moments.xx)
            return original(weight, moments, *others)

        monkeypatch.setattr(stage_rounding, "corrected", recorded)
        problem.quantize("w4a8", method, **{**LEARNED, "iters": 2})
        expected = x[rows].flatten(0, 1).T @ x[rows].flatten(0, 1)
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_within_its_cells_rounds_to_the_integers_that_were_chosen(bits: int, groups: int) -> None:
    weight = torch.randn(16, 32) * torch.logspace(-4, 4, 16).unsqueeze(1)
    steps = search_steps(weight, bits, 32 // groups)
    q = (nearest(weight, steps, bits).quantized()[0].int() + torch.randint(-2, 3, weight.shape)).clamp(0, 2**bits - 1)
    chosen = FixedRounding(q.to(torch.uint8), steps)
    moved = in_cell(weight, chosen)
    assert torch.equal(nearest(moved, steps, bits).quantized()[0], chosen.quantized()[0])
    step = steps.step.repeat_interleave(32 // groups, dim=1)
    near = (weight - chosen()).abs() < 0.25 * step
    torch.testing.assert_close(moved[near], weight[near])
    assert near.any() and not near.all()


def test_the_same_generator_gives_the_same_learned_correction(problem: Problem) -> None:
    damaged = other_inputs(problem)
    first, second = (quantized_linears(problem.quantize("w4a8", "lrq", damaged=damaged, **LEARNED)[0]) for _ in range(2))
    for name, linear in first.items():
        assert all(map(torch.equal, factors_of(linear), factors_of(second[name]))), name


def test_inputs_with_nan_leave_a_block_without_a_learned_correction(problem: Problem) -> None:
    damaged = problem.inputs.clone()
    damaged[2] = torch.nan
    block, result = problem.quantize("w4a8", "lrq", damaged=damaged, **LEARNED)
    assert all(linear.low_rank_u is None and not list(linear.parameters()) for linear in quantized_linears(block).values())
    assert result.learning.steps == 0
