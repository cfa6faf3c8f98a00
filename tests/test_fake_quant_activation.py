"""The activation fake-quantizer: its plain-torch form against the formula and autograd, its Triton form against plain torch."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrq_offline import affine as twin
from lrq_offline import fake_quant_activation_kernel as kernel
from lrq_offline.affine import activation_quantizer, fake_quantize, fake_quantize_clipped, fake_quantize_per_token
from lrq_offline.learned_scales import FixedRounding
from lrq_offline.quantized_block import FakeQuantizedLinear
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, clipped_token_step_and_zero_point, token_step_and_zero_point
from lrq_vllm.checkpoint.schema import ActivationFormat
from tests.formulas import straight_through_round

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# Tokens and columns. Columns of one, of a power of two and around it, of more than a program's usual tile.
SHAPES = [(1, 1), (300, 1), (7, 33), (129, 64), (3, 4096), (2, 4097), (2, 14336)]
# 3 and 8 bits: the step is no power of two. x / step reaches both ends of the grid and far beyond.
STATIC = {
    3: StepAndZeroPoint(torch.tensor([0.37]), torch.tensor([3.0])),
    8: StepAndZeroPoint(torch.tensor([0.011]), torch.tensor([97.0])),
}


def random(tokens: int, columns: int) -> Tensor:
    return torch.randn(tokens, columns) * torch.logspace(-2, 2, tokens).unsqueeze(1)


def ties(tokens: int, columns: int) -> Tensor:
    """Halves from -127.5 to 127.5: every second one is a tie, and 127.5 rounds to a place above the grid."""
    x = torch.randint(-255, 256, (tokens, columns)) / 2
    x[:, 0], x[:, -1] = -127.5, 127.5
    return x


def huge(tokens: int, columns: int) -> Tensor:
    """Of the order of 1e30; float16 ends at 65504 and gets the largest that it has."""
    return torch.randn(tokens, columns) * 1e30


def wide(tokens: int, columns: int) -> Tensor:
    """Sizes from 1e-4 to 1e12: quotients that float32 holds with a fraction, without one, and not even to the unit."""
    return torch.randn(tokens, columns) * 10 ** (torch.rand(tokens, columns) * 16 - 4)


def constant(value: float) -> Callable[[int, int], Tensor]:
    return lambda tokens, columns: torch.full((tokens, columns), value)


INPUTS = {
    "random": random, "ties": ties, "huge": huge, "wide": wide,
    "zero": constant(0.0), "constant": constant(1.7), "negative": constant(-0.3),
}  # fmt: skip


def made(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return INPUTS[kind](*shape).clamp(-largest / 4, largest / 4).to(dtype)


def quantizer_on(device: torch.device, quantizer: StepAndZeroPoint | None) -> StepAndZeroPoint | None:
    return None if quantizer is None else StepAndZeroPoint(*(tensor.to(device) for tensor in quantizer))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to ``dtype`` as the kernel's device does it: the interpreter drops the bits that bfloat16 has no room for."""
    if INTERPRETED and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    return x.to(dtype)


def assert_kernel_is_twin(x: Tensor, quantizer: StepAndZeroPoint | None, bits: int, device: torch.device) -> None:
    expected = twin.forward(x, quantizer, bits, torch.float32, with_inside=True)
    found = kernel.forward(x.to(device), quantizer_on(device, quantizer), bits, torch.float32, with_inside=True)
    assert found.inside is not None and expected.inside is not None
    assert torch.isfinite(expected.x_hat).all()
    assert torch.equal(found.x_hat.cpu(), expected.x_hat)
    assert torch.equal(found.inside.cpu(), expected.inside)


# --- plain torch against the formula ---


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("static", [True, False], ids=["static", "per_token"])
@pytest.mark.parametrize("bits", [3, 8])
def test_values_and_gradients_are_those_of_the_formula_with_rounding_passed_straight_through(
    bits: int, static: bool, kind: str
) -> None:
    x = made(kind, (9, 65), torch.float32).requires_grad_()
    step, zero_point = STATIC[bits] if static else token_step_and_zero_point(x.detach(), bits)
    q = (straight_through_round(x / step) + zero_point).clamp(0, 2**bits - 1)
    expected = step * (q - zero_point)
    found = fake_quantize(x, STATIC[bits], bits) if static else fake_quantize_per_token(x, bits)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(x)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    (got,) = torch.autograd.grad(found, x, upstream)
    # Autograd multiplies by the step and divides by it again; here the gradient is upstream's, exactly.
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    assert torch.equal(got, upstream * (wanted != 0))


@pytest.mark.parametrize("kind", INPUTS)
def test_clipped_tokens_are_those_of_the_formula_and_what_is_cut_off_takes_no_gradient(kind: str) -> None:
    x, clip = made(kind, (9, 65), torch.float32).requires_grad_(), torch.tensor([0.6])
    step, zero_point = clipped_token_step_and_zero_point(x.detach(), clip, 4)
    q = (straight_through_round(x / step) + zero_point).clamp(0, 15)
    expected, found = step * (q - zero_point), fake_quantize_clipped(x, clip, 4)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(x)
    (wanted,), (got,) = (torch.autograd.grad(y, x, upstream) for y in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    if kind == "random":
        assert 0 < (got == 0).float().mean() < 1


def test_an_input_of_any_shape_and_layout_keeps_its_shape() -> None:
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    per_row = torch.stack([fake_quantize_per_token(row, 8) for row in x.reshape(-1, 8)]).view(2, 3, 5, 8)
    assert torch.equal(fake_quantize_per_token(x, 8), per_row)
    assert torch.equal(fake_quantize(x, STATIC[8], 8), fake_quantize(x.contiguous(), STATIC[8], 8))
    assert fake_quantize_per_token(torch.empty(0, 4, 8), 8).shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("of_x", FLOATS, ids=str)
def test_only_the_result_is_rounded_to_the_wanted_dtype(of_x: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    x = made("random", (7, 33), of_x).to(device).requires_grad_()
    static = activation_quantizer(ActivationFormat(8, static=True), quantizer_on(device, STATIC[8]))
    per_token = activation_quantizer(ActivationFormat(8, static=False), None)
    for quantize in (static, per_token):
        assert quantize is not None
        x_hat = quantize(x, dtype)
        assert x_hat.dtype == dtype
        assert torch.equal(x_hat, quantize(x.detach().float(), torch.float32).to(dtype))
        (gradient,) = torch.autograd.grad(x_hat.float().sum(), x)
        assert gradient.dtype == of_x


def test_no_mask_is_made_for_an_input_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(*arguments: object, with_inside: bool) -> twin.FakeQuantized:
        asked.append(with_inside)
        return original(*arguments, with_inside=with_inside)  # type: ignore[arg-type]

    original = twin.forward
    monkeypatch.setattr(twin, "forward", watched)
    x = torch.randn(3, 8)
    fake_quantize_per_token(x, 8)
    fake_quantize_per_token(x.requires_grad_(), 8)
    assert asked == [False, True]


@pytest.mark.parametrize("static", [STATIC[8], None], ids=["static", "per_token"])
def test_a_layer_that_asks_for_half_precision_gives_what_autocast_would(
    static: StepAndZeroPoint | None, device: torch.device
) -> None:
    static = quantizer_on(device, static)
    activation = activation_quantizer(ActivationFormat(8, static is not None), static)
    assert activation is not None
    step = torch.full((16, 1), 0.1, device=device)
    q = torch.randint(0, 256, (16, 32), dtype=torch.uint8, device=device)
    rounding = FixedRounding(q, StepAndZeroPoint(step, torch.full_like(step, 128)), torch.bfloat16)
    layer = FakeQuantizedLinear(rounding, torch.randn(16, device=device), activation)
    x, upstream = torch.randn(5, 32, device=device, requires_grad=True), torch.randn(5, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        found = layer(x)
        expected = torch.nn.functional.linear(activation(x, torch.float32), rounding(), layer.bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y.float(), x, upstream)[0] for y in (found, expected)]
    assert torch.equal(*gradients)
    assert torch.equal(layer.quantized_input(x), activation(x, torch.float32))


# --- Triton against plain torch ---


@pytest.mark.parametrize("quantizer", [STATIC[8], None], ids=["static", "per_token"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_the_kernel_rounds_as_its_twin_does(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, quantizer: StepAndZeroPoint | None, device: torch.device
) -> None:
    assert_kernel_is_twin(made(kind, shape, dtype), quantizer, 8, device)


@pytest.mark.parametrize("static", [True, False], ids=["static", "per_token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_kernel_rounds_to_any_number_of_bits_as_its_twin_does(bits: int, static: bool, device: torch.device) -> None:
    quantizer = StepAndZeroPoint(torch.tensor([0.4]), torch.tensor([1.0])) if static else None
    assert_kernel_is_twin(made("random", (33, 96), torch.float32), quantizer, bits, device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_takes_a_step_for_each_token_as_its_twin_does(shape: tuple[int, int], device: torch.device) -> None:
    x = made("random", shape, torch.float32)
    assert_kernel_is_twin(x, clipped_token_step_and_zero_point(x, torch.tensor([0.6]), 4), 4, device)
    uneven = StepAndZeroPoint(torch.rand(len(x), 1) + 0.1, torch.randint(0, 16, (len(x), 1)).float())
    assert_kernel_is_twin(x, uneven, 4, device)


@pytest.mark.parametrize("quantizer", [STATIC[8], None], ids=["static", "per_token"])
def test_the_kernel_reads_any_layout(quantizer: StepAndZeroPoint | None, device: torch.device) -> None:
    x = made("random", (34, 66), torch.float32)
    for view in (x.T, x[::2], x[:, ::3], x[1:, 1:], x[:1].expand(5, -1)):
        assert_kernel_is_twin(view, quantizer, 8, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", [STATIC[8], None], ids=["static", "per_token"])
def test_the_kernel_rounds_its_result_to_the_wanted_dtype(
    quantizer: StepAndZeroPoint | None, dtype: torch.dtype, device: torch.device
) -> None:
    x = made("random", (33, 96), torch.float32)
    expected = rounded(twin.forward(x, quantizer, 8, torch.float32, with_inside=False).x_hat, dtype)
    found = kernel.forward(x.to(device), quantizer_on(device, quantizer), 8, dtype, with_inside=False)
    assert found.inside is None
    assert torch.equal(found.x_hat.cpu(), expected)


@pytest.mark.parametrize("of_x", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 4097)], ids=str)
def test_the_kernels_gradients_are_its_twins(
    shape: tuple[int, int], dtype: torch.dtype, of_x: torch.dtype, device: torch.device
) -> None:
    inside = torch.rand(shape) < 0.7
    for upstream in (
        torch.randn(shape).to(dtype),
        torch.randn(shape[::-1]).to(dtype).T,
        torch.ones((), dtype=dtype).expand(shape),
    ):
        found = kernel.backward(upstream.to(device), inside.to(device), of_x)
        assert torch.equal(found.cpu(), rounded(twin.backward(upstream, inside, torch.float32), of_x))


@pytest.mark.parametrize("quantizer", [STATIC[8], None], ids=["static", "per_token"])
def test_what_is_not_a_number_stays_so(quantizer: StepAndZeroPoint | None, device: torch.device) -> None:
    x = torch.randn(4, 33)
    x[2, 5] = torch.nan
    for module, where in ((twin, torch.device("cpu")), (kernel, device)):
        x_hat = module.forward(x.to(where), quantizer_on(where, quantizer), 8, torch.float32, with_inside=False).x_hat
        assert x_hat[2, 5].isnan() and torch.isfinite(x_hat[[0, 1, 3]]).all()


def test_the_kernel_takes_no_tokens_at_all(device: torch.device) -> None:
    x = torch.empty((0, 33), device=device)
    found = kernel.forward(x, None, 8, torch.float32, with_inside=True)
    assert found.inside is not None and found.x_hat.shape == found.inside.shape == x.shape
    assert kernel.backward(x, found.inside, torch.float32).shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [14336, 28672])
@pytest.mark.parametrize("static", [True, False], ids=["static", "per_token"])
def test_a_cuda_graph_of_both_kernels_gives_what_the_processor_does(static: bool, columns: int, device: torch.device) -> None:
    quantizer = quantizer_on(device, STATIC[8])
    assert quantizer is not None
    x = torch.zeros(256, columns, device=device, requires_grad=True)
    upstream = torch.randn(256, columns, device=device).bfloat16()

    def step() -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            x_hat = fake_quantize(x, quantizer, 8, torch.bfloat16) if static else fake_quantize_per_token(x, 8, torch.bfloat16)
        return x_hat, torch.autograd.grad(x_hat, x, upstream)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x_hat, gradient = step()
    values = made("random", (256, columns), torch.float32)
    with torch.no_grad():
        x.copy_(values)
    graph.replay()
    expected = twin.forward(values, STATIC[8] if static else None, 8, torch.bfloat16, with_inside=True)
    assert expected.inside is not None
    assert torch.equal(x_hat.cpu(), expected.x_hat)
    assert torch.equal(gradient.cpu(), twin.backward(upstream.cpu(), expected.inside, torch.float32))
