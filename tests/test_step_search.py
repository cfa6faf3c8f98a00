"""The search for a weight's first steps and zero-points, before anything is learned."""

import pytest
import torch
from torch import Tensor

from lrq_offline import stage_rounding
from lrq_offline.config import QuantizeSettings
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize, step_and_zero_point


def search_error(weight: Tensor, quantizer: StepAndZeroPoint, bits: int) -> Tensor:
    """sum |W - W_hat|^2.4 of each group, [out, groups]."""
    step, zero_point = (tensor.unsqueeze(2) for tensor in quantizer)
    grouped = weight.unflatten(1, (step.shape[1], -1))
    return (dequantize(quantize(grouped, step, zero_point, bits), step, zero_point) - grouped).abs().pow(2.4).sum(dim=2)


def weight_with_outliers(out_features: int = 12, in_features: int = 96) -> Tensor:
    return torch.randn(out_features, in_features) + 10 * (torch.rand(out_features, in_features) > 0.99)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
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


@pytest.mark.parametrize("outlier", [None, 15.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_steps_come_close_to_a_search_of_every_ratio_and_zero_point(bits: int, outlier: float | None) -> None:
    # LRQ's authors: 100 ratios of the range x every zero-point.
    weight = torch.randn(16, 256)
    if outlier is not None:
        weight[:, 5] = outlier
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    every = [
        search_error(weight, StepAndZeroPoint(step * (i / 100), torch.full_like(step, z)), bits)
        for i in range(1, 101)
        for z in range(2**bits)
    ]
    found = search_error(weight, search_steps(weight, bits), bits)
    assert found.sum() <= 1.002 * torch.stack(every).amin(dim=0).sum()


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


def test_steps_are_searched_in_float32_whatever_the_weights_dtype() -> None:
    weight = weight_with_outliers().to(torch.bfloat16)
    for found, expected in zip(search_steps(weight, 8), search_steps(weight.float(), 8), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_the_search_leaves_the_weight_as_it_was() -> None:
    weight = weight_with_outliers()
    before = weight.clone()
    search_steps(weight, 4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("at_once", [1, 3000, 2**24])
def test_weights_that_are_searched_together_have_the_steps_that_each_has_alone(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_rounding, "_SEARCHED_TOGETHER", at_once)
    settings = QuantizeSettings("w4a16", group_size=32)
    shapes = [(12, 96), (20, 96), (8, 64), (12, 96), (96, 12 * 32)]
    weights = {f"layer {place}": torch.randn(shape) for place, shape in enumerate(shapes)}
    found = stage_rounding.steps_of_all(weights, settings)
    assert set(found) == set(weights)
    for name, weight in weights.items():
        alone = stage_rounding.steps_of(weight, settings)
        assert torch.equal(found[name].step, alone.step) and torch.equal(found[name].zero_point, alone.zero_point)
