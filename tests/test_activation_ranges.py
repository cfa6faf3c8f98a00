"""Static activation ranges: exact where that is possible, and not decided by a token that matters little."""

import pytest
import torch
from torch import Tensor

from lrq_offline.activation_ranges import OutputError, best_range
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize, step_and_zero_point


def range_of(x: Tensor, weight: Tensor, bits: int = 8) -> StepAndZeroPoint:
    return best_range(x, x.min(), x.max(), weight, bits)


def rounded(x: Tensor, quantizer: StepAndZeroPoint, bits: int = 8) -> Tensor:
    return dequantize(quantize(x, *quantizer, bits), *quantizer)


def relative_errors(x: Tensor, weight: Tensor, quantizer: StepAndZeroPoint) -> Tensor:
    """|error of y|^2 / |y|^2 of each token."""
    error = (rounded(x, quantizer) - x) @ weight.T
    return error.square().sum(dim=1) / (x @ weight.T).square().sum(dim=1)


# --- the cost ---


def test_the_cost_is_the_mean_over_tokens_of_the_outputs_relative_squared_error() -> None:
    x, weight = torch.randn(30, 16), torch.randn(8, 16)
    other, other_weight = x + 0.1 * torch.randn(30, 16), weight + 0.1 * torch.randn(8, 16)
    cost, y = OutputError(x, weight), x @ weight.T
    for replaced, found in ((weight, cost.of(other)), (other_weight, cost.of(other, other_weight))):
        expected = ((other @ replaced.T - y).square().sum(dim=1) / y.square().sum(dim=1)).mean()
        assert found == pytest.approx(expected.item(), rel=1e-4)
    assert cost.of(x) == 0


def test_the_cost_does_not_depend_on_the_size_of_inputs_and_outputs() -> None:
    x, weight = torch.randn(30, 16), torch.randn(8, 16)
    other = x + 0.1 * torch.randn(30, 16)
    larger, cost = OutputError(x * 1000, weight / 7).of(other * 1000), OutputError(x, weight).of(other)
    assert larger.item() == pytest.approx(cost.item(), rel=1e-4)


def test_tokens_without_output_cost_no_more_than_their_size() -> None:
    x, weight = torch.randn(30, 16), torch.randn(8, 16)
    x[4] = 0
    assert 0 < OutputError(x, weight).of(x + 1e-3) < 1e-2
    assert OutputError(torch.zeros(5, 16), weight).of(torch.zeros(5, 16)) == 0


# --- the range ---


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_on_a_grid_recover_its_whole_range_exactly(bits: int, sign: int) -> None:
    q = torch.randint(0, 2**bits, (100, 32)).float()
    q[0, 0], q[0, 1] = 0, 2**bits - 1
    x = dequantize(q, torch.tensor(0.25), torch.tensor(5.0)) * sign
    quantizer = range_of(x, torch.randn(20, 32), bits)
    whole = step_and_zero_point(x.min().reshape(1), x.max().reshape(1), bits)
    assert torch.equal(quantizer.step, whole.step) and torch.equal(quantizer.zero_point, whole.zero_point)
    assert torch.equal(rounded(x, quantizer, bits), x)


@pytest.mark.parametrize(("offset", "size"), [(0.0, 1.0), (5.0, 1.0), (-5.0, 0.1), (0.0, 1e-4)], ids=str)
def test_zero_stays_exact(offset: float, size: float) -> None:
    x = torch.randn(100, 32) * size + offset
    quantizer = range_of(x, torch.randn(20, 32))
    assert quantizer.step.shape == quantizer.zero_point.shape == (1,)
    assert 0 <= quantizer.zero_point.item() <= 255 and quantizer.zero_point.item().is_integer()
    assert rounded(torch.zeros(1), quantizer).item() == 0


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_one_outlier_token_does_not_decide_the_range_of_all_others(size: float) -> None:
    x, weight = torch.randn(256, 32), torch.randn(20, 32)
    x[7, 3] = size
    whole = step_and_zero_point(x.min().reshape(1), x.max().reshape(1), 8)
    found, by_extremes = (relative_errors(x, weight, quantizer) for quantizer in (range_of(x, weight), whole))
    others = torch.arange(256) != 7
    assert found.mean() < 0.5 * by_extremes.mean()
    assert found[others].mean() < 0.2 * by_extremes[others].mean()


def test_channels_that_nobody_reads_do_not_decide_the_range() -> None:
    x, weight = torch.randn(256, 32), torch.randn(20, 32)
    x[:, 3], weight[:, 3] = 50 * x[:, 3], 0
    quantizer = range_of(x, weight)
    assert quantizer.step < 0.1 * step_and_zero_point(x.min(), x.max(), 8).step


def test_both_ends_of_the_range_are_found_for_themselves() -> None:
    # A long tail on one side that does not matter.
    x, weight = torch.randn(256, 32).clamp(min=-1), torch.randn(20, 32)
    x[:, 3], weight[:, 3] = 50 * x[:, 3].abs(), 0
    step, zero_point = range_of(x, weight)
    assert -1.1 < (-zero_point * step).item() < -0.8
    assert 2 < ((255 - zero_point) * step).item() < 8


@pytest.mark.parametrize("bits", [4, 8])
def test_the_range_is_never_worse_than_the_extremes(bits: int) -> None:
    for _ in range(5):
        x, weight = torch.randn(64, 32) * torch.randn(64, 1).exp(), torch.randn(20, 32)
        whole = step_and_zero_point(x.min().reshape(1), x.max().reshape(1), bits)
        cost = OutputError(x, weight)
        assert cost.of(rounded(x, range_of(x, weight, bits), bits)) <= cost.of(rounded(x, whole, bits))


def test_nothing_but_zeros_has_a_range_too() -> None:
    x = torch.zeros(10, 32)
    quantizer = range_of(x, torch.randn(20, 32))
    assert quantizer.step.item() > 0 and torch.equal(rounded(x, quantizer), x)
