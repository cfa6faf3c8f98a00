"""Quantizers and what is learned about them, against the formulas of LRQ, FlexRound and the number format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrq_offline.affine import fake_quantize, fake_quantize_per_token, straight_through_round
from lrq_offline.config import QuantizeSettings, default_learning_rate
from lrq_offline.learned_scales import FlexRoundScale, FrozenRounding, LearnedRounding, LrqScale
from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import (
    StepAndZeroPoint,
    dequantize,
    quantize,
    step_and_zero_point,
    token_step_and_zero_point,
)
from lrq_vllm.checkpoint.schema import Manifest, WeightFormat
from lrq_vllm.errors import SettingsError

# --- the number format ---


def test_rounding_is_to_nearest_with_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.49, -0.5, -1.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(8.0), 4).tolist() == [8, 10, 10, 11, 8, 6]


# Multiples of 2^-20: a step that is too small for float32's full precision rounds coarsely.
@given(bits=st.sampled_from([2, 3, 4, 8]), low=st.integers(-(2**30), 2**30), size=st.integers(0, 2**30))
def test_a_range_is_covered_to_within_half_a_step_and_zero_is_exact(bits: int, low: int, size: int) -> None:
    ends = torch.tensor([low, low + size]) / 2**20
    quantizer = step_and_zero_point(ends[0], ends[1], bits)
    x = torch.cat([ends, torch.zeros(1), torch.linspace(0, 1, 50) * (ends[1] - ends[0]) + ends[0]])
    x_hat = dequantize(quantize(x, *quantizer, bits), *quantizer)
    # The quotient x / step is rounded to float32: an error of 2^bits * 2^-24 steps.
    assert ((x - x_hat).abs() <= quantizer.step * (0.5 + 2**bits * 2**-23)).all()
    assert x_hat[2] == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_of_nothing_gets_a_step_that_divides(symmetric: bool) -> None:
    step, zero_point = step_and_zero_point(torch.zeros(2), torch.zeros(2), 4, symmetric=symmetric)
    assert step.tolist() == [1, 1] and zero_point.tolist() == ([8, 8] if symmetric else [0, 0])


# --- fake quantization ---

# Step 1/2 and zero-point 4 on the grid 0 .. 15: x from -2 to 5.5, and a quarter beyond by rounding.
QUARTER_GRID = StepAndZeroPoint(torch.tensor(0.5), torch.tensor(4.0))


def test_fake_quantize_is_quantize_and_dequantize() -> None:
    x = torch.randn(9, 33) * 3
    assert torch.equal(fake_quantize(x, QUARTER_GRID, 4), dequantize(quantize(x, *QUARTER_GRID, 4), *QUARTER_GRID))


@pytest.mark.parametrize(
    ("x", "gradient"), [(0.3, 1), (-2.0, 1), (5.5, 1), (-2.2, 1), (5.7, 1), (-2.3, 0), (5.8, 0), (-1e5, 0), (1e5, 0)]
)
def test_fake_quantize_has_gradient_one_inside_the_range_and_none_where_it_clamps(x: float, gradient: float) -> None:
    values = torch.tensor([x], requires_grad=True)
    fake_quantize(values, QUARTER_GRID, 4).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [gradient]


def test_straight_through_rounding_rounds_exactly_and_passes_gradients() -> None:
    x = (torch.randn(1000) * torch.logspace(-3, 6, 1000)).requires_grad_()
    rounded = straight_through_round(x)
    rounded.sum().backward()
    assert torch.equal(rounded, x.detach().round())
    assert torch.equal(x.grad, torch.ones(1000))


def test_fake_quantize_per_token_gives_every_token_its_own_range() -> None:
    x = torch.randn(2, 5, 33) * torch.logspace(-2, 2, 5).unsqueeze(1)
    quantizer = token_step_and_zero_point(x.view(10, 33), 8)
    expected = dequantize(quantize(x.view(10, 33), *quantizer, 8), *quantizer).view_as(x)
    assert torch.equal(fake_quantize_per_token(x, 8), expected)


def test_fake_quantize_per_token_passes_gradients_through_as_if_the_step_were_fixed() -> None:
    x = torch.randn(2, 5, 33, requires_grad=True)
    factors = torch.randn(2, 5, 33)
    (fake_quantize_per_token(x, 8) * factors).sum().backward()
    torch.testing.assert_close(x.grad, factors, rtol=1e-6, atol=0)


# --- the step search ---


def search_error(weight: Tensor, quantizer: StepAndZeroPoint, bits: int) -> Tensor:
    """sum |W - W_hat|^2.4 of each group, [out, groups]."""
    step, zero_point = (tensor.unsqueeze(2) for tensor in quantizer)
    grouped = weight.unflatten(1, (step.shape[1], -1))
    return (dequantize(quantize(grouped, step, zero_point, bits), step, zero_point) - grouped).abs().pow(2.4).sum(dim=2)


def weight_with_outliers(out_features: int = 12, in_features: int = 96) -> Tensor:
    return torch.randn(out_features, in_features) + 10 * (torch.rand(out_features, in_features) > 0.99)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_steps_are_never_worse_than_the_whole_range(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight = weight_with_outliers()
    low, high = torch.aminmax(weight.unflatten(1, (-1, group_size or 96)), dim=2)
    whole = step_and_zero_point(low, high, bits, symmetric=symmetric)
    searched = search_steps(weight, bits, group_size, symmetric=symmetric)
    assert (search_error(weight, searched, bits) <= search_error(weight, whole, bits)).all()


def test_searched_steps_clip_an_outlier_that_costs_too_much() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 200), torch.tensor([3.0])]).unsqueeze(0)
    whole = step_and_zero_point(torch.tensor([[-1.0]]), torch.tensor([[3.0]]), 3)
    searched = search_steps(weight, 3)
    assert searched.step < whole.step
    assert search_error(weight, searched, 3) < 0.9 * search_error(weight, whole, 3)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_searched_steps_recover_a_weight_that_lies_on_a_grid(bits: int) -> None:
    q = torch.randint(0, 2**bits, (6, 64)).float()
    q[:, 0], q[:, 1] = 0, 2**bits - 1
    step, zero_point = torch.logspace(-6, 4, 6, base=2).unsqueeze(1), torch.arange(1.0, 7.0).unsqueeze(1)
    weight = dequantize(q, step, zero_point)
    searched = search_steps(weight, bits)
    assert torch.equal(searched.step, step) and torch.equal(searched.zero_point, zero_point)
    assert torch.equal(quantize(weight, *searched, bits), q)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
def test_searched_steps_of_a_row_of_zeros_give_zeros(symmetric: bool) -> None:
    weight = torch.randn(3, 64)
    weight[1] = 0
    quantizer = search_steps(weight, 4, 32, symmetric=symmetric)
    step, zero_point = (tensor.repeat_interleave(32, dim=1) for tensor in quantizer)
    restored = dequantize(quantize(weight, step, zero_point, 4), step, zero_point)
    assert (quantizer.step > 0).all() and restored.isfinite().all() and (restored[1] == 0).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_symmetric_steps_have_the_zero_point_in_the_middle(bits: int) -> None:
    assert (search_steps(weight_with_outliers(), bits, symmetric=True).zero_point == 2 ** (bits - 1)).all()


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (96, 1), (48, 2), (32, 3)])
def test_every_group_has_the_step_that_it_would_have_alone(group_size: int | None, groups: int) -> None:
    weight = weight_with_outliers()
    step, zero_point = search_steps(weight, 4, group_size)
    assert step.shape == zero_point.shape == (12, groups)
    for group, part in enumerate(weight.chunk(groups, dim=1)):
        alone = search_steps(part, 4)
        assert torch.equal(step[:, group : group + 1], alone.step)
        assert torch.equal(zero_point[:, group : group + 1], alone.zero_point)


def test_the_search_leaves_the_weight_as_it_was() -> None:
    weight = weight_with_outliers()
    before = weight.clone()
    search_steps(weight, 4)
    assert torch.equal(weight, before)


# --- learned rounding ---


def lrq(weight: Tensor, initial: StepAndZeroPoint, bits: int, rank: int = 4) -> LrqScale:
    return LrqScale(weight, initial, bits, rank, torch.Generator().manual_seed(0))


def randomised(rounding: LearnedRounding, size: float = 0.05) -> LearnedRounding:
    """The same after some imagined learning: every parameter moved."""
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return rounding


METHODS: dict[str, Callable[..., LearnedRounding]] = {"rtn": FrozenRounding, "flexround": FlexRoundScale, "lrq": lrq}
LEARNING = ["flexround", "lrq"]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("method", LEARNING)
def test_learning_starts_at_round_to_nearest(method: str, bits: int, group_size: int | None) -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, bits, group_size)
    start, nearest = METHODS[method](weight, initial, bits), FrozenRounding(weight, initial, bits)
    assert torch.equal(start(), nearest())
    assert torch.equal(start.quantized()[0], nearest.quantized()[0])


@pytest.mark.parametrize("method", METHODS)
def test_round_to_nearest_is_the_number_format_at_the_searched_steps(method: str) -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, 4)
    q, quantizer = METHODS[method](weight, initial, 4).quantized()
    assert torch.equal(q, quantize(weight, *initial, 4).to(torch.uint8))
    torch.testing.assert_close(quantizer.step, initial.step, rtol=1e-6, atol=0)
    assert torch.equal(quantizer.zero_point, initial.zero_point)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_learned_with_is_what_is_stored(method: str, group_size: int | None) -> None:
    weight = weight_with_outliers()
    rounding = randomised(METHODS[method](weight, search_steps(weight, 4, group_size), 4))
    q, (step, zero_point) = rounding.quantized()
    assert q.dtype == torch.uint8 and q.max() <= 15
    grouped = q.unflatten(1, (step.shape[1], -1))
    assert torch.equal(rounding(), dequantize(grouped, step.unsqueeze(2), zero_point.unsqueeze(2)).flatten(1))


def test_rounding_decisions_do_not_depend_on_autocast() -> None:
    weight = weight_with_outliers(64, 256)
    rounding = randomised(lrq(weight, search_steps(weight, 4), 4, rank=16), size=0.1)
    outside, (q, _) = rounding(), rounding.quantized()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rounding(), outside)
        assert torch.equal(rounding.quantized()[0], q)


def test_lrq_scale_is_low_rank_matrix_plus_row_plus_column() -> None:
    weight = weight_with_outliers()
    scale = randomised(lrq(weight, search_steps(weight, 4), 4))
    expected = scale.left @ scale.right + scale.row + scale.column
    assert torch.equal(scale.log_scale(), expected) and expected.shape == weight.shape


def test_flexround_scale_is_a_matrix_plus_a_column_of_one_value_per_row() -> None:
    weight = weight_with_outliers()
    scale = randomised(FlexRoundScale(weight, search_steps(weight, 4), 4))
    assert torch.equal(scale.log_scale(), scale.matrix + scale.row) and scale.row.shape == (12, 1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("method", LEARNING)
def test_learned_weights_follow_the_formula(method: str, bits: int) -> None:
    weight = weight_with_outliers()
    rounding = randomised(METHODS[method](weight, search_steps(weight, bits), bits))
    parts = {name: parameter.detach().double() for name, parameter in rounding.named_parameters()}
    if method == "lrq":
        log_scale = parts["left"] @ parts["right"] + parts["row"] + parts["column"]
    else:
        log_scale = parts["matrix"] + parts["row"]
    # W_hat = s1 (clamp(round(W / (s1 exp(S2))) + z, 0, 2^b - 1) - z), here in float64
    s1, z = parts["log_step"].exp().squeeze(2), rounding.zero_point.double().squeeze(2)
    q = torch.clamp(torch.round(weight.double() / (s1 * torch.exp(log_scale))) + z, 0, 2**bits - 1)
    assert torch.equal(rounding.quantized()[0].double(), q)
    torch.testing.assert_close(rounding(), (s1 * (q - z)).float())


@pytest.mark.parametrize("method", LEARNING)
def test_learning_reaches_every_parameter(method: str) -> None:
    weight = weight_with_outliers()
    rounding = randomised(METHODS[method](weight, search_steps(weight, 4), 4))
    (rounding() * torch.randn_like(weight)).sum().backward()
    for name, parameter in rounding.named_parameters():
        # Elements that are clamped have no gradient in FlexRound's matrix.
        assert parameter.grad is not None and (parameter.grad != 0).float().mean() > 0.95, name


def test_nothing_is_learned_by_round_to_nearest() -> None:
    weight = weight_with_outliers()
    assert not any(parameter.requires_grad for parameter in FrozenRounding(weight, search_steps(weight, 4), 4).parameters())


def test_gradients_are_those_of_the_formula_with_rounding_passed_straight_through() -> None:
    weight = weight_with_outliers()
    rounding = randomised(FlexRoundScale(weight, search_steps(weight, 3), 3))
    factors = torch.randn_like(weight)
    (rounding() * factors).sum().backward()
    step, zero_point = rounding.log_step.detach().exp().squeeze(2), rounding.zero_point.squeeze(2)
    scaled = weight * torch.exp(-rounding.log_scale().detach())  # W / exp(S2)
    unclamped = torch.round(scaled / step) + zero_point
    inside = (unclamped >= 0) & (unclamped <= 7)
    assert not inside.all()
    # d W_hat / d S2 = -W / exp(S2) inside the range, 0 outside;  d W_hat / d log s1 = W_hat less that of the quotient.
    by_scale = torch.where(inside, -scaled, 0)
    torch.testing.assert_close(rounding.matrix.grad, factors * by_scale)
    by_log_step = (factors * (rounding().detach() + by_scale)).sum(dim=1)
    torch.testing.assert_close(rounding.log_step.grad.flatten(), by_log_step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "used"), [(1, 1), (5, 5), (12, 12), (13, 12), (1000, 12)])
def test_lrq_rank_is_capped_by_the_sides_of_the_weight(rank: int, used: int) -> None:
    weight = weight_with_outliers()
    scale = lrq(weight, search_steps(weight, 4), 4, rank)
    assert (tuple(scale.left.shape), tuple(scale.right.shape)) == ((12, used), (used, 96))


def test_lrq_starts_from_its_generator_alone() -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, 4)
    first = lrq(weight, initial, 4).right.clone()
    torch.manual_seed(1)
    assert torch.equal(first, lrq(weight, initial, 4).right)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_zeros_stays_zero_through_learning(method: str) -> None:
    weight = weight_with_outliers()
    weight[3] = 0
    rounding = randomised(METHODS[method](weight, search_steps(weight, 4), 4))
    assert rounding().isfinite().all() and (rounding()[3] == 0).all()


def test_a_few_steps_of_learning_lower_the_error_of_the_product() -> None:
    # Inputs that go together: for independent ones round-to-nearest is the best there is.
    weight, x = torch.randn(12, 32), torch.randn(200, 8) @ torch.randn(8, 32)
    rounding = lrq(weight, search_steps(weight, 3), 3, rank=8)
    optimizer = torch.optim.Adam(rounding.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (x @ (rounding() - weight).t()).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert min(errors[-10:]) < 0.8 * errors[0]


# --- settings ---

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "w2a16"}, "scheme 'w2a16'"),
    ({"method": "gptq"}, "method 'gptq'"),
    ({"iters": 0}, "iters is 0"),
    ({"samples": 0}, "samples is 0"),
    ({"seq_len": 1}, "seq-len is 1"),
    ({"batch_size": -2}, "batch-size is -2"),
    ({"rank": 0}, "rank is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"learning_rate": 0.0}, "lr is 0.0"),
    ({"learning_rate": 1.0}, "lr is 1.0"),
    ({"learning_rate": float("nan")}, "lr is nan"),
    ({"group_size": 0}, "group-size is 0"),
    ({"group_size": -32}, "group-size is -32"),
    ({"group_size": 48}, "group-size is 48"),
    ({"scheme": "w4a8", "group_size": 32}, "group-size is only served for 16-bit activations, not for w4a8"),
    ({"scheme": "w8a8", "group_size": 32}, "group-size is only served for 16-bit activations, not for w8a8"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_SETTINGS)
def test_settings_refuse_a_bad_value_by_its_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        QuantizeSettings(**{"scheme": "w4a16", **changes})
    assert words in str(error.value)


def test_settings_name_all_problems_at_once() -> None:
    with pytest.raises(SettingsError, match=r"iters is 0.*rank is -1.*lr is 2.*group-size is 5"):
        QuantizeSettings("w3a16", iters=0, rank=-1, learning_rate=2, group_size=5)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16", "w3a16"])
def test_every_scheme_has_settings_that_need_nothing_else(scheme: str) -> None:
    bits = int(scheme[1])
    assert QuantizeSettings(scheme).weight_format == WeightFormat(bits, symmetric=False, group_size=None)


def test_learning_rates_are_the_papers_at_its_width_and_larger_for_narrow_models() -> None:
    # The scripts of LRQ's authors for 4096-wide models.
    rates = {scheme: default_learning_rate("lrq", scheme, 4096) for scheme in ("w8a8", "w4a8", "w4a16", "w3a16")}
    assert rates == {"w8a8": 5e-4, "w4a8": 5e-4, "w4a16": 9e-4, "w3a16": 6e-4}
    assert default_learning_rate("lrq", "w4a16", 1024) == 2 * 9e-4
    assert default_learning_rate("flexround", "w4a16", 1024) == 3e-3


# --- the output folder ---


def quantized_folder(folder: Path) -> Path:
    folder.mkdir()
    manifest = Manifest("w4a16", WeightFormat(4), {"m": (2, 64)}, (), "0.1.0")
    (folder / "config.json").write_text(json.dumps({"quantization_config": manifest.to_dict()}))
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("output", [".", "..", "../../models/tiny"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_holds_the_model_is_refused(model: Path, output: str, overwrite: bool) -> None:
    with pytest.raises(SettingsError, match="is or contains the model"):
        check_output(model / output, model, overwrite=overwrite)


def test_an_output_that_is_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SettingsError, match="out exists and is a file"):
        check_output(tmp_path / "out", model, overwrite=True)


def test_an_output_with_something_in_it_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"out exists and is not empty.*--overwrite"):
        check_output(quantized_folder(tmp_path / "out"), model, overwrite=False)


@pytest.mark.parametrize("config", [None, "{}", "no JSON", '{"quantization_config": {"quant_method": "gptq"}}'])
def test_overwriting_stops_at_what_is_no_checkpoint_of_ours(model: Path, tmp_path: Path, config: str | None) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").touch()
    if config is not None:
        (output / "config.json").write_text(config)
    with pytest.raises(SettingsError, match="out holds something other than an LRQ checkpoint"):
        check_output(output, model, overwrite=True)


def test_a_new_an_empty_and_an_overwritable_output_are_accepted(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "new", model, overwrite=False)
    check_output(tmp_path / "empty", model, overwrite=False)
    check_output(quantized_folder(tmp_path / "out"), model, overwrite=True)


def test_a_new_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        (folder / "a").write_text("new")
        assert not output.exists()
    assert files_of(output.parent) == ["out"] and files_of(output) == ["a"]


def test_a_new_folder_leaves_nothing_behind_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert files_of(tmp_path) == []


def test_a_new_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    output = quantized_folder(tmp_path / "out")
    with new_folder(output) as folder:
        (folder / "a").write_text("new")
    assert files_of(tmp_path) == ["out"] and files_of(output) == ["a"]


def test_the_old_folder_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    output = quantized_folder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), new_folder(output):
        raise ZeroDivisionError
    assert files_of(tmp_path) == ["out"] and files_of(output) == ["config.json"]


def test_what_a_killed_run_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "shard-00001.partial").touch()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert files_of(tmp_path) == ["out"] and files_of(tmp_path / "out") == ["a"]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="file/out cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass


def test_a_link_to_an_empty_folder_can_be_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_output(tmp_path / "out", model, overwrite=False)
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert files_of(tmp_path / "out") == ["a"]


def test_the_current_folder_can_be_filled_when_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with new_folder(Path(".")) as folder:
        (folder / "a").touch()
    assert files_of(tmp_path / "out") == ["a"]


def test_a_file_missing_elsewhere_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source\.json"), new_folder(tmp_path / "out"):
        (tmp_path / "source.json").read_text()


def test_all_but_weights_and_hidden_files_is_carried_over_and_nothing_is_replaced(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "LICENSE", ".gitattributes", "model.safetensors", "model.safetensors.index.json", "a.bin"):
        (model / name).write_text("old")
    (model / "original").mkdir()
    (model / "original" / "consolidated.pth").touch()
    (model / "original" / "params.json").touch()
    target = quantized_folder(tmp_path / "out")
    written = (target / "config.json").read_text()
    carry_over(model, target)
    assert files_of(target) == ["LICENSE", "config.json", "original", "tokenizer.json"]
    assert files_of(target / "original") == ["params.json"]
    assert (target / "config.json").read_text() == written
