"""GPTQ: exact where there is an exact answer, better than round-to-nearest where inputs go together, and never stuck."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from lrq_offline.gptq import HessianSum, gptq
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize


def correlated(tokens: int, in_features: int, rank: int) -> Tensor:
    """Inputs [tokens, in] of which ``rank`` directions matter; the rest is a tenth as large."""
    return torch.randn(tokens, rank) @ torch.randn(rank, in_features) + 0.1 * torch.randn(tokens, in_features)


def hessian(x: Tensor) -> Tensor:
    total = HessianSum()
    total(x)
    return total.value()


def nearest(weight: Tensor, quantizer: StepAndZeroPoint, bits: int) -> Tensor:
    step, zero_point = (tensor.repeat_interleave(weight.shape[1] // tensor.shape[1], dim=1) for tensor in quantizer)
    return quantize(weight, step, zero_point, bits).to(torch.uint8)


def output_error(q: Tensor, weight: Tensor, quantizer: StepAndZeroPoint, x: Tensor) -> Tensor:
    """|(W_hat - W) x|^2 over all tokens, for each row of W: [out]."""
    step, zero_point = (tensor.repeat_interleave(weight.shape[1] // tensor.shape[1], dim=1) for tensor in quantizer)
    return ((dequantize(q, step, zero_point) - weight) @ x.T).square().sum(dim=1)


# --- the Hessian ---


def test_the_hessian_is_twice_the_mean_outer_product_whatever_the_batches() -> None:
    x = torch.randn(40, 6)
    total = HessianSum()
    for batch in x.split([1, 30, 9]):
        total(batch)
    expected = 2 * torch.stack([torch.outer(token, token) for token in x.double()]).mean(dim=0)
    torch.testing.assert_close(total.value(), expected.float())


# --- what it computes ---


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_independent_inputs_give_round_to_nearest(bits: int, group_size: int | None) -> None:
    weight = torch.randn(7, 96)
    steps = search_steps(weight, bits, group_size)
    result = gptq(weight, torch.diag(torch.rand(96) + 0.1), steps, bits)
    assert result.damping == 0.01
    assert torch.equal(result.q, nearest(weight, steps, bits))


def test_each_column_is_rounded_where_the_columns_before_it_have_moved_its_best_value() -> None:
    # The definition, without a Cholesky factor: given the columns that are rounded, the others' best real values solve
    # the normal equations of what is left; the next column is rounded from there. More columns than go at once.
    bits, columns = 3, 160
    weight, h = torch.randn(4, columns).double(), hessian(correlated(400, columns, 20)).double()
    steps = search_steps(weight.float(), bits)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = h.diagonal().argsort(descending=True).tolist()
    best, expected = weight.clone(), torch.zeros(4, columns)
    for place, column in enumerate(order):
        rounded, left = order[: place + 1], order[place + 1 :]
        expected[:, column] = quantize(best[:, column : column + 1], *steps, bits)[:, 0]
        error = dequantize(expected[:, rounded], *steps).double() - weight[:, rounded]
        best[:, left] = weight[:, left] - torch.linalg.solve(damped[left][:, left], damped[left][:, rounded] @ error.T).T
    assert torch.equal(gptq(weight.float(), h.float(), steps, bits).q, expected.to(torch.uint8))


def test_the_order_of_the_columns_is_the_weights_own() -> None:
    weight, h = torch.randn(8, 160), hessian(correlated(300, 160, 20))
    steps = search_steps(weight, 4)
    shuffled = torch.randperm(160)
    assert torch.equal(
        gptq(weight[:, shuffled], h[shuffled][:, shuffled], steps, 4).q, gptq(weight, h, steps, 4).q[:, shuffled]
    )


def test_groups_use_their_own_steps() -> None:
    # Groups of very different size whose inputs have nothing to do with each other: each as it would be alone.
    parts = [torch.randn(6, 32) * size for size in (1.0, 100.0, 0.01)]
    weight, h = torch.cat(parts, dim=1), hessian(correlated(200, 32, 6))
    q = gptq(weight, torch.block_diag(h, h, h), search_steps(weight, 4, 32), 4).q
    for part, found in zip(parts, q.chunk(3, dim=1), strict=True):
        assert torch.equal(found, gptq(part, h, search_steps(part, 4), 4).q)


def test_a_16_bit_weight_is_rounded_as_its_float32_copy_and_nothing_is_changed() -> None:
    weight, h = torch.randn(8, 64).to(torch.bfloat16), hessian(correlated(200, 64, 8))
    steps = search_steps(weight, 4)
    before = [tensor.clone() for tensor in (weight, h, *steps)]
    assert torch.equal(gptq(weight, h, steps, 4).q, gptq(weight.float(), h, steps, 4).q)
    assert all(torch.equal(*pair) for pair in zip(before, (weight, h, *steps), strict=True))


# --- how good it is ---


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_inputs_that_go_together_lose_far_less_than_by_round_to_nearest(bits: int, group_size: int | None) -> None:
    weight, x = torch.randn(16, 288), correlated(600, 288, 24)
    steps = search_steps(weight, bits, group_size)
    result = gptq(weight, hessian(x), steps, bits)
    assert result.q.dtype == torch.uint8 and result.q.max() <= 2**bits - 1
    error, rounded = (output_error(q, weight, steps, x).sum() for q in (result.q, nearest(weight, steps, bits)))
    # Over five seeds the ratio lay between 0.02 and 0.07.
    assert error < 0.12 * rounded


@pytest.mark.parametrize("bits", [2, 3])
def test_tiny_problems_come_close_to_the_best_of_all_integers(bits: int) -> None:
    # 200 independent problems of three columns: all answers can be tried.
    weight, x = torch.randn(200, 3), torch.randn(50, 3) + 2 * torch.randn(50, 1)
    steps = search_steps(weight, bits)
    answers = torch.tensor(list(product(range(2**bits), repeat=3)))
    best = torch.stack([output_error(q.expand(200, 3), weight, steps, x) for q in answers]).amin(dim=0)
    found = output_error(gptq(weight, hessian(x), steps, bits).q, weight, steps, x)
    rounded = output_error(nearest(weight, steps, bits), weight, steps, x)
    assert (found >= best).all()
    # Over five seeds: 1.2 to 1.5 times the best, where round-to-nearest has 1.8 to 3.3 times.
    assert found.sum() < 1.6 * best.sum() and found.sum() < 0.8 * rounded.sum()


# --- inputs that make the Hessian singular ---


def test_channels_that_no_token_reaches_are_rounded_to_nearest_and_disturb_no_other() -> None:
    weight, x = torch.randn(8, 64), correlated(200, 64, 8)
    x[:, [3, 40]] = 0
    steps = search_steps(weight, 4)
    result = gptq(weight, hessian(x), steps, 4)
    fixed = nearest(weight, steps, 4)
    assert result.damping == 0.01
    assert torch.equal(result.q[:, [3, 40]], fixed[:, [3, 40]])
    assert output_error(result.q, weight, steps, x).sum() < 0.2 * output_error(fixed, weight, steps, x).sum()


SINGULAR: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "fewer tokens than channels": (lambda x: x[:20], 0.3),
    "two channels that are the same": (lambda x: x.index_copy(1, torch.tensor([5]), x[:, 6:7]), 0.3),
    # What rounding its own weight costs cannot be made up for, and it is most of the error.
    "a constant channel": (lambda x: x.index_fill(1, torch.tensor(5), 30.0), 0.9),
    "a channel a thousand times larger": (lambda x: x * torch.ones(64).index_fill(0, torch.tensor(5), 1000.0), 0.95),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_inputs_without_full_rank_still_gain(case: str) -> None:
    change, most = SINGULAR[case]
    weight, x = torch.randn(8, 64), change(correlated(200, 64, 8))
    steps = search_steps(weight, 4)
    result = gptq(weight, hessian(x), steps, 4)
    assert result.damping is not None
    error, rounded = (output_error(q, weight, steps, x).sum() for q in (result.q, nearest(weight, steps, 4)))
    assert error < most * rounded


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_row_that_is_constant_is_no_trouble(value: float) -> None:
    weight, x = torch.randn(8, 64), correlated(200, 64, 8)
    weight[2] = value
    steps = search_steps(weight, 4)
    q = gptq(weight, hessian(x), steps, 4).q
    assert output_error(q, weight, steps, x)[2] <= 1e-6 * (weight[2] @ x.T).square().sum()


def test_a_hessian_that_is_not_quite_positive_is_damped_more() -> None:
    weight, h = torch.randn(8, 64), hessian(correlated(200, 64, 8))
    slightly_indefinite = h - 0.05 * h.diagonal().mean() * torch.eye(64)
    result = gptq(weight, slightly_indefinite, search_steps(weight, 4), 4)
    assert result.damping == 0.1


HOPELESS = {
    "no inputs at all": torch.zeros(64, 64),
    "negative": -torch.eye(64),
    "far from positive": torch.eye(64) - 3 * torch.eye(64).flip(0),
    "one NaN": torch.eye(64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(torch.nan)),
    "infinite": torch.diag(torch.full((64,), torch.inf)),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_a_hessian_that_cannot_be_inverted_gives_round_to_nearest_and_says_so(name: str) -> None:
    weight = torch.randn(8, 64)
    steps = search_steps(weight, 4, 32)
    result = gptq(weight, HOPELESS[name], steps, 4)
    assert result.damping is None
    assert torch.equal(result.q, nearest(weight, steps, 4))
