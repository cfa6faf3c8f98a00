"""The number format against its definition, and the fake quantizers of activations, which are the same with gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrq_offline.affine import fake_quantize, fake_quantize_per_token
from lrq_vllm.checkpoint.affine import (
    StepAndZeroPoint,
    dequantize,
    quantize,
    step_and_zero_point,
    token_step_and_zero_point,
)

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
