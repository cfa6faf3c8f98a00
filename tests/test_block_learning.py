"""Learning one block: the best state is kept, it ends when nothing gets better, and held-out windows stay held out.

The blocks here are small formulas instead of Transformer layers: learning knows nothing about what it learns.
"""

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.block_learning import LearningResult, LearningWindows, learn_block, relative_error, run_block
from lrq_offline.config import QuantizeSettings
from lrq_offline.learned_scales import FlexRoundScale, LrqScale
from lrq_offline.output_metric import fisher_metric
from lrq_offline.quantized_block import FakeQuantizedLinear
from lrq_offline.ranks import Ranks
from lrq_offline.step_search import search_steps
from tests.learned_blocks import WIDTH, Gain, states


def learn(
    block: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    rate: float,
    seed: int = 0,
    arguments: dict[str, Any] | None = None,
    **settings: Any,
) -> LearningResult:
    chosen = QuantizeSettings("w4a16", **settings)
    generator = torch.Generator().manual_seed(seed)
    windows = LearningWindows.drawn(len(inputs), generator)
    return learn_block(block, states(inputs), states(targets), arguments or {}, chosen, rate, windows, generator, torch.float32)


def error_of(block: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    with torch.no_grad():
        return ((block(inputs) - targets).square().sum() / targets.square().sum()).item()


def overfitting() -> tuple[nn.Module, Tensor, Tensor]:
    """A matrix, and so few noisy windows that learning them by heart spoils what was not learned from."""
    inputs = torch.randn(32, 1, 40)
    truth = torch.randn(40, 40) * 0.1
    targets = inputs @ truth.T + torch.randn(32, 1, 40)
    block = nn.Linear(40, 40, bias=False)
    nn.init.zeros_(block.weight)
    return block, inputs, targets


# --- the result ---


def test_learning_finds_what_makes_the_outputs_equal() -> None:
    inputs = torch.randn(8, 5, WIDTH)
    block = Gain(1.0)
    result = learn(block, inputs, 1.5 * inputs, rate=0.02, iters=100)
    assert block.gain.item() == pytest.approx(1.5, abs=0.03)
    assert result.error_before == pytest.approx((0.5 / 1.5) ** 2, rel=1e-5)
    assert result.error_after < 1e-2 * result.error_before
    assert result.steps == 100


def test_errors_are_those_of_all_windows_before_and_after() -> None:
    block, inputs, targets = overfitting()
    before = error_of(block, inputs, targets)
    result = learn(block, inputs, targets, rate=0.01, iters=50)
    assert result.error_before == pytest.approx(before, rel=1e-5)
    assert result.error_after == pytest.approx(error_of(block, inputs, targets), rel=1e-5)


def test_the_curve_starts_before_the_first_step_and_ends_with_the_last() -> None:
    block, inputs, targets = overfitting()
    result = learn(block, inputs, targets, rate=0.003, iters=47)
    curve = result.curve
    assert curve.step == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 47] and result.steps == 47
    assert len(curve.train) == len(curve.held_out) == len(curve.step)
    assert curve.train[0] is None and all(isinstance(error, float) for error in [*curve.train[1:], *curve.held_out])


def test_training_errors_are_relative_and_held_out_errors_too() -> None:
    # One step at a time, all windows in every batch: the first training error is that of the start.
    inputs = torch.randn(4, 5, WIDTH)
    result = learn(Gain(1.0), inputs, 1.5 * inputs, rate=1e-3, iters=2, batch_size=4)
    assert result.curve.train[1] == pytest.approx(result.error_before, rel=1e-4)
    assert result.curve.held_out[0] == pytest.approx(result.error_before, rel=1e-4)


def test_training_errors_are_in_the_measure_of_the_held_out_ones() -> None:
    # A channel of a hundred times the others' size, whose differences change no prediction.
    inputs = torch.randn(16, 5, WIDTH)
    inputs[..., 0] *= 100
    moments = torch.eye(WIDTH)
    moments[0, 0] = 1e-4
    generator = torch.Generator().manual_seed(0)
    everything = LearningWindows(torch.arange(16), torch.empty(0, dtype=torch.int64))
    result = learn_block(
        Gain(1.0), states(inputs), states(1.5 * inputs), {}, QuantizeSettings("w4a16", iters=2, batch_size=16), 1e-3,
        everything, generator, torch.float32, metric=fisher_metric(moments, torch.float32),
    )  # fmt: skip
    assert result.curve.train[1] == pytest.approx(result.curve.held_out[0], rel=1e-3)
    assert result.curve.held_out[0] == pytest.approx(result.error_before, rel=1e-4)


def test_arguments_of_the_call_reach_the_block() -> None:
    class Shifted(Gain):
        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return super().forward(x) + shift

    inputs = torch.randn(8, 5, WIDTH)
    arguments = {"shift": torch.tensor(2.0)}
    assert learn(Shifted(1.0), inputs, inputs + 2, rate=0.01, iters=1, arguments=arguments).error_before == 0


def test_the_same_generator_gives_the_same_learning() -> None:
    learned = []
    for _ in range(2):
        torch.manual_seed(1)
        block, inputs, targets = overfitting()
        torch.manual_seed(len(learned))
        result = learn(block, inputs, targets, rate=0.01, seed=3, iters=20)
        learned.append((block.weight.detach().clone(), result.curve))
    assert torch.equal(learned[0][0], learned[1][0]) and learned[0][1] == learned[1][1]


def test_a_block_with_nothing_to_learn_is_only_measured() -> None:
    inputs = torch.randn(8, 5, WIDTH)
    block = Gain(1.0).requires_grad_(False)
    result = learn(block, inputs, 1.5 * inputs, rate=0.02)
    assert result.steps == 0 and result.error_before == result.error_after == pytest.approx((0.5 / 1.5) ** 2, rel=1e-5)
    assert result.curve.step == [] and block.gain == 1


@pytest.mark.parametrize("samples", [1, 3])
def test_fewer_windows_than_a_batch_are_learned_from_all_the_same(samples: int) -> None:
    inputs = torch.randn(samples, 5, WIDTH)
    result = learn(Gain(1.0), inputs, 1.5 * inputs, rate=0.02, iters=50, batch_size=4)
    assert result.error_after < 0.1 * result.error_before


# --- the best state ---


def check_error_of_some_pair(block: nn.Module, inputs: Tensor, targets: Tensor, expected: float) -> None:
    """Two of the 32 windows are held out: the block has the expected error on some pair."""
    pairs = [(i, j) for i in range(len(inputs)) for j in range(i)]
    errors = [error_of(block, inputs[list(pair)], targets[list(pair)]) for pair in pairs]
    assert min(abs(error - expected) for error in errors) < 1e-6 * expected


def test_the_state_that_is_best_on_the_held_out_windows_is_kept() -> None:
    block, inputs, targets = overfitting()
    result = learn(block, inputs, targets, rate=0.01, iters=100)
    best = min(result.curve.held_out)
    # It got better, and then worse again.
    assert result.curve.held_out[0] > 1.01 * best and result.curve.held_out[-1] > 1.01 * best
    check_error_of_some_pair(block, inputs, targets, best)


def test_learning_that_never_helps_leaves_the_block_as_it_was_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inputs = torch.randn(32, 5, WIDTH)
    # The best gain is 1, where it starts; the gradient points away from there.
    block = Gain(1.0, lambda gain: 1 + (gain - 1).square() + (gain - gain.detach()))
    targets = inputs * 1.0001
    with caplog.at_level(logging.WARNING):
        result = learn(block, inputs, targets, rate=0.5, iters=100)
    assert block.gain == 1
    assert result.error_after == result.error_before
    assert "did not lower the error" in caplog.text


def test_learning_ends_early_when_the_held_out_error_stops_falling() -> None:
    block, inputs, targets = overfitting()
    result = learn(block, inputs, targets, rate=0.03, iters=1000)
    curve = result.curve.held_out
    best = curve.index(min(curve))
    # Six checks without a better state.
    assert len(curve) - 1 - best == 6
    assert result.steps == result.curve.step[-1] < 1000


def test_learning_goes_on_while_the_held_out_error_falls() -> None:
    inputs = torch.randn(32, 5, WIDTH)
    result = learn(Gain(1.0), inputs, 100 * inputs, rate=0.01, iters=100)
    assert result.steps == 100 and sorted(result.curve.held_out, reverse=True) == result.curve.held_out


# --- NaN ---


def test_learning_that_becomes_nan_ends_and_goes_back_to_the_best_state() -> None:
    inputs = torch.randn(32, 5, WIDTH)
    # The root falls towards 0 and then has no value.
    block, targets = Gain(0.25, torch.sqrt), torch.full_like(inputs, 1e-3)
    result = learn(block, inputs, targets, rate=0.003, iters=200)
    curve = result.curve
    assert all(math.isfinite(error) for error in curve.held_out)
    assert result.steps < 200
    assert block.gain.isfinite() and block.gain < 0.25
    assert result.error_after == pytest.approx(error_of(block, inputs, targets), rel=1e-5)
    assert result.error_after < result.error_before


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_a_block_whose_error_is_nan_from_the_start_is_left_alone(where: str) -> None:
    inputs, targets = torch.randn(8, 5, WIDTH), torch.randn(8, 5, WIDTH)
    {"inputs": inputs, "targets": targets}[where][3, 2, 1] = torch.nan
    block = Gain(1.0)
    result = learn(block, inputs, targets, rate=0.02)
    assert block.gain == 1 and result.steps == 0
    assert math.isnan(result.error_before) and math.isnan(result.error_after)


def test_targets_of_zero_are_no_division_by_zero() -> None:
    inputs = torch.randn(8, 5, WIDTH)
    result = learn(Gain(1.0), inputs, torch.zeros_like(inputs), rate=0.02, iters=10)
    assert math.isfinite(result.error_before)


# --- the held-out windows ---


class Witness(Gain):
    """Notes which windows it learned from: the first number of each is its own."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.batches: list[list[int]] = []
        self.checked: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        rows = [int(row) for row in x[:, 0, 0]]
        if torch.is_grad_enabled():
            self.batches.append(rows)
        return super().forward(x)


def numbered(samples: int) -> Tensor:
    windows = torch.randn(samples, 5, WIDTH)
    windows[:, 0, 0] = torch.arange(samples)
    return windows


@pytest.mark.parametrize(("samples", "held_out"), [(2, 0), (15, 0), (16, 1), (40, 2), (64, 4)])
def test_one_window_in_sixteen_is_never_learned_from(samples: int, held_out: int) -> None:
    inputs, block = numbered(samples), Witness()
    learn(block, inputs, 1.5 * inputs, rate=1e-3, iters=200)
    assert len({row for batch in block.batches for row in batch}) == samples - held_out


@pytest.mark.parametrize(
    ("samples", "ranks", "held_out"), [(64, 1, 4), (32, 2, 2), (8, 8, 1), (8, 2, 1), (7, 2, 0), (20, 2, 1), (1, 16, 0)]
)
def test_one_window_in_sixteen_of_all_ranks_is_held_out(samples: int, ranks: int, held_out: int) -> None:
    windows = LearningWindows.drawn(samples, torch.Generator(), Ranks(0, ranks))
    assert len(windows.held_out) == held_out and len(windows.learned_from) == samples - held_out


def test_batches_are_of_distinct_windows_and_as_large_as_was_asked_for() -> None:
    inputs, block = numbered(20), Witness()
    learn(block, inputs, 1.5 * inputs, rate=1e-3, iters=50, batch_size=5)
    assert len(block.batches) == 50
    assert all(len(set(batch)) == 5 for batch in block.batches)
    assert len({tuple(batch) for batch in block.batches}) > 40


def test_every_window_is_learned_from_once_in_each_pass() -> None:
    inputs, block = numbered(12), Witness()
    learn(block, inputs, 1.5 * inputs, rate=1e-3, iters=8, batch_size=3)
    first, second = ([row for batch in half for row in batch] for half in (block.batches[:4], block.batches[4:]))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


def test_the_held_out_error_is_that_of_the_windows_that_were_not_learned_from() -> None:
    inputs, block = numbered(32), Witness()
    targets = torch.randn(32, 5, WIDTH) * torch.arange(1, 33).view(32, 1, 1)
    start = error_of(Gain(1.0), inputs, targets)
    result = learn(block, inputs, targets, rate=1e-3, iters=200)
    learned_from = {row for batch in block.batches for row in batch}
    held_out = [row for row in range(32) if row not in learned_from]
    assert len(held_out) == 2 and result.curve.held_out[0] != pytest.approx(start)
    assert result.curve.held_out[0] == pytest.approx(error_of(Gain(1.0), inputs[held_out], targets[held_out]), rel=1e-5)


# --- the steps ---


@pytest.mark.parametrize(("settings", "share"), [({}, 1.0), ({"group_size": 32}, 0.1)], ids=["channel", "group"])
def test_steps_are_as_slow_as_the_settings_say(settings: dict[str, Any], share: float) -> None:
    weight, inputs = torch.randn(16, 64), torch.randn(8, 40, 8) @ torch.randn(8, 64)
    rounding = LrqScale(weight, search_steps(weight, 4, **settings), 4, 2, torch.Generator().manual_seed(0))
    block = nn.Sequential(FakeQuantizedLinear(rounding, None, None))
    before = {name: parameter.detach().clone() for name, parameter in rounding.named_parameters()}
    result = learn(block, inputs, inputs @ weight.T, rate=0.01, iters=40, renew=False, **settings)
    assert result.error_after < result.error_before  # what was learned is kept
    moved = {name: (value - before[name]).abs().max().item() for name, value in rounding.named_parameters()}
    # Adam's steps are as long as the rate at most, and that falls to 0 by a half-cosine.
    longest = 0.01 * 41 / 2
    assert 0.2 * longest < moved["row"] < 1.1 * longest
    assert 0.2 * longest * share < moved["log_step"] < 1.1 * longest * share


def test_learning_decays_the_matrix_of_the_scale_and_nothing_else() -> None:
    linear = LrqScale(torch.randn(8, 16), search_steps(torch.randn(8, 16), 4), 4, 3, torch.Generator())
    full = FlexRoundScale(torch.randn(8, 16), search_steps(torch.randn(8, 16), 4), 4)
    assert linear.matrix_parameters() == [linear.left, linear.right] and full.matrix_parameters() == [full.matrix]


class LearnedLinear(nn.Module):
    """x W_hat^T, with W_hat at 3 bits and a scale of rank 2."""

    def __init__(self, weight: Tensor, *, renews: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rounding = LrqScale(weight, search_steps(weight, 3), 3, 2, generator, renews=renews)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rounding())


def test_renewed_factors_reach_a_matrix_of_more_than_their_rank() -> None:
    # Inputs that go together: for independent ones round-to-nearest is the best there is. What renewing is worth is noise at
    # this size; bench/quality.py measures it.
    weight, inputs = torch.randn(16, 32), torch.randn(8, 40, 8) @ torch.randn(8, 32)
    targets = inputs @ weight.T
    for renews in (False, True):
        block = LearnedLinear(weight, renews=renews)
        result = learn(block, inputs, targets, rate=0.02, iters=300, weight_decay=0.0)
        assert result.error_after == pytest.approx(error_of(block, inputs, targets), rel=1e-4)
        assert result.error_after < 0.75 * result.error_before
        factors = block.rounding.log_scale().matrix
        assert factors is not None
        matrix = (weight / block.rounding.weight).log() + factors
        assert (torch.linalg.matrix_rank(matrix, atol=1e-3) > 2) == renews


def test_a_small_output_is_learned_as_fast_as_a_large_one() -> None:
    # Adam's epsilon is 1e-8: without the scale, errors of 1e-12 would not be learned at all.
    torch.manual_seed(0)
    inputs = torch.randn(8, 5, WIDTH)
    gains = []
    for size in (1.0, 1e-6):
        block = Gain(1.0)
        learn(block, size * inputs, 1.5 * size * inputs, rate=0.02, iters=20)
        gains.append(block.gain.item())
    assert gains[0] == pytest.approx(gains[1], rel=1e-3) and gains[0] > 1.1


# --- running a block ---


def test_running_a_block_may_overwrite_its_inputs() -> None:
    values = torch.randn(7, 5, WIDTH).to(torch.bfloat16)
    cache, separate = states(values.clone()), states(torch.zeros(7, 5, WIDTH, dtype=torch.bfloat16))
    for target in (separate, cache):
        run_block(Gain(1.5), cache, target, {}, 3, torch.float32)
        assert torch.equal(target.stored, (values.float() * 1.5).to(torch.bfloat16))


def test_the_relative_error_is_that_of_the_rows_it_is_asked_for() -> None:
    inputs, targets = torch.randn(7, 5, WIDTH), torch.randn(7, 5, WIDTH)
    rows = [torch.tensor([4, 1]), torch.tensor([6])]
    found = relative_error(Gain(1.5), states(inputs), states(targets), {}, rows, torch.float32)
    assert found == pytest.approx(error_of(Gain(1.5), inputs[[4, 1, 6]], targets[[4, 1, 6]]), rel=1e-5)
