"""Watching what linear layers receive: every token, once, in order, and nothing left attached to the block."""

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.hidden_states import HiddenStates
from lrq_offline.layer_inputs import InputSample, sample_inputs, watch_inputs

CPU = torch.device("cpu")


class Block(nn.Module):
    """Two linear layers with a shift between them that is an argument of the call, as a mask or rotary table would be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)

    def forward(self, hidden: Tensor, *, shift: Tensor) -> Tensor:
        return self.second(self.first(hidden) + shift)


@pytest.fixture
def hidden() -> HiddenStates:
    return HiddenStates(torch.randn(7, 5, 8).to(torch.bfloat16), CPU)


ARGUMENTS = {"shift": torch.tensor(3.0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_observers_see_every_token_in_order_in_float32(hidden: HiddenStates, dtype: torch.dtype) -> None:
    block = Block()
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}
    watch_inputs(block, hidden, ARGUMENTS, {name: tensors.append for name, tensors in seen.items()}, hidden.slices(3), dtype)
    assert [len(x) for x in seen["first"]] == [15, 15, 5]
    assert all(x.dtype == torch.float32 and not x.requires_grad for tensors in seen.values() for x in tensors)
    tokens = hidden.stored.float().flatten(0, 1)
    assert torch.equal(torch.cat(seen["first"]), tokens)
    expected = (block.first(tokens) + 3).detach()
    torch.testing.assert_close(
        torch.cat(seen["second"]), expected, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03})
    )


def test_observers_compute_in_float32_also_where_products_do_not(hidden: HiddenStates) -> None:
    products: list[Tensor] = []
    watch_inputs(Block(), hidden, ARGUMENTS, {"first": lambda x: products.append(x.T @ x)}, hidden.slices(7), torch.bfloat16)
    tokens = hidden.stored.float().flatten(0, 1)
    assert products[0].dtype == torch.float32 and torch.equal(products[0], tokens.T @ tokens)


def test_a_block_is_left_without_observers_even_when_one_fails(hidden: HiddenStates) -> None:
    block = Block()

    def fail(x: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch_inputs(block, hidden, ARGUMENTS, {"first": fail}, hidden.slices(3), torch.float32)
    block(hidden.get(slice(0, 1)).float(), **ARGUMENTS)


def test_a_sample_has_the_extremes_of_all_tokens_widened_to_hold_zero() -> None:
    x = torch.randn(500, 6)
    x[:, 4], x[:, 5] = x[:, 4].abs() + 1, -x[:, 5].abs() - 1
    sample = InputSample(5, 10, torch.Generator())
    for batch in x.split(100):
        sample(batch)
    low, high = x.aminmax(dim=0)
    assert torch.equal(sample.low, low.clamp(max=0)) and torch.equal(sample.high, high.clamp(min=0))
    assert sample.low[4] == 0 and sample.high[5] == 0


@pytest.mark.parametrize(("wanted", "taken"), [(10, 10), (12, 15), (10_000, 500)])
def test_a_sample_takes_an_even_share_of_every_batch(wanted: int, taken: int) -> None:
    x = torch.arange(500.0).unsqueeze(1)
    sample = InputSample(5, wanted, torch.Generator())
    for batch in x.split(100):
        sample(batch)
    tokens = sample.tokens
    assert tokens.shape == (taken, 1)
    assert torch.bincount((tokens.flatten() // 100).long()).tolist() == [taken // 5] * 5


def test_a_sample_says_whether_all_inputs_were_finite_and_counts_the_others_as_zero() -> None:
    x = torch.randn(4, 3) + 5
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = x.clone()
        damaged[2, 1] = value
        sample = InputSample(3, 30, torch.Generator())
        for batch in (x, damaged, x):
            sample(batch)
        assert not sample.finite
        assert sample.tokens.isfinite().all() and sample.high.tolist() == x.amax(dim=0).tolist()
        assert sample.low.tolist() == [0, 0, 0]
    finite = InputSample(1, 30, torch.Generator())
    finite(x)
    assert finite.finite


def test_a_divided_sample_is_the_sample_of_divided_inputs() -> None:
    x, scale = torch.randn(100, 6), torch.rand(6) + 0.1
    divided, of_divided = (InputSample(1, 20, torch.Generator().manual_seed(3)) for _ in range(2))
    divided(x)
    divided.divide(scale)
    of_divided(x / scale)
    assert torch.equal(divided.tokens, of_divided.tokens)
    assert torch.equal(divided.low, of_divided.low) and torch.equal(divided.high, of_divided.high)


def test_samples_are_of_the_layers_that_were_named_and_come_from_the_generator_alone(hidden: HiddenStates) -> None:
    block = Block()

    def sampled() -> dict[str, InputSample]:
        generator = torch.Generator().manual_seed(5)
        return sample_inputs(block, hidden, ARGUMENTS, ["first", "second"], 16, generator, 3, torch.float32)

    first = sampled()
    torch.manual_seed(1)
    second = sampled()
    assert list(first) == ["first", "second"]
    for name, width in (("first", 8), ("second", 12)):
        # Three batches, a share of six tokens each, of which the last has only five.
        assert first[name].tokens.shape == (17, width)
        assert torch.equal(first[name].tokens, second[name].tokens)
