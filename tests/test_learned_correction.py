"""A correction that is learned: where it starts, what a step does to it, and that W_hat and the branch are learned together."""

import pytest
import torch
from torch import Tensor

from lrq_offline.learned_correction import LearnedCorrection
from lrq_offline.quantized_block import FakeQuantizedLinear
from lrq_offline.stage_rounding import nearest
from lrq_offline.step_search import search_steps


def factors() -> tuple[Tensor, Tensor]:
    """U [6, 3] and V [10, 3] in 16 bits, whose columns differ a thousandfold; the last is zero."""
    sizes = torch.tensor([100.0, 0.1, 0.0])
    return torch.randn(6, 3).bfloat16(), (torch.randn(10, 3) * sizes).bfloat16()


def layer_with(u: Tensor, v: Tensor) -> FakeQuantizedLinear:
    weight = torch.randn(6, 10)
    layer = FakeQuantizedLinear(nearest(weight, search_steps(weight, 4), 4), torch.randn(6), None)
    layer.correct(u, v, torch.float32)
    return layer


def test_it_starts_with_the_factors_it_was_given() -> None:
    u, v = factors()
    learned = LearnedCorrection(u, v, torch.float32)
    for found in (learned.factors(), (learned.pair().u.float(), learned.pair().v.float())):
        for factor, expected in zip(found, (u, v), strict=True):
            torch.testing.assert_close(factor, expected.float(), rtol=1e-6, atol=0)
    layer, x = layer_with(u, v), torch.randn(4, 10)
    before = layer(x)
    layer.learn_correction()
    torch.testing.assert_close(layer(x), before)


def test_a_step_moves_columns_of_any_size_by_the_same_part_of_them() -> None:
    u, v = factors()
    learned = LearnedCorrection(u, v, torch.float32)
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1e-2, weight_decay=0.0)
    x, target = torch.randn(50, 10), torch.randn(50, 6)
    found_u, found_v = learned.factors()
    (x @ found_v @ found_u.T - target).square().sum().backward()
    optimizer.step()
    for factor, before in zip(learned.factors(), (u.float(), v.float()), strict=True):
        moved = (factor - before).square().mean(dim=0).sqrt()[:2] / before.square().mean(dim=0).sqrt()[:2]
        torch.testing.assert_close(moved, torch.full((2,), 1e-2), rtol=1e-2, atol=0)
    assert (learned.factors()[1][:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_products_have_the_dtype_that_is_asked_for_and_gradients_float32(dtype: torch.dtype) -> None:
    learned = LearnedCorrection(*factors(), dtype)
    u, v = learned.factors()
    assert u.dtype == v.dtype == dtype
    (u.float().sum() + v.float().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in learned.parameters())


def test_a_layer_without_a_correction_learns_none() -> None:
    weight = torch.randn(6, 10)
    layer = FakeQuantizedLinear(nearest(weight, search_steps(weight, 4), 4), None, None)
    layer.learn_correction()
    assert layer.correction is None


def test_what_it_has_become_takes_its_place() -> None:
    layer, x = layer_with(*factors()), torch.randn(4, 10)
    layer.learn_correction()
    assert len(list(layer.parameters())) == 2
    u, v = factors()
    layer.correct(u, v, torch.float32)
    assert layer.correction is None and not list(layer.parameters())
    expected = x @ layer.rounding().T + layer.bias + x @ v.float() @ u.float().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
