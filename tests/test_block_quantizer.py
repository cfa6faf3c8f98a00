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
from lrq_offline.block_learning import run_block
from lrq_offline.block_quantizer import BlockQuantizer, QuantizedBlock
from lrq_offline.config import METHODS, QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.gptq import GptqResult, gptq
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.quantized_block import FakeQuantizedLinear
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
        float_inputs: Tensor | None = None,
        **settings: Any,
    ) -> tuple[nn.Module, QuantizedBlock]:
        """A copy of the block, quantized, and what is told of it. damaged: X_q, where it is not X."""
        block = copy.deepcopy(self.block).to(dtype)
        inputs, targets = HiddenStates(self.inputs, CPU), HiddenStates(torch.empty_like(self.inputs), CPU)
        run_block(block, inputs, targets, self.arguments, 4, dtype)
        quantizer = BlockQuantizer(QuantizeSettings(scheme, method, iters=iters, rank=rank, **settings), FAMILY, CONFIG, dtype)
        inputs = inputs if damaged is None else HiddenStates(damaged, CPU)
        others = None if float_inputs is None else HiddenStates(float_inputs, CPU)
        return block, quantizer.quantize(block, inputs, targets, self.arguments, torch.Generator().manual_seed(0), others)


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
    own = quantized_linears(problem.quantize("w4a4", "gptq", rotate=False, correction_rank=8)[0])
    others = quantized_linears(
        problem.quantize("w4a4", "gptq", rotate=False, correction_rank=8, float_inputs=3 * torch.randn_like(problem.inputs))[0]
    )
    for name, linear in own.items():
        u, other = linear.low_rank_u, others[name].low_rank_u
        assert u is not None and other is not None and u.dtype == torch.bfloat16
        assert not torch.equal(u, other), name


def test_a_layer_that_cannot_be_corrected_is_rounded_and_says_why(problem: Problem) -> None:
    damaged = problem.inputs.clone()
    damaged[0, 0, 0] = float("nan")
    block, result = problem.quantize("w4a4", "gptq", rotate=False, correction_rank=8, damaged=damaged)
    assert all(linear.low_rank_u is None for linear in quantized_linears(block).values())
    assert {layer.fallback for layer in result.layers.values()} == {"its inputs hold NaN or infinite values"}
