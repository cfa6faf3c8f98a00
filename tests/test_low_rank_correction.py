"""LRC: each closed form against a search over all pairs, what rounds can promise, and that it beats an SVD of the error."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lrq_offline.affine import fake_quantize_clipped
from lrq_offline.gptq import gptq
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.low_rank_correction import (
    LowRankPair,
    Moments,
    MomentSums,
    best_pair,
    by_energy,
    corrected,
    first_pair,
    objective,
)
from lrq_offline.stage_rounding import nearest
from lrq_offline.step_search import search_steps

TOKENS = 300


def problem(out_features: int, in_features: int, seed: int = 0, bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """W [out, in], and X and Q(X) [tokens, in] with a few large channels, as a model's activations have."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x = torch.randn(TOKENS, in_features, generator=generator) @ mixing
    x[:, :2] *= 10
    return weight, x, fake_quantize_clipped(x, torch.tensor([0.9]), bits)


def moments_of(x: Tensor, y: Tensor) -> Moments:
    sums = MomentSums()
    sums(x, y)
    return sums.value()


def by_gptq(moments: Moments, bits: int = 4) -> Callable[[Tensor], FixedRounding]:
    def rounded(target: Tensor) -> FixedRounding:
        steps = search_steps(target, bits)
        return FixedRounding(gptq(target, moments.yy.float(), steps, bits).q, steps)

    return rounded


def to_nearest(target: Tensor) -> FixedRounding:
    return nearest(target, search_steps(target, 4), 4)


def least_by_search(cost: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int], rank: int, seed: int) -> float:
    """The least cost of U and V over several starts of L-BFGS, float64."""
    best = float("inf")
    for start in range(4):
        generator = torch.Generator().manual_seed(100 * seed + start)
        u, v = (torch.randn(size, rank, generator=generator, dtype=torch.float64).requires_grad_() for size in shape)
        optimizer = torch.optim.LBFGS(
            [u, v], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure(u: Tensor = u, v: Tensor = v, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = cost(u, v)
            value.backward()
            return value

        optimizer.step(closure)
        best = min(best, cost(u, v).item())
    return best


# --- the moments ---


def test_moments_are_sums_over_tokens_in_float64_whatever_the_batches() -> None:
    _, x, y = problem(4, 6)
    sums = MomentSums()
    for rows in torch.arange(TOKENS).split(7):
        sums(x[rows], y[rows])
    wide_x, wide_y = x.double(), y.double()
    found = sums.value()
    for moment, expected in ((found.xx, wide_x.T @ wide_x), (found.yy, wide_y.T @ wide_y), (found.xy, wide_x.T @ wide_y)):
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, expected, rtol=1e-12, atol=1e-12)
    diagonal = (found.regularized().xy - found.xy).diagonal()
    torch.testing.assert_close(diagonal, torch.full((6,), 0.01 * found.xy.diagonal().mean().item(), dtype=torch.float64))


def test_an_input_that_is_not_quantized_has_one_moment() -> None:
    _, x, _ = problem(4, 6)
    found = moments_of(x, x)
    assert found.exact and found.regularized().exact and found.xy is found.xx


# --- the closed forms ---


@pytest.mark.parametrize("shape", [(5, 7), (9, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_pair_of_a_rounded_weight_is_the_best_of_all(shape: tuple[int, int], rank: int) -> None:
    weight, x, y = problem(*shape)
    result = corrected(weight, moments_of(x, y), rank, to_nearest)
    assert result is not None
    regular, wide, w_hat = moments_of(x, y).regularized(), weight.double(), result.rounding().double()
    found = objective(wide, regular, w_hat, result.pair)

    def cost(u: Tensor, v: Tensor) -> Tensor:
        left = wide - u @ v.T
        quadratic = (left @ regular.xx * left).sum() - 2 * (left @ regular.xy * w_hat).sum()
        return quadratic + (w_hat @ regular.yy * w_hat).sum()

    assert found == pytest.approx(least_by_search(cost, shape, rank, seed=rank), rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (9, 6)], ids=["wide", "tall"])
def test_the_first_pair_is_the_best_one_for_a_weight_that_need_not_be_rounded(shape: tuple[int, int]) -> None:
    weight, x, y = problem(*shape)
    regular, wide = moments_of(x, y).regularized(), weight.double()
    inverse = torch.linalg.inv(regular.yy)
    pair = first_pair(wide, regular, 2, torch.linalg.cholesky(regular.yy))
    found = objective(wide, regular, (wide - pair.u @ pair.v.T) @ regular.xy @ inverse, pair)

    def cost(u: Tensor, v: Tensor) -> Tensor:
        # The best W_hat for U and V is A Sxy Syy^-1, A = W - U V^T: what it leaves is A S A^T.
        left = wide - u @ v.T
        return (left @ (regular.xx - regular.xy @ inverse @ regular.xy.T) * left).sum()

    assert found == pytest.approx(least_by_search(cost, shape, 2, seed=5), rel=1e-6)


def test_the_weight_that_is_rounded_is_the_best_one_for_the_pair() -> None:
    weight, x, y = problem(5, 7)
    regular, wide = moments_of(x, y).regularized(), weight.double()
    pair = first_pair(wide, regular, 2, torch.linalg.cholesky(regular.yy))
    rounded: list[Tensor] = []

    def record(target: Tensor) -> FixedRounding:
        rounded.append(target)
        return to_nearest(target)

    corrected(weight, moments_of(x, y), 2, record)
    best = rounded[0].double()
    least = objective(wide, regular, best, pair)
    for _ in range(20):
        assert objective(wide, regular, best + 1e-3 * torch.randn(best.shape, dtype=torch.float64), pair) > least


@given(out=st.integers(2, 12), inputs=st.integers(2, 12), seed=st.integers(0, 99))
def test_the_first_columns_are_the_best_correction_of_their_number(out: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    root = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    moment = root @ root.T + 0.1 * torch.eye(inputs, dtype=torch.float64)
    whole = best_pair(matrix, moment, min(out, inputs))
    torch.testing.assert_close(whole.u @ whole.v.T, matrix)
    for rank in range(1, min(out, inputs)):
        prefix, own = LowRankPair(whole.u[:, :rank], whole.v[:, :rank]), best_pair(matrix, moment, rank)
        torch.testing.assert_close(prefix.u @ prefix.v.T, own.u @ own.v.T)


def test_directions_without_energy_are_zero() -> None:
    matrix = torch.zeros(9, 6, dtype=torch.float64)
    matrix[:, 0] = 1
    pair = best_pair(matrix, torch.eye(6, dtype=torch.float64), 3)
    assert torch.isfinite(pair.u).all() and torch.isfinite(pair.v).all()
    torch.testing.assert_close(pair.u @ pair.v.T, matrix)


@pytest.mark.parametrize("shape", [(5, 9), (9, 6)], ids=["wide", "tall"])
def test_a_pair_in_the_order_of_its_energy_is_the_same_product_with_the_best_first_columns(shape: tuple[int, int]) -> None:
    _, x, _ = problem(*shape)
    u, v = (torch.randn(size, 4, dtype=torch.float64) for size in shape)
    z, moment = x.double() @ v, x.double().T @ x.double()
    found, expected = by_energy(LowRankPair(u, v), z.T @ z), best_pair(u @ v.T, moment, 4)
    torch.testing.assert_close(found.u @ found.v.T, u @ v.T)
    torch.testing.assert_close(found.u.T @ found.u, torch.eye(4, dtype=torch.float64))
    for rank in range(1, 5):
        first = [pair.u[:, :rank] @ pair.v[:, :rank].T for pair in (found, expected)]
        torch.testing.assert_close(*first)


def test_columns_that_add_nothing_come_last() -> None:
    u, v = torch.randn(6, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    v[:, 0] = 0
    x = torch.randn(40, 8, dtype=torch.float64)
    found = by_energy(LowRankPair(u, v), (x @ v).T @ (x @ v))
    assert all(torch.isfinite(factor).all() for factor in (found.u, found.v))
    torch.testing.assert_close(found.v[:, 2], torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(found.u @ found.v.T, u @ v.T)


# --- rounds ---


@given(rank=st.integers(1, 4), rounds=st.integers(1, 4), seed=st.integers(0, 99), method=st.sampled_from(["gptq", "rtn"]))
def test_more_rounds_never_end_worse_and_each_pair_lowers_what_its_weight_leaves(
    rank: int, rounds: int, seed: int, method: str
) -> None:
    # A single round may end worse than the one before it, because rounding is not exact: the best is kept.
    weight, x, y = problem(6, 8, seed)
    moments = moments_of(x, y)
    result = corrected(weight, moments, rank, by_gptq(moments) if method == "gptq" else to_nearest, rounds)
    assert result is not None and len(result.objectives) == rounds
    regular, wide = moments.regularized(), weight.double()
    scale = objective(wide, regular, torch.zeros_like(wide))
    w_hat = result.rounding().double()
    kept = objective(wide, regular, w_hat, result.pair) / scale
    assert kept == pytest.approx(min(result.objectives), rel=1e-9, abs=1e-12)
    assert kept <= objective(wide, regular, w_hat) / scale
    fewer = corrected(weight, moments, rank, by_gptq(moments) if method == "gptq" else to_nearest, 1)
    assert fewer is not None and kept <= fewer.objectives[0]


def test_a_larger_rank_leaves_less() -> None:
    weight, x, y = problem(24, 32)
    moments = moments_of(x, y)
    left = [min(corrected(weight, moments, rank, by_gptq(moments)).objectives) for rank in (1, 4, 12, 24)]  # type: ignore[union-attr]
    assert left == sorted(left, reverse=True) and left[-1] < 0.2 * left[0]


def test_it_corrects_more_than_an_svd_of_the_weight_s_error() -> None:
    for seed in range(3):
        weight, x, y = problem(24, 32, seed)
        moments = moments_of(x, y)
        result = corrected(weight, moments, 4, by_gptq(moments))
        assert result is not None
        w_hat = by_gptq(moments)(weight)()
        u, energy, vt = torch.linalg.svd(weight - w_hat)
        svd = w_hat, (u[:, :4] * energy[:4]) @ vt[:4]
        ours = result.rounding(), (result.pair.u @ result.pair.v.T).float()
        ours_left, svd_left = ((y @ w.T + x @ low.T - x @ weight.T).square().sum().item() for w, low in (ours, svd))
        assert ours_left < 0.7 * svd_left


def test_an_exact_input_starts_without_a_pair_and_still_gains() -> None:
    weight, x, _ = problem(24, 32)
    moments = moments_of(x, x)
    rounding, result = by_gptq(moments, 3), corrected(weight, moments, 4, by_gptq(moments, 3))
    assert result is not None and torch.equal(result.rounding(), rounding(weight)())  # what is rounded is W itself
    without = objective(weight.double(), moments.regularized(), rounding(weight)().double())
    assert objective(weight.double(), moments.regularized(), result.rounding().double(), result.pair) < 0.8 * without


def test_a_weight_of_zeros_stays_one() -> None:
    weight, x, y = problem(6, 8)
    result = corrected(torch.zeros_like(weight), moments_of(x, y), 2, to_nearest)
    assert result is not None and not result.rounding().any() and not (result.pair.u @ result.pair.v.T).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_give_no_correction(value: float) -> None:
    weight, x, y = problem(6, 8)
    x[3, 2] = value
    assert corrected(weight, moments_of(x, y), 2, to_nearest) is None


def test_inputs_that_are_all_zero_give_no_correction() -> None:
    weight, x, _ = problem(6, 8)
    nothing = torch.zeros_like(x)
    assert corrected(weight, moments_of(nothing, nothing.clone()), 2, to_nearest) is None
