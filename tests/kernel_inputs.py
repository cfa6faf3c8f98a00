"""What the tests of dense and of grouped kernels share: random weights, and what counts as the same result."""

import os

import pytest
import torch
from torch import Tensor

from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Of activations that are not quantized. The interpreter multiplies the bit patterns of bfloat16 numbers.
DOT_DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Twice the sum of the roundings that separate kernel and reference, of W_hat once and of y twice, in units of
# sum_k |x| |W_hat|: float16 rounds to 2^-11, bfloat16 to 2^-8.
WEIGHT_ONLY_TOLERANCE = {torch.float16: 6 * 2**-11, torch.bfloat16: 6 * 2**-8}


def tokens_on(device: torch.device, tokens: QuantizedTokens) -> QuantizedTokens:
    return QuantizedTokens(*(tensor.to(device) for tensor in tokens))


def weight_on(device: torch.device, weight: IntegerWeight) -> IntegerWeight:
    *tensors, bits = weight
    return IntegerWeight(*(tensor.to(device) for tensor in tensors), bits)


def random_weight(bits: int, out_features: int, in_features: int, groups: int = 1) -> IntegerWeight:
    """Integers over the whole grid, steps of several sizes, zero-points that include both ends."""
    q = torch.randint(0, 2**bits, (out_features, in_features))
    zero_point = torch.randint(0, 2**bits, (out_features, groups)).to(torch.uint8)
    zero_point[0], zero_point[-1] = 0, 2**bits - 1
    step = torch.rand(out_features, groups) * 0.1 + 1e-3
    return reference.integer_weight(pack(q, bits), step, zero_point, bits, in_features)


def random_groups(bits: int, out_features: int, in_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    zero_point = torch.randint(0, 2**bits, (out_features, groups)).to(torch.uint8)
    zero_point[0], zero_point[-1] = 0, 2**bits - 1
    return (
        torch.randint(0, 2**bits, (out_features, in_features)),
        torch.rand(out_features, groups) * 0.1 + 0.01,
        zero_point,
    )


def assert_equal_products(actual: Tensor, expected: Tensor, exact: Tensor) -> None:
    """exact: ``expected`` before it was rounded from float32."""
    accepted = [expected]
    if INTERPRETED and expected.dtype == torch.bfloat16:
        # The interpreter drops the last bits of a float32 where a GPU rounds it to bfloat16.
        accepted.append((exact.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16())
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert any(torch.equal(actual, one) for one in accepted)


def assert_close_products(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """size: sum_k |x| |W_hat|, and the bias's."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    excess = (actual.float() - expected.float()).abs() - WEIGHT_ONLY_TOLERANCE[expected.dtype] * size
    assert (excess <= 0).all()


def assert_equal_tokens(actual: QuantizedTokens, expected: QuantizedTokens) -> None:
    for name, ours, theirs in zip(QuantizedTokens._fields, actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert torch.equal(ours.cpu(), theirs), name
