"""SmoothQuant: the float product stays what it was, and outliers in the activations stop costing anything."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.activation_ranges import OutputError, best_range
from lrq_offline.layer_inputs import InputSample
from lrq_offline.smoothquant import SharedHeads, divide_output, multiply_input, smoothing_scale
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import dequantize, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample_of(x: Tensor) -> InputSample:
    """A sample of x [tokens, in] with the extremes of all of it."""
    sample = InputSample(1, len(x), torch.Generator().manual_seed(0))
    sample(x)
    return sample


def scale_of(x: Tensor, weight: Tensor, heads: SharedHeads | None = None, weight_bits: int = 8) -> Tensor:
    return smoothing_scale(sample_of(x), weight, heads or SharedHeads(), weight_bits, 8)


def w8a8_error(x: Tensor, weight: Tensor) -> float:
    """Relative error of the product with the steps that a run would choose."""
    quantizer = best_range(x, x.min(), x.max(), weight, 8)
    steps = search_steps(weight, 8)
    x_hat, w_hat = (dequantize(quantize(t, *q, 8), *q) for t, q in ((x, quantizer), (weight, steps)))
    return OutputError(x, weight).of(x_hat, w_hat)


# --- the float model is unchanged ---


class Norm(nn.Module):
    """x times a gain, channel by channel: what is left of a norm once its input is normalised."""

    def __init__(self, gain: Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(gain)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight + self.offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_dividing_a_norm_and_multiplying_its_readers_leaves_their_products(stored: torch.dtype, offset: float) -> None:
    norm = Norm((torch.rand(32) + 0.1 - offset).to(stored).float(), offset)
    readers = [nn.Linear(32, 48), nn.Linear(32, 16, bias=False)]
    x = torch.randn(20, 32)
    before = [reader(norm(x)) for reader in readers]
    scale = divide_output(norm, torch.rand(32) * 10 + 0.01, stored, offset)
    assert torch.equal(norm.weight.to(stored).float(), norm.weight) and not torch.equal(scale, torch.ones_like(scale))
    for reader in readers:
        multiply_input(reader, scale)
    for product, reader in zip(before, readers, strict=True):
        torch.testing.assert_close(reader(norm(x)), product, rtol=1e-5, atol=1e-5)


def repeat_heads(values: Tensor, heads: SharedHeads) -> Tensor:
    """As grouped-query attention does (transformers' repeat_kv): [tokens, heads * size] to [tokens, heads * repeats * size]."""
    return values.unflatten(1, (-1, heads.size)).repeat_interleave(heads.repeats, dim=1).flatten(1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [SharedHeads(), SharedHeads(3, 4), SharedHeads(12, 1), SharedHeads(1, 12)], ids=str)
@pytest.mark.parametrize("before_them", [0, 9])
def test_dividing_a_linear_layer_and_multiplying_its_reader_leaves_the_product(
    before_them: int, heads: SharedHeads, bias: bool
) -> None:
    producer = nn.Linear(10, before_them + 24, bias=bias)  # the reader takes its last outputs
    reader = nn.Linear(24 * heads.repeats, 7)
    x = torch.randn(20, 10)
    others, outputs = producer(x).split((before_them, 24), dim=1)
    before = reader(repeat_heads(outputs, heads))
    scale = heads.largest(torch.rand(24 * heads.repeats) + 0.1)
    used = divide_output(producer, heads.once(scale), torch.float32)
    multiply_input(reader, heads.repeated(used))
    assert not torch.equal(used, torch.ones_like(used))
    others_after, outputs = producer(x).split((before_them, 24), dim=1)
    assert torch.equal(others_after, others)
    torch.testing.assert_close(reader(repeat_heads(outputs, heads)), before, rtol=1e-5, atol=1e-5)


# --- what is stored ---


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_a_norms_gain_is_exact_in_its_stored_dtype_and_the_scale_takes_up_the_rounding(stored: torch.dtype) -> None:
    weight = (torch.rand(200) + 0.1).to(stored).float()
    norm, wanted = Norm(weight.clone()), torch.rand(200) * 10 + 0.01
    used = divide_output(norm, wanted, stored)
    gain = norm.weight.detach()
    assert torch.equal(gain.to(stored).float(), gain)
    torch.testing.assert_close(used * gain, weight, rtol=2**-22, atol=0)
    torch.testing.assert_close(used, wanted, rtol=torch.finfo(stored).eps, atol=0)


@pytest.mark.parametrize(("gain", "scale"), [(0.0, 3.0), (1e-7, 100.0)], ids=["zero", "too small when divided"])
def test_a_gain_that_would_be_zero_stays_as_it_was(gain: float, scale: float) -> None:
    weight = torch.tensor([gain, 1.0]).half().float()
    norm = Norm(weight.clone())
    used = divide_output(norm, torch.full((2,), scale), torch.float16)
    assert norm.weight[0] == weight[0] and used[0] == 1
    assert norm.weight[1] != 1


def test_a_gain_of_one_and_a_stored_part_is_divided_as_near_to_the_scale_as_that_part_can_be_stored() -> None:
    weight = torch.tensor([0.5, -0.25, 0.0, 0.0])
    norm = Norm(weight.clone(), 1.0)
    used = divide_output(norm, torch.tensor([3.0, 0.5, 1.0, 1e4]), torch.bfloat16, gain_offset=1.0)
    # 1.5 / 3 - 1 and 0.75 / 0.5 - 1; 1 / 1e4 - 1 is -1 in bfloat16, which would leave no gain.
    assert norm.weight.tolist() == [-0.5, 0.5, 0.0, 0.0]
    assert used.tolist() == [3.0, 0.5, 1.0, 1.0]


def test_a_gain_that_is_too_large_for_its_stored_dtype_when_divided_stays_finite() -> None:
    norm = Norm(torch.ones(2))
    used = divide_output(norm, torch.tensor([1e-5, 2.0]), torch.float16)
    assert norm.weight.isfinite().all() and (used > 0).all()
    torch.testing.assert_close(used * norm.weight, torch.ones(2))


def test_a_bias_of_the_producer_is_exact_in_its_stored_dtype() -> None:
    producer = nn.Linear(10, 24)
    producer.bias.data = producer.bias.to(torch.bfloat16).float()
    scale, before = torch.rand(24) + 0.5, producer.bias.detach().clone()
    divide_output(producer, scale, torch.bfloat16)
    bias = producer.bias.detach()
    assert torch.equal(bias.to(torch.bfloat16).float(), bias)
    torch.testing.assert_close(bias * scale, before, rtol=2**-8, atol=0)


# --- the scale ---


def test_copies_of_one_output_share_its_scale() -> None:
    heads = SharedHeads(repeats=3, size=4)
    inputs = repeat_heads(torch.randn(50, 8) * torch.logspace(-1, 1, 8), heads)
    scale = scale_of(inputs, torch.randn(6, 24), heads)
    assert torch.equal(heads.repeated(heads.once(scale)), scale)
    assert torch.equal(repeat_heads(heads.once(scale).unsqueeze(0), heads)[0], scale)
    assert len(scale.unique()) == 8


def test_the_largest_among_copies_stands_for_all_of_them() -> None:
    values = torch.tensor([1.0, 9.0, 5.0, 2.0, 3.0, 4.0, 8.0, 7.0])
    assert SharedHeads(2, 2).largest(values).tolist() == [5, 9, 5, 9, 8, 7, 8, 7]
    assert SharedHeads().largest(values).tolist() == values.tolist()


def with_outliers(tokens: int = 200, channels: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs of which three channels are a hundred times larger, and a weight [out, in]."""
    x = torch.randn(tokens, channels)
    x[:, [3, 17, 40]] *= 100
    return x, torch.randn(48, channels)


@pytest.mark.parametrize("dead", ["input", "weight", "both"])
def test_dead_channels_get_scale_one(dead: str) -> None:
    x, weight = with_outliers()
    if dead != "weight":
        x[:, [3, 5]] = 0
    if dead != "input":
        weight[:, [3, 5]] = 0
    scale = scale_of(x, weight)
    assert scale[3] == scale[5] == 1
    assert (scale != 1).sum() > 50 and (scale > 0).all() and scale.isfinite().all()


def test_nothing_but_zeros_is_not_smoothed() -> None:
    assert scale_of(torch.zeros(5, 8), torch.zeros(3, 8)).tolist() == [1] * 8


@pytest.mark.parametrize("sign", ["both", "negative", "positive"])
def test_outlier_channels_cost_far_less_after_smoothing(sign: str) -> None:
    x, weight = with_outliers()
    x = {"both": x, "negative": -x.abs(), "positive": x.abs()}[sign]
    scale = scale_of(x, weight)
    assert scale[[3, 17, 40]].min() > scale[[0, 1, 2]].max()
    assert w8a8_error(x / scale, weight * scale) < 0.15 * w8a8_error(x, weight)


MADE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "even": lambda: (torch.randn(200, 64), torch.randn(48, 64)),
    "outliers": with_outliers,
    "outliers in the weight": lambda: (torch.randn(200, 64), with_outliers(48)[0]),
    "one token": lambda: (
        torch.randn(200, 64) * torch.ones(200, 1).index_fill(0, torch.tensor(7), 1000.0),
        torch.randn(48, 64),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_smoothing_does_no_harm(name: str) -> None:
    x, weight = MADE[name]()
    scale = scale_of(x, weight)
    # The scale is chosen with simpler steps than those that are used in the end: a little may be lost.
    assert w8a8_error(x / scale, weight * scale) < 1.1 * w8a8_error(x, weight)


def test_outliers_that_were_moved_out_of_the_weight_are_moved_back_whole() -> None:
    # The same function with channels multiplied by powers of two on one side and divided on the other.
    x, weight = torch.randn(200, 64), torch.randn(48, 64)
    factors = torch.ones(64)
    factors[[3, 17, 40]], factors[8] = 64.0, 1 / 32
    # To the last bits: max|X|^alpha is computed by pow().
    torch.testing.assert_close(scale_of(x * factors, weight / factors), scale_of(x, weight) * factors, rtol=1e-5, atol=0)
