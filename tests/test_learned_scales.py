"""What is learned about a weight, against the formulas of LRQ and FlexRound; gradients are in test_fake_quant.py."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from lrq_offline.learned_scales import FixedRounding, FlexRoundScale, LearnedRounding, LrqScale, Rounding
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize

AnyRounding = TypeVar("AnyRounding", bound=Rounding)
DTYPES = [torch.float32, torch.bfloat16]


def weight_with_outliers(out_features: int = 12, in_features: int = 96) -> Tensor:
    return torch.randn(out_features, in_features) + 10 * (torch.rand(out_features, in_features) > 0.99)


def nearest(weight: Tensor, initial: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32) -> FixedRounding:
    step, zero_point = (tensor.unsqueeze(2) for tensor in initial)
    q = quantize(weight.unflatten(1, (step.shape[1], -1)), step, zero_point, bits).flatten(1)
    return FixedRounding(q.to(torch.uint8), initial, dtype)


def lrq(weight: Tensor, initial: StepAndZeroPoint, bits: int, dtype: torch.dtype = torch.float32, *, rank: int = 4) -> LrqScale:
    return LrqScale(weight, initial, bits, rank, torch.Generator().manual_seed(0), dtype)


def randomised(rounding: AnyRounding, size: float = 0.05) -> AnyRounding:
    """The same after some imagined learning: every parameter moved."""
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return rounding


def restored(q: Tensor, quantizer: StepAndZeroPoint) -> Tensor:
    """What stored integers stand for, float32 [out, in]."""
    step, zero_point = (tensor.unsqueeze(2) for tensor in quantizer)
    return dequantize(q.unflatten(1, (step.shape[1], -1)), step, zero_point).flatten(1)


LEARNING: dict[str, Callable[..., LearnedRounding]] = {"flexround": FlexRoundScale, "lrq": lrq}
METHODS: dict[str, Callable[..., Rounding]] = {"rtn": nearest, **LEARNING}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("method", LEARNING)
def test_learning_starts_at_round_to_nearest(method: str, bits: int, group_size: int | None, dtype: torch.dtype) -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, bits, group_size)
    start, fixed = METHODS[method](weight, initial, bits, dtype), nearest(weight, initial, bits, dtype)
    assert torch.equal(start.quantized()[0], fixed.quantized()[0])
    # The step is learned as its logarithm, whose exponential is off by a few units in the last place.
    torch.testing.assert_close(start(), fixed(), rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_round_to_nearest_is_the_number_format_at_the_searched_steps(method: str) -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, 4)
    q, quantizer = METHODS[method](weight, initial, 4).quantized()
    assert torch.equal(q, quantize(weight, *initial, 4).to(torch.uint8))
    torch.testing.assert_close(quantizer.step, initial.step, rtol=1e-6, atol=0)
    assert torch.equal(quantizer.zero_point, initial.zero_point)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_learned_with_is_what_is_stored(method: str, group_size: int | None, dtype: torch.dtype) -> None:
    weight = weight_with_outliers()
    rounding = randomised(METHODS[method](weight, search_steps(weight, 4, group_size), 4, dtype))
    q, quantizer = rounding.quantized()
    assert q.dtype == torch.uint8 and q.max() <= 15
    assert quantizer.step.shape == quantizer.zero_point.shape == (12, 1 if group_size is None else 96 // group_size)
    assert torch.equal(rounding(), restored(q, quantizer).to(dtype))


def test_integers_that_are_decided_come_back_as_they_were_given() -> None:
    q = torch.randint(0, 8, (5, 64), dtype=torch.uint8)
    quantizer = StepAndZeroPoint(torch.rand(5, 2) + 0.1, torch.randint(0, 8, (5, 2)).float())
    fixed = FixedRounding(q, quantizer)
    assert torch.equal(fixed.quantized()[0], q)
    for given, returned in zip(quantizer, fixed.quantized()[1], strict=True):
        assert torch.equal(given, returned)


@pytest.mark.parametrize("method", LEARNING)
def test_a_16_bit_weight_stays_16_bit_and_is_rounded_as_its_float32_copy(method: str) -> None:
    weight = weight_with_outliers().to(torch.bfloat16)
    initial = search_steps(weight, 8)
    torch.manual_seed(1)
    half = randomised(LEARNING[method](weight, initial, 8))
    torch.manual_seed(1)
    single = randomised(LEARNING[method](weight.float(), initial, 8))
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.quantized()[0], single.quantized()[0])
    assert torch.equal(half(), single())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_decisions_do_not_depend_on_autocast(dtype: torch.dtype) -> None:
    weight = weight_with_outliers(64, 256)
    rounding = randomised(lrq(weight, search_steps(weight, 4), 4, dtype, rank=16), size=0.1)
    outside, (q, quantizer) = rounding(), rounding.quantized()
    assert torch.equal(outside, restored(q, quantizer).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rounding(), outside)
        assert torch.equal(rounding.quantized()[0], q)


def test_lrq_scale_is_low_rank_matrix_plus_row_plus_column() -> None:
    weight = weight_with_outliers()
    scale = randomised(lrq(weight, search_steps(weight, 4), 4))
    matrix, row, column = scale.log_scale()
    assert torch.equal(matrix, scale.left @ scale.right) and matrix.shape == weight.shape
    assert row is scale.row and row.shape == (12, 1)
    assert column is scale.column and column.shape == (1, 96)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renewed_factors_leave_the_scale_as_it_is(dtype: torch.dtype) -> None:
    weight, generator = weight_with_outliers(), torch.Generator().manual_seed(0)
    scale = randomised(LrqScale(weight.to(dtype), search_steps(weight, 4), 4, 4, generator, dtype, renews=True))
    before, first_right = scaled_weight(scale), scale.right.detach().clone()
    assert not torch.allclose(before, scale.weight.float(), rtol=0.01)
    scale.renew(generator)
    torch.testing.assert_close(scaled_weight(scale), before, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert not scale.left.any() and not torch.equal(scale.right, first_right)


def scaled_weight(scale: LrqScale) -> torch.Tensor:
    """W / exp(M + L U), float32."""
    matrix = scale.log_scale().matrix
    assert matrix is not None
    return scale.weight.float() * torch.exp(-matrix.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_earlier_factors_say_fades_at_each_renewal(dtype: torch.dtype) -> None:
    weight, generator = weight_with_outliers().to(dtype), torch.Generator().manual_seed(0)
    weight[3, 5] = 0
    scale = randomised(LrqScale(weight, search_steps(weight, 4), 4, 4, generator, dtype, renews=True, fading=0.25))
    said = torch.zeros(weight.shape)
    for _ in range(2):
        with torch.no_grad():
            scale.left.normal_(std=0.3, generator=generator)
        said = 0.75 * (said + (scale.left @ scale.right).detach())
        scale.renew(generator)
        expected = weight.float() * torch.exp(-said)
        torch.testing.assert_close(scale.weight.float(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_renewing_factors_leaves_the_given_weight_alone() -> None:
    weight, generator = weight_with_outliers(), torch.Generator().manual_seed(0)
    scale = randomised(LrqScale(weight, search_steps(weight, 4), 4, 4, generator, renews=True))
    given = weight.clone()
    scale.renew(generator)
    assert torch.equal(weight, given) and not torch.equal(scale.weight, given)


def test_renewed_factors_let_the_rank_grow() -> None:
    weight, generator = weight_with_outliers(), torch.Generator().manual_seed(0)
    scale = LrqScale(weight, search_steps(weight, 4), 4, 4, generator, renews=True)
    for rank in (4, 8, 12):
        with torch.no_grad():
            scale.left.normal_()
        matrix = (weight / scaled_weight(scale)).log()
        assert torch.linalg.matrix_rank(matrix, atol=1e-3) == rank
        scale.renew(generator)


@pytest.mark.parametrize("weights", [1, 3])
def test_renewed_factors_reach_all_inputs_before_one_again(weights: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(weights * 12, 96)
    scale = LrqScale(weight, search_steps(weight, 4), 4, 24, generator, weights=weights, renews=True)
    rights = []
    for _ in range(4):
        rights.append(scale.right.detach().clone().unflatten(0, (weights, 24)))
        scale.renew(generator)
    whole = torch.cat(rights, dim=1)  # [weights, 96, 96]: rows as long as Kaiming-uniform ones
    torch.testing.assert_close(whole @ whole.mT, torch.eye(96).expand(weights, -1, -1) / 3, rtol=0, atol=1e-5)
    assert not torch.allclose(scale.right.detach().unflatten(0, (weights, 24)), rights[0])
    assert weights == 1 or not torch.allclose(whole[0], whole[1])


@pytest.mark.parametrize(("size", "kept"), [(1.0, torch.float16), (1e-5, torch.float32), (1e5, torch.float32)])
def test_a_weight_in_bfloat16_is_renewed_in_a_dtype_with_finer_units(size: float, kept: torch.dtype) -> None:
    weight = (size * torch.randn(12, 96)).bfloat16()
    steps = search_steps(weight, 4)
    scale = LrqScale(weight, steps, 4, 4, torch.Generator(), renews=True)
    assert scale.weight.dtype == kept
    assert ((scale.weight.float() - weight.float()).abs() <= steps.step * 2**-8).all()
    assert LrqScale(weight, steps, 4, 4, torch.Generator()).weight is weight  # no copy where nothing renews


def test_flexround_scale_is_a_matrix_plus_a_column_of_one_value_per_row() -> None:
    weight = weight_with_outliers()
    scale = randomised(FlexRoundScale(weight, search_steps(weight, 4), 4))
    matrix, row, column = scale.log_scale()
    assert matrix is scale.matrix and matrix.shape == weight.shape
    assert row is scale.row and row.shape == (12, 1) and column is None


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("method", LEARNING)
def test_learned_weights_follow_the_formula(method: str, bits: int, group_size: int | None) -> None:
    weight = weight_with_outliers()
    rounding = randomised(LEARNING[method](weight, search_steps(weight, bits, group_size), bits))
    parts = {name: parameter.detach().double() for name, parameter in rounding.named_parameters()}
    if method == "lrq":
        log_scale = parts["left"] @ parts["right"] + parts["row"] + parts["column"]
    else:
        log_scale = parts["matrix"] + parts["row"]
    # W_hat = s1 (clamp(round(W / (s1 exp(S2))) + z, 0, 2^b - 1) - z), here in float64
    groups = rounding.log_step.shape[1]
    s1 = parts["log_step"].exp().repeat_interleave(96 // groups, dim=1)
    z = rounding.zero_point.double().repeat_interleave(96 // groups, dim=1)
    q = torch.clamp(torch.round(weight.double() / (s1 * torch.exp(log_scale))) + z, 0, 2**bits - 1)
    assert torch.equal(rounding.quantized()[0].double(), q)
    torch.testing.assert_close(rounding(), (s1 * (q - z)).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", LEARNING)
def test_learning_reaches_every_parameter_in_float32(method: str, dtype: torch.dtype) -> None:
    weight = weight_with_outliers()
    rounding = randomised(LEARNING[method](weight, search_steps(weight, 4), 4, dtype))
    (rounding() * torch.randn_like(weight)).sum().backward()
    for name, parameter in rounding.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        # Elements that are clamped have no gradient in FlexRound's matrix.
        assert (parameter.grad != 0).float().mean() > 0.95, name


def test_nothing_is_learned_by_round_to_nearest() -> None:
    weight = weight_with_outliers()
    assert list(nearest(weight, search_steps(weight, 4), 4).parameters()) == []


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


@pytest.mark.parametrize("method", LEARNING)
def test_learning_leaves_the_weight_and_the_first_steps_as_they_were(method: str) -> None:
    weight = weight_with_outliers()
    initial = search_steps(weight, 4)
    before = [tensor.clone() for tensor in (weight, *initial)]
    rounding = randomised(LEARNING[method](weight, initial, 4))
    rounding().sum().backward()
    assert all(torch.equal(*pair) for pair in zip(before, (weight, *initial), strict=True))


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
