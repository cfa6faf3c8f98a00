"""reference.py against the formulas. Letters as there: T tokens, N outputs, K inputs, G groups."""

import pytest
import torch

from lrq_vllm.checkpoint.affine import dequantize, quantize, token_step_and_zero_point
from lrq_vllm.checkpoint.packing import pack, unpack
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.reference import QuantizedTokens
from tests.kernel_inputs import assert_equal_tokens, random_groups


@pytest.mark.parametrize("bits", [8, 4])
def test_reference_product_is_the_formula_in_whole_numbers(bits: int) -> None:
    q_w, z_w = torch.randint(0, 2**bits, (3, 11)), [0, 2**bits - 1, 5]
    q_x, z_x = torch.randint(0, 256, (2, 11)), [0, 255]
    step_w, step_x = [0.5, 0.25, 2.0], [0.125, 4.0]  # powers of two: the float arithmetic is exact
    zero_point = torch.tensor(z_w, dtype=torch.uint8).unsqueeze(1)
    weight = reference.integer_weight(pack(q_w, bits), torch.tensor(step_w).unsqueeze(1), zero_point, bits, 11)
    q = (q_x - 128).to(torch.int8)
    x = QuantizedTokens(
        q, torch.tensor(step_x).unsqueeze(1), torch.tensor(z_x).unsqueeze(1) - 128, q.sum(1, True, dtype=torch.int32)
    )
    expected = [
        [
            step_w[n]
            * step_x[t]
            * sum((w - z_w[n]) * (v - z_x[t]) for w, v in zip(q_w[n].tolist(), q_x[t].tolist(), strict=True))
            for n in range(3)
        ]
        for t in range(2)
    ]
    assert reference.integer_linear(x, weight, None, torch.float32).tolist() == expected


def test_reference_per_token_is_the_number_format_shifted_by_128() -> None:
    x = torch.randn(7, 33)
    step, zero_point = token_step_and_zero_point(x, 8)
    tokens = reference.quantize_per_token(x)
    assert torch.equal(tokens.q + 128.0, quantize(x, step, zero_point, 8))
    assert torch.equal(tokens.step, step)
    assert torch.equal(tokens.zero_point + 128.0, zero_point)


def test_reference_static_is_the_number_format_shifted_by_128() -> None:
    x, step, zero_point = torch.randn(7, 33), torch.tensor([0.017]), torch.tensor([119], dtype=torch.uint8)
    tokens = reference.quantize_static(x, step, zero_point)
    assert torch.equal(tokens.q + 128.0, quantize(x, step, zero_point.float(), 8))
    assert tokens.step.tolist() == [step.tolist()] * 7 and tokens.zero_point.tolist() == [[119 - 128]] * 7


def test_reference_totals_are_the_sums_of_the_integers() -> None:
    step, zero_point = torch.tensor([0.001]), torch.tensor([0], dtype=torch.uint8)
    x = torch.cat([torch.full((1, 33_025), 1.0), torch.full((1, 33_025), -1.0)])
    assert reference.quantize_static(x, step, zero_point).total.tolist() == [[127 * 33_025], [-128 * 33_025]]


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 3), (3, 1), (3, 3)])
def test_reference_weight_is_the_number_format(bits: int, groups: int) -> None:
    q, step, zero_point = random_groups(bits, 5, 96, groups)
    expected = dequantize(q.unflatten(1, (groups, -1)), step.unsqueeze(2), zero_point.float().unsqueeze(2)).flatten(1)
    assert torch.equal(reference.dequantize_weight(pack(q, bits), step, zero_point, bits, 96), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_reference_integer_weight_keeps_the_differences_and_their_sums(bits: int) -> None:
    q, step, zero_point = random_groups(bits, 5, 33, 1)
    weight = reference.integer_weight(pack(q, bits), step, zero_point, bits, 33)
    stored = weight.q.long() if bits == 8 else unpack(weight.q, bits, 33).long()
    differences = q - zero_point.long()
    assert torch.equal(stored - weight.zero_point.unsqueeze(1), differences)
    assert torch.equal(weight.total.long(), differences.sum(dim=1))


@pytest.mark.parametrize("bits", [8, 4])
def test_reference_product_is_that_of_the_numbers_the_integers_stand_for(bits: int) -> None:
    tokens = reference.quantize_per_token(torch.randn(7, 33))
    q, step, zero_point = random_groups(bits, 5, 33, 1)
    weight = reference.integer_weight(pack(q, bits), step, zero_point, bits, 33)
    x_hat = dequantize(tokens.q, tokens.step, tokens.zero_point.float())
    w_hat = reference.dequantize_weight(pack(q, bits), step, zero_point, bits, 33)
    expected = (x_hat.double() @ w_hat.double().t()).float()
    torch.testing.assert_close(reference.integer_linear(tokens, weight, None, torch.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_reference_weight_only_product_is_exact_linear_algebra_in_float32(bits: int) -> None:
    x, bias = torch.randn(7, 64), torch.randn(5)
    q, step, zero_point = random_groups(bits, 5, 64, 2)
    weight = (pack(q, bits), step, zero_point)
    expected = x @ reference.dequantize_weight(*weight, bits, 64).t() + bias
    torch.testing.assert_close(reference.weight_only_linear(x, *weight, bits, bias), expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [-10.0, -1.0, 0.0, 3.0])
def test_per_token_quantization_is_off_by_half_a_step_at_most(scale: float, offset: float) -> None:
    x = (torch.randn(50, 97) + offset) * scale
    tokens = reference.quantize_per_token(x)
    x_hat = dequantize(tokens.q, tokens.step, tokens.zero_point.float())
    # x / step is rounded to float32 before it is rounded to an integer: an error of 255 * 2^-24 steps.
    assert ((x - x_hat).abs() <= tokens.step * (0.5 + 255 * 2**-23)).all()


@pytest.mark.gpu
def test_the_reference_gives_the_same_integers_on_a_gpu(device: torch.device) -> None:
    x = torch.randn(129, 257)
    assert_equal_tokens(reference.quantize_per_token(x.to(device)), reference.quantize_per_token(x))
