"""The weight fake-quantizer: its plain-torch form against the formula and autograd, its Triton form against plain torch."""

import pytest
import torch
from torch import Tensor

from lrq_offline import fake_quant_kernel as kernel
from lrq_offline import fake_quant_weight as twin
from lrq_offline.fake_quant_weight import LogScale
from lrq_offline.step_search import search_steps
from tests.formulas import straight_through_round

SHAPES = [(1, 32), (33, 96), (40, 288)]
PARTS = ["matrix", "row", "column"]


def arguments(
    shape: tuple[int, int], bits: int, group_size: int | None, parts: list[str], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, LogScale]:
    rows, columns = shape
    weight = torch.randn(shape)
    weight[0, 0] = 30.0
    step, zero_point = search_steps(weight, bits, group_size)
    shapes = {"matrix": shape, "row": (rows, 1), "column": (1, columns)}
    scale = LogScale(**{part: (torch.randn(shapes[part]) * 0.05).to(device) for part in parts})
    return weight.to(device), step.to(device), zero_point.to(device), scale


@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_formula_with_rounding_passed_straight_through(bits: int, group_size: int | None) -> None:
    weight, step, zero_point, scale = arguments((9, 288), bits, group_size, PARTS, torch.device("cpu"))
    leaves = [step.requires_grad_(), *(part.requires_grad_() for part in scale if part is not None)]
    matrix, row, column = leaves[1:]
    u = (weight * torch.exp(-(matrix + row + column))).unflatten(1, (step.shape[1], -1)) / step.unsqueeze(2)
    q = (straight_through_round(u) + zero_point.unsqueeze(2)).clamp(0, 2**bits - 1)
    expected = (step.unsqueeze(2) * (q - zero_point.unsqueeze(2))).flatten(1)
    found = twin.fake_quant_weight(weight, step, zero_point, scale, bits, torch.float32)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for got, want in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_integers_are_those_that_the_weight_is_made_of() -> None:
    weight, step, zero_point, scale = arguments((33, 96), 4, 32, PARTS, torch.device("cpu"))
    q = twin.integers(weight, step, zero_point, scale, 4).float().unflatten(1, (3, 32))
    made = (step.unsqueeze(2) * (q - zero_point.unsqueeze(2))).flatten(1)
    assert torch.equal(made, twin.forward(weight, step, zero_point, scale, 4, torch.float32))


@pytest.mark.parametrize("parts", [[], ["matrix"], ["matrix", "row"], PARTS], ids="+".join)
@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_kernel_rounds_as_its_twin_does(
    bits: int, shape: tuple[int, int], group_size: int | None, parts: list[str], device: torch.device
) -> None:
    if group_size is not None and shape[1] % group_size:
        pytest.skip("the group size does not divide")
    weight, step, zero_point, scale = arguments(shape, bits, group_size, parts, device)
    found = kernel.integers(weight, step, zero_point, scale, bits).int()
    expected = twin.integers(weight.cpu(), step.cpu(), zero_point.cpu(), _on_cpu(scale), bits).int().to(device)
    # exp() differs in its last bits: a value that lies within them of a tie may go either way.
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 2e-3
    made = kernel.forward(weight, step, zero_point, scale, bits, torch.float32).unflatten(1, (step.shape[1], -1))
    assert torch.equal(made, step.unsqueeze(2) * (found.unflatten(1, (step.shape[1], -1)) - zero_point.unsqueeze(2)))


@pytest.mark.parametrize("parts", [[], ["matrix", "row"], PARTS], ids="+".join)
@pytest.mark.parametrize("group_size", [None, 32, 96])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_gradients_are_its_twins(
    shape: tuple[int, int], group_size: int | None, parts: list[str], device: torch.device
) -> None:
    if group_size is not None and shape[1] % group_size:
        pytest.skip("the group size does not divide")
    weight, step, zero_point, scale = arguments(shape, 3, group_size, parts, device)
    # Away from ties, so that both round alike and the sums can be compared closely.
    weight = kernel.forward(weight, step, zero_point, scale, 3, torch.float32) + 0.2 * step.repeat_interleave(
        shape[1] // step.shape[1], dim=1
    )
    scale = LogScale(*(None if part is None else part * 0.1 for part in scale))
    upstream = torch.randn(shape, device=device)
    found = kernel.backward(upstream, weight, step, zero_point, scale, 3)
    expected = twin.backward(upstream, weight, step, zero_point, scale, 3)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 12, 33, 64])
def test_weights_above_each_other_are_scaled_as_each_alone(rows: int, device: torch.device) -> None:
    above = [arguments((rows, 96), 4, 32, PARTS, device) for _ in range(3)]
    weight, step, zero_point = (torch.cat(parts) for parts in zip(*(one[:3] for one in above), strict=True))
    scale = LogScale(*(torch.cat(parts) for parts in zip(*(one[3] for one in above), strict=True)))
    upstream = torch.randn(weight.shape, device=device)
    for module in (kernel, twin):
        found = module.backward(upstream, weight, step, zero_point, scale, 4)
        made = module.forward(weight, step, zero_point, scale, 4, torch.float32)
        for place, one in enumerate(above):
            alone = module.backward(upstream.chunk(3)[place], *one, 4)
            assert torch.equal(made.chunk(3)[place], module.forward(*one, 4, torch.float32))
            for got, want in zip(found, alone, strict=True):
                torch.testing.assert_close(got.chunk(3)[place], want)


def test_a_half_precision_matrix_gets_a_half_precision_gradient(device: torch.device) -> None:
    weight, step, zero_point, scale = arguments((33, 96), 4, None, ["matrix"], device)
    assert scale.matrix is not None
    half = LogScale(scale.matrix.half())
    gradients = kernel.backward(torch.randn(33, 96, device=device), weight, step, zero_point, half, 4)
    assert gradients.matrix is not None and gradients.matrix.dtype == torch.float16


def _on_cpu(scale: LogScale) -> LogScale:
    return LogScale(*(None if part is None else part.cpu() for part in scale))
