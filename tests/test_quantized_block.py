"""A block with fake-quantized linear layers: what they compute, and that holding or fixing weights changes nothing."""

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.affine import activation_quantizer, fake_quantize, fake_quantize_per_token
from lrq_offline.learned_scales import FixedRounding, LrqScale, Rounding
from lrq_offline.quantized_block import (
    FakeQuantizedLinear,
    fix_weights,
    held_weights,
    replace_linears,
)
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.schema import ActivationFormat

STATIC = StepAndZeroPoint(torch.tensor([0.05]), torch.tensor([100.0]))


def learned(linear: nn.Linear, dtype: torch.dtype = torch.float32) -> LrqScale:
    """A rounding of the layer's weight that has been learning for a while."""
    weight = linear.weight.detach()
    rounding = LrqScale(weight, search_steps(weight, 4), 4, 3, torch.Generator().manual_seed(0), dtype)
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return rounding


@pytest.fixture
def block() -> nn.Sequential:
    """Float, quantized with bias, float in between, quantized without bias."""
    made = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 8, bias=False))
    activation = activation_quantizer(ActivationFormat(8, static=False), None)
    replace_linears(made, {name: learned(made.get_submodule(name)) for name in ("1", "3")}, {"1": activation})
    return made


@pytest.mark.parametrize(
    ("rule", "static", "expected"),
    [
        (None, None, lambda x: x),
        (ActivationFormat(8, static=False), None, lambda x: fake_quantize_per_token(x, 8)),
        (ActivationFormat(8, static=True), STATIC, lambda x: fake_quantize(x, STATIC, 8)),
    ],
    ids=["16-bit", "per token", "static"],
)
def test_a_layer_multiplies_quantized_inputs_with_quantized_weights(rule, static, expected) -> None:
    linear = nn.Linear(24, 32)
    rounding, x = learned(linear), torch.randn(2, 5, 24)
    layer = FakeQuantizedLinear(rounding, linear.bias, activation_quantizer(rule, static))
    assert torch.equal(layer.quantized_input(x), expected(x))
    assert torch.equal(layer(x), nn.functional.linear(expected(x), rounding(), linear.bias))


def test_only_the_named_layers_are_replaced_and_biases_are_kept(block: nn.Sequential) -> None:
    assert [isinstance(module, FakeQuantizedLinear) for module in block] == [False, True, False, True]
    assert block[1].bias is not None and block[3].bias is None
    assert block[1].activation is not None and block[3].activation is None


def test_without_autocast_products_are_in_the_weights_dtype_and_with_it_in_autocasts(block: nn.Sequential) -> None:
    linear = nn.Linear(24, 32, bias=False)
    x = torch.randn(5, 24)
    half = FakeQuantizedLinear(learned(linear, torch.bfloat16), None, None)
    assert half(x).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block[1](x).dtype == half(x).dtype == torch.bfloat16


# --- held weights ---


class _Counting(Rounding):
    """Counts how often W_hat is computed, and notes whether with gradients."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding
        self.calls = 0

    def forward(self) -> Tensor:
        self.calls += 1
        return self.rounding()


def test_held_weights_are_computed_once_and_change_no_output(block: nn.Sequential) -> None:
    counting = block[1].rounding = _Counting(block[1].rounding)
    x = torch.randn(3, 16)
    expected = block(x)
    counting.calls = 0
    with held_weights(block):
        assert all(torch.equal(block(x), expected) for _ in range(3))
    assert counting.calls == 1


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_let_go_again_and_have_gradients(block: nn.Sequential, fails: bool) -> None:
    x = torch.randn(3, 16)
    if fails:
        with pytest.raises(ZeroDivisionError), held_weights(block):
            raise ZeroDivisionError
    else:
        with held_weights(block):
            pass
    with torch.no_grad():
        block[1].rounding.row.add_(0.5)
    moved = block(x)
    moved.sum().backward()
    assert block[1].rounding.row.grad is not None
    with held_weights(block):
        assert torch.equal(block(x), moved)


# --- fixed weights ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixing_changes_neither_the_integers_nor_the_outputs(dtype: torch.dtype) -> None:
    block = nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 8))
    replace_linears(block, {name: learned(block.get_submodule(name), dtype) for name in ("0", "2")}, {})
    x = torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        before = block(x).detach()
        integers = [block[i].rounding.quantized()[0] for i in (0, 2)]
        fix_weights(block, dtype)
        assert torch.equal(block(x), before)
    for i, q in zip((0, 2), integers, strict=True):
        assert isinstance(block[i].rounding, FixedRounding)
        assert torch.equal(block[i].rounding.quantized()[0], q)
    assert [name for name, parameter in block.named_parameters() if "rounding" in name] == []


def test_fixing_twice_is_fixing_once(block: nn.Sequential) -> None:
    fix_weights(block, torch.float32)
    x = torch.randn(3, 16)
    once = block(x)
    fix_weights(block, torch.float32)
    assert torch.equal(block(x), once)
