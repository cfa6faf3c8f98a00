"""The kernels as torch ops: opaque to torch.compile, and otherwise the functions of reference.py."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.kernels import ops, reference
from lrq_vllm.kernels.reference import InputGrid, InputKind, IntegerWeight, QuantizedTokens
from tests.kernel_inputs import random_groups, random_weight


def op_calls(tokens: int) -> dict[str, tuple[object, tuple[object, ...]]]:
    """Name -> op and arguments, on the CPU."""
    x, bias = torch.randn(tokens, 33), torch.randn(5)
    q, step, zero_point = random_groups(4, 5, 33, 1)
    step_and_zero = [torch.tensor([0.02]), torch.tensor([130], dtype=torch.uint8)]
    quantized = reference.quantize_per_token(x)
    y, u, v = torch.randn(tokens, 5).half(), [torch.randn(2, 3), torch.randn(3, 3)], [torch.randn(33, 3), torch.randn(33, 3)]
    return {
        "add_low_rank": (ops.add_low_rank, (y, x.half(), u, v)),
        "quantize per token": (ops.quantize_input, (x, InputKind.PER_TOKEN, [])),
        "quantize static": (ops.quantize_input, (x, InputKind.STATIC, step_and_zero)),
        "quantize clipped": (ops.quantize_input, (x, InputKind.CLIPPED, [torch.tensor([0.9])])),
        "integer_linear 8": (ops.integer_linear, (*quantized, *random_weight(8, 5, 33)[:4], bias, 8, torch.float16)),
        "integer_linear 4": (ops.integer_linear, (*quantized, *random_weight(4, 5, 33)[:4], None, 4, torch.float32)),
        "weight_only_linear": (ops.weight_only_linear, (x.half(), pack(q, 4), step, zero_point, 4, bias)),
    }


OP_NAMES = [
    "add_low_rank",
    "quantize per token",
    "quantize static",
    "quantize clipped",
    "integer_linear 8",
    "integer_linear 4",
    "weight_only_linear",
]


def on(device: torch.device, arguments: tuple[object, ...]) -> tuple[object, ...]:
    def moved(value: object) -> object:
        return (
            value.to(device)
            if isinstance(value, Tensor)
            else [moved(one) for one in value]
            if isinstance(value, list)
            else value
        )

    return tuple(map(moved, arguments))


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("name", OP_NAMES)
def test_an_op_keeps_what_its_schema_and_its_fake_promise(device: torch.device, name: str, tokens: int) -> None:
    op, arguments = op_calls(tokens)[name]
    torch.library.opcheck(op, on(device, arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OP_NAMES)
def test_an_op_is_the_function_of_that_name_in_the_reference(device: torch.device, name: str) -> None:
    op, arguments = op_calls(3)[name]
    match name:
        case "integer_linear 8" | "integer_linear 4":
            *tensors, bias, bits, dtype = arguments
            x, weight = QuantizedTokens(*tensors[:4]), IntegerWeight(*tensors[4:], bits)
            expected = (reference.integer_linear(x, weight, bias, dtype),)
        case "add_low_rank":
            y, x, u, v = arguments
            expected = (reference.add_low_rank(y, x, list(zip(u, v, strict=True))),)
        case "weight_only_linear":
            expected = (reference.weight_only_linear(*arguments),)
        case _:
            x, kind, calibrated = arguments
            expected = reference.quantize_input(x, InputGrid(kind, tuple(calibrated)))
    result = op(*on(device, arguments))
    for actual, wanted in zip([result] if isinstance(result, Tensor) else result, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0 if wanted.dtype != torch.float16 else 1e-2, atol=0)


def test_without_tokens_an_op_gives_an_empty_result_of_the_right_shape(device: torch.device) -> None:
    for op, arguments in op_calls(0).values():
        result = op(*on(device, arguments))
        for tensor in [result] if isinstance(result, Tensor) else result:
            assert tensor.shape[0] == 0 and tensor.shape[1] in (1, 5, 33)


def test_fake_tensors_take_the_place_of_real_ones(device: torch.device) -> None:
    with FakeTensorMode():
        x = torch.empty(7, 33, device=device)
        assert [tuple(tensor.shape) for tensor in ops.quantize_input(x, InputKind.PER_TOKEN, [])] == [
            (7, 33),
            (7, 1),
            (7, 1),
            (7, 1),
        ]
