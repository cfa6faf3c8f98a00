"""Each Triton kernel against its twin in reference.py.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py). The reference is always evaluated on the
CPU. Letters as in reference.py: T tokens, N outputs, K inputs, G groups.
"""

import pytest
import torch
from torch import Tensor

from lrq_vllm.checkpoint.packing import pack, unpack
from lrq_vllm.kernels import activation_quant, clipped_count, cpu_groups, integer_gemm, reference, weight_only_gemm
from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens
from tests.kernel_inputs import (
    DOT_DTYPES,
    assert_close_products,
    assert_equal_products,
    assert_equal_tokens,
    random_groups,
    random_weight,
    tokens_on,
    weight_on,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# T and K. Rows of several blocks of inputs, of one and a bit, and of less than one.
TOKEN_SHAPES = [(1, 257), (7, 33), (16, 96), (129, 33)]
# T, N and K.
GEMM_SHAPES = [(1, 33, 257), (7, 96, 33), (16, 65, 96), (129, 33, 65)]


def uniform_weight(bits: int, value: int, zero_point: int, in_features: int) -> IntegerWeight:
    """Three channels that hold one integer throughout, on the unsigned grid."""
    q, zero_points = torch.full((3, in_features), value), torch.full((3, 1), zero_point, dtype=torch.uint8)
    return reference.integer_weight(pack(q, bits), torch.tensor([[0.3], [0.7], [1.1]]), zero_points, bits, in_features)


def uniform_tokens(value: int, zero_point: int, in_features: int) -> QuantizedTokens:
    """Two tokens that hold one integer throughout, on int8's grid."""
    q = torch.full((2, in_features), value, dtype=torch.int8)
    zero_points = torch.full((2, 1), zero_point, dtype=torch.int32)
    return QuantizedTokens(q, torch.tensor([[0.9], [1.3]]), zero_points, q.sum(dim=1, keepdim=True, dtype=torch.int32))


def assert_same_product(
    device: torch.device, x: QuantizedTokens, w: IntegerWeight, bias: Tensor | None, dtype: torch.dtype
) -> None:
    on_device = None if bias is None else bias.to(device)
    actual = integer_gemm.integer_linear(tokens_on(device, x), weight_on(device, w), on_device, dtype).cpu()
    expected = reference.integer_linear(x, w, bias, dtype)
    assert_equal_products(actual, expected, reference.integer_linear(x, w, bias, torch.float32))


# --- quantizing activations ---


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "in_features"), TOKEN_SHAPES)
def test_per_token_kernel_equals_its_reference(device: torch.device, tokens: int, in_features: int, dtype: torch.dtype) -> None:
    x = (torch.randn(tokens, in_features) * torch.logspace(-3, 3, tokens).unsqueeze(1)).to(dtype)
    assert_equal_tokens(activation_quant.quantize_per_token(x.to(device)), reference.quantize_per_token(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "in_features"), TOKEN_SHAPES)
def test_clipped_kernel_equals_its_reference(device: torch.device, tokens: int, in_features: int, dtype: torch.dtype) -> None:
    x, ratio = (torch.randn(tokens, in_features) * torch.logspace(-3, 3, tokens).unsqueeze(1)).to(dtype), torch.tensor([0.7])
    actual = activation_quant.quantize_clipped(x.to(device), ratio.to(device))
    assert_equal_tokens(actual, reference.quantize_clipped(x, ratio))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "in_features"), TOKEN_SHAPES)
def test_static_kernel_equals_its_reference(device: torch.device, tokens: int, in_features: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, in_features).to(dtype)
    step, zero_point = torch.tensor([0.017]), torch.tensor([119], dtype=torch.uint8)
    actual = activation_quant.quantize_static(x.to(device), step.to(device), zero_point.to(device))
    assert_equal_tokens(actual, reference.quantize_static(x, step, zero_point))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "in_features"), TOKEN_SHAPES)
def test_rows_with_a_step_each_equal_their_reference(
    device: torch.device, tokens: int, in_features: int, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, in_features).to(dtype)
    step = torch.rand(tokens, 1, dtype=torch.float32) * 0.05 + 0.001
    zero_point = torch.randint(0, 256, (tokens, 1), dtype=torch.uint8)
    actual = activation_quant.quantize_rows(x.to(device), step.to(device), zero_point.to(device))
    assert_equal_tokens(actual, reference.quantize_rows(x, step, zero_point))


# Rows of 1 and 4 values fill a power of two: nothing pads them with zeros.
HARD_ROWS = {
    "outliers": torch.tensor([-1e5, 0.3, -0.2, 1e5, 2.0]),
    "one outlier": torch.tensor([1e5, 0.3, -0.2, 0.0, 2.0]),
    "all equal": torch.full((4,), 0.37),
    "all equal and negative": torch.full((4,), -0.37),
    "all zero": torch.zeros(5),
    "negative zero": torch.full((5,), -0.0),
    "negative only": torch.tensor([-5.0, -4.2, -4.9, -3.0]),
    "positive only": torch.tensor([5.0, 4.2, 4.9, 3.0]),
    "ties": torch.tensor([-0.5, 0.5, 1.5, 2.5, 252.5]) + torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0]),
    "symmetric": torch.tensor([-1.0, 1.0, 0.5, -0.5, 0.0]),
    "nearly nothing": torch.tensor([1e-38, -1e-38, 3e-39, 0.0, 1e-45]),
    "one negative value": torch.tensor([-3.0]),
    "one positive value": torch.tensor([3.0]),
}


@pytest.mark.parametrize("name", HARD_ROWS)
def test_per_token_kernel_equals_its_reference_on_hard_rows(device: torch.device, name: str) -> None:
    x = HARD_ROWS[name].unsqueeze(0)
    assert_equal_tokens(activation_quant.quantize_per_token(x.to(device)), reference.quantize_per_token(x))


@pytest.mark.parametrize("name", HARD_ROWS)
def test_clipped_kernel_equals_its_reference_on_hard_rows(device: torch.device, name: str) -> None:
    x, ratio = HARD_ROWS[name].unsqueeze(0), torch.tensor([1.0])
    assert_equal_tokens(activation_quant.quantize_clipped(x.to(device), ratio.to(device)), reference.quantize_clipped(x, ratio))


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("name", HARD_ROWS)
def test_static_kernel_equals_its_reference_on_hard_rows(device: torch.device, name: str, zero_point: int) -> None:
    x, step, zero = HARD_ROWS[name].unsqueeze(0), torch.tensor([0.25]), torch.tensor([zero_point], dtype=torch.uint8)
    actual = activation_quant.quantize_static(x.to(device), step.to(device), zero.to(device))
    assert_equal_tokens(actual, reference.quantize_static(x, step, zero))


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("name", HARD_ROWS)
def test_clipped_values_are_counted_as_the_reference_counts(device: torch.device, name: str, zero_point: int) -> None:
    x, step, zero = torch.stack([HARD_ROWS[name]] * 2), torch.tensor([0.25]), torch.tensor([zero_point], dtype=torch.uint8)
    x[1] = 1e5  # another token: not looked at
    counts = torch.tensor([5, 100])
    wanted = counts + reference.count_clipped(x, step, zero)
    on_device = counts.to(device)
    clipped_count.count_clipped_(on_device, x.to(device), step.to(device), zero.to(device))
    assert on_device.tolist() == wanted.tolist()


def test_a_value_at_the_end_of_the_grid_is_not_clipped_and_one_beyond_it_is() -> None:
    step, zero_point = torch.tensor([0.5]), torch.tensor([3], dtype=torch.uint8)
    x = torch.tensor([[-1.5, 126.0, -1.74, 126.24, -1.76, 126.26]])  # places 0, 255, and on both sides of -0.5 and 255.5
    assert reference.count_clipped(x, step, zero_point).tolist() == [2, 6]
    assert reference.count_clipped(x[:0], step, zero_point).tolist() == [0, 0]


def test_quantizing_saturates_at_both_ends_of_the_grid(device: torch.device) -> None:
    x, step, zero_point = torch.tensor([[-1e5, 1e5, 0.0]]), torch.tensor([0.5]), torch.tensor([3], dtype=torch.uint8)
    tokens = activation_quant.quantize_static(x.to(device), step.to(device), zero_point.to(device))
    assert tokens.q.tolist() == [[-128, 127, 3 - 128]]


STRIDED = {
    "transposed": lambda x: x.t(),
    "every second input": lambda x: x[:, ::2],
    "every second token": lambda x: x[::2],
    "a middle part": lambda x: x[3:9, 5:27],
    "one token repeated": lambda x: x[:1].expand(6, -1),
}


@pytest.mark.parametrize("name", STRIDED)
def test_activations_may_have_any_strides(device: torch.device, name: str) -> None:
    x = STRIDED[name](torch.randn(12, 34))
    step, zero_point = torch.tensor([0.02]), torch.tensor([130], dtype=torch.uint8)
    strided = STRIDED[name](torch.zeros(12, 34, device=device))
    strided = x.to(device) if 0 in x.stride() else strided.copy_(x)
    dynamic = activation_quant.quantize_per_token(strided)
    static = activation_quant.quantize_static(strided, step.to(device), zero_point.to(device))
    assert_equal_tokens(dynamic, reference.quantize_per_token(x))
    assert_equal_tokens(static, reference.quantize_static(x, step, zero_point))


# --- the integer product ---


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tokens", "out_features", "in_features"), GEMM_SHAPES)
def test_integer_kernel_equals_its_reference(
    device: torch.device,
    tokens: int,
    out_features: int,
    in_features: int,
    bits: int,
    dtype: torch.dtype,
    has_bias: bool,
) -> None:
    x = reference.quantize_per_token(torch.randn(tokens, in_features) + 0.3)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    assert_same_product(device, x, random_weight(bits, out_features, in_features), bias, dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero_point", [0, 119, 255])
def test_integer_kernel_equals_its_reference_on_statically_quantized_tokens(
    device: torch.device, bits: int, zero_point: int
) -> None:
    step, zero = torch.tensor([0.017]), torch.tensor([zero_point], dtype=torch.uint8)
    x = reference.quantize_static(torch.randn(7, 96), step, zero)
    assert_same_product(device, x, random_weight(bits, 33, 96), None, torch.float32)


@pytest.mark.parametrize("x_zero_point", [-128, 127])
@pytest.mark.parametrize("x_value", [-128, 127])
@pytest.mark.parametrize("w_zero_point", ["lowest", "highest"])
@pytest.mark.parametrize("w_value", ["lowest", "highest"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_kernel_equals_its_reference_at_the_ends_of_both_grids(
    device: torch.device, bits: int, w_value: str, w_zero_point: str, x_value: int, x_zero_point: int
) -> None:
    ends = {"lowest": 0, "highest": 2**bits - 1}
    # 600 inputs: the sums of 8-bit weights pass 2^24, beyond which float32 has to round.
    weight = uniform_weight(bits, ends[w_value], ends[w_zero_point], 600)
    assert_same_product(device, uniform_tokens(x_value, x_zero_point, 600), weight, None, torch.float32)


@pytest.mark.parametrize(("x_value", "x_zero_point"), [(127, -128), (-128, 127), (127, 127)])
def test_integer_sums_are_exact_up_to_33025_inputs(device: torch.device, x_value: int, x_zero_point: int) -> None:
    in_features = 33_025  # 255 * 255 * 33,025 < 2^31
    x, weight = uniform_tokens(x_value, x_zero_point, in_features), uniform_weight(8, 255, 0, in_features)
    assert_same_product(device, x, weight, None, torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_kernel_gives_the_bias_for_a_token_of_zeros(device: torch.device, bits: int) -> None:
    x, bias = reference.quantize_per_token(torch.zeros(2, 33)), torch.randn(5)
    weight = weight_on(device, random_weight(bits, 5, 33))
    actual = integer_gemm.integer_linear(tokens_on(device, x), weight, bias.to(device), torch.float32)
    assert torch.equal(actual.cpu(), bias.expand(2, 5))


@pytest.mark.parametrize("kernel", ["triton", "cpu"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "out_features", "in_features", "groups"),
    [(1, 33, 64, 2), (7, 96, 96, 3), (70, 65, 384, 3), (7, 33, 192, 2)],  # the last: groups of 96, no multiple of a block
)
def test_steps_for_groups_of_inputs_multiply_each_group_s_integer_sum(
    device: torch.device, tokens: int, out_features: int, in_features: int, groups: int, has_bias: bool, kernel: str
) -> None:
    x = reference.quantize_per_token(torch.randn(tokens, in_features) * 3 + 0.3)
    weight = random_weight(4, out_features, in_features, groups)
    bias = torch.randn(out_features) if has_bias else None
    if kernel == "triton":
        on_device = None if bias is None else bias.to(device)
        y = integer_gemm.integer_linear(tokens_on(device, x), weight_on(device, weight), on_device, torch.float32).cpu()
    else:
        centred = (unpack(weight.q, 4, in_features).unflatten(1, (groups, -1)) - weight.zero_point.unsqueeze(2)).to(torch.int8)
        y = cpu_groups.grouped_linear(x, centred.transpose(0, 1), weight.step.T, bias, torch.float32)
    step = weight.step.repeat_interleave(in_features // groups, dim=1).double()
    zero_point = weight.zero_point.repeat_interleave(in_features // groups, dim=1)
    w = step * (unpack(weight.q, 4, in_features) - zero_point)
    x_hat = x.step.double() * (x.q.double() - x.zero_point)
    wanted = x_hat @ w.T + (0 if bias is None else bias.double())
    size = x_hat.abs() @ w.abs().T + 1
    assert ((y.double() - wanted).abs() <= 1e-6 * size).all()
    assert ((reference.integer_linear(x, weight, bias, torch.float32).double() - wanted).abs() <= 1e-6 * size).all()


# --- the weight-only product ---

WEIGHT_ONLY_SHAPES = [  # T, N, K, G
    (1, 33, 257, 1),
    (7, 96, 33, 1),
    (16, 65, 96, 3),
    (129, 33, 64, 2),
    (7, 33, 192, 2),  # groups of 96, which no block of 64 inputs divides
]


def assert_close_weight_only(
    device: torch.device, x: Tensor, q: Tensor, step: Tensor, zero_point: Tensor, bits: int, bias: Tensor | None
) -> None:
    weight = (pack(q, bits), step, zero_point)
    on_device = (tensor.to(device) for tensor in weight)
    actual = weight_only_gemm.weight_only_linear(
        x.to(device), *on_device, bits, None if bias is None else bias.to(device)
    ).cpu()
    expected = reference.weight_only_linear(x, *weight, bits, bias)
    size = x.float().abs() @ reference.dequantize_weight(*weight, bits, x.shape[1]).abs().t()
    assert_close_products(actual, expected, size if bias is None else size + bias.float().abs())


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "groups"), WEIGHT_ONLY_SHAPES)
def test_weight_only_kernel_is_close_to_its_reference(
    device: torch.device,
    tokens: int,
    out_features: int,
    in_features: int,
    groups: int,
    bits: int,
    has_bias: bool,
    dtype: torch.dtype,
) -> None:
    x = torch.randn(tokens, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    assert_close_weight_only(device, x, *random_groups(bits, out_features, in_features, groups), bits, bias)


@pytest.mark.parametrize("zero_point", ["lowest", "highest"])
@pytest.mark.parametrize("value", ["lowest", "highest"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_weight_only_kernel_is_close_to_its_reference_at_the_ends_of_the_grid(
    device: torch.device, bits: int, value: str, zero_point: str
) -> None:
    ends = {"lowest": 0, "highest": 2**bits - 1}
    q, zero_points = torch.full((5, 64), ends[value]), torch.full((5, 2), ends[zero_point], dtype=torch.uint8)
    x = torch.randn(3, 64).half()
    assert_close_weight_only(device, x, q, torch.rand(5, 2) * 0.1 + 0.01, zero_points, bits, None)


@pytest.mark.parametrize("name", STRIDED)
def test_weight_only_kernel_takes_activations_of_any_strides(device: torch.device, name: str) -> None:
    x = STRIDED[name](torch.randn(12, 34).half().to(device))
    q, step, zero_point = random_groups(4, 5, x.shape[1], 1)
    weight = [tensor.to(device) for tensor in (pack(q, 4), step, zero_point)]
    actual = weight_only_gemm.weight_only_linear(x, *weight, 4, None)
    assert torch.equal(actual, weight_only_gemm.weight_only_linear(x.contiguous(), *weight, 4, None))


def test_weight_only_kernel_keeps_outliers_apart_from_other_tokens(device: torch.device) -> None:
    x = torch.randn(2, 64).half()
    x[0] = 6e4
    q, step, zero_point = random_groups(4, 5, 64, 2)
    assert_close_weight_only(device, x, q, step * 1e-3, zero_point, 4, None)
