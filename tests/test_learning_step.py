"""One step of learning: what each parameter's rate and decay are, and what the losses mean."""

import itertools
import math

import pytest
import torch
from torch import nn

from lrq_offline.hidden_states import BatchFeeder, HiddenStates
from lrq_offline.learning_step import LearningStep, ParameterGroup, block_loss
from tests.learned_blocks import WIDTH, Gain, states


def test_the_learning_rate_falls_from_its_start_to_zero_by_a_half_cosine() -> None:
    inputs = torch.ones(1, 1, WIDTH)
    block = Gain(1.0)
    feeder = BatchFeeder(states(inputs), states(1000 * inputs), torch.zeros(8, 1, dtype=torch.int64))
    step = LearningStep(block, [ParameterGroup([block.gain], 0.1)], feeder, {}, steps=8, scale=1.0, dtype=torch.float32)
    values = [block.gain.item()]
    for number in range(8):
        step.run(number)
        values.append(block.gain.item())
    # The gradient hardly changes, so each of Adam's steps is as long as the rate.
    taken = [after - before for before, after in itertools.pairwise(values)]
    expected = [0.05 * (1 + math.cos(math.pi * number / 8)) for number in range(8)]
    assert taken == pytest.approx(expected, rel=1e-2)


def test_each_group_has_its_own_rate() -> None:
    block = nn.Linear(1, 1)
    with torch.no_grad():
        block.weight.fill_(1.0)
        block.bias.fill_(1.0)
    inputs = torch.ones(1, 1, 1)
    feeder = BatchFeeder(states(inputs), states(1000 * inputs), torch.zeros(1, 1, dtype=torch.int64))
    groups = [ParameterGroup([block.weight], 0.1), ParameterGroup([block.bias], 0.02)]
    LearningStep(block, groups, feeder, {}, steps=1, scale=1.0, dtype=torch.float32).run(0)
    assert [block.weight.item(), block.bias.item()] == pytest.approx([1.1, 1.02], rel=1e-5)


def test_only_the_decayed_parameters_shrink_by_rate_times_decay() -> None:
    block = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        block.weight.fill_(2.0)
        block.bias.fill_(2.0)
    inputs = torch.randn(1, 3, WIDTH)
    # The targets are what the block puts out, so that nothing but the decay moves a parameter.
    feeder = BatchFeeder(states(inputs), states(block(inputs).detach()), torch.zeros(1, 1, dtype=torch.int64))
    step = LearningStep(
        block, [ParameterGroup([block.weight], 0.1, 0.5), ParameterGroup([block.bias], 0.1)], feeder, {},
        steps=1, scale=1.0, dtype=torch.float32,
    )  # fmt: skip
    step.run(0)
    torch.testing.assert_close(block.weight, torch.full_like(block.weight, 2.0 * (1 - 0.1 * 0.5)))
    torch.testing.assert_close(block.bias, torch.full_like(block.bias, 2.0))


def test_losses_are_divided_by_the_scale_and_land_at_their_step() -> None:
    inputs = torch.ones(3, 1, WIDTH)
    targets = torch.tensor([2.0, 3.0, 5.0]).view(3, 1, 1) * inputs
    block = Gain(1.0)
    feeder = BatchFeeder(states(inputs), states(targets), torch.tensor([[2], [0], [1]]))
    step = LearningStep(block, [ParameterGroup([block.gain], 1e-6)], feeder, {}, steps=3, scale=4.0, dtype=torch.float32)
    for number in range(3):
        step.run(number)
    assert step.losses.tolist() == pytest.approx([4.0, 0.25, 1.0], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_the_mean_squared_difference_in_float32(dtype: torch.dtype) -> None:
    inputs, targets = torch.randn(2, 5, WIDTH).to(torch.bfloat16), torch.randn(2, 5, WIDTH).to(torch.bfloat16)
    block = nn.Linear(WIDTH, WIDTH)
    loss = block_loss(block, inputs, targets, {}, dtype)
    expected = (block(inputs.float()) - targets.float()).square().mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_steps_replayed_as_a_graph_are_the_steps_of_the_cpu(pinned: bool) -> None:
    inputs, targets = torch.randn(12, 5, WIDTH), torch.randn(12, 5, WIDTH)
    batches = torch.stack([torch.randperm(12)[:3] for _ in range(30)])
    start = nn.Linear(WIDTH, WIDTH)
    found = []
    for device in ("cpu", "cuda"):
        block = nn.Linear(WIDTH, WIDTH).to(device)
        block.load_state_dict(start.state_dict())
        on_device = device == "cuda" and not pinned
        sources = [HiddenStates(t.cuda() if on_device else t.pin_memory(), torch.device(device)) for t in (inputs, targets)]
        step = LearningStep(
            block, [ParameterGroup([block.weight], 0.03, 0.5), ParameterGroup([block.bias], 0.01)],
            BatchFeeder(*sources, batches), {}, steps=30, scale=2.0, dtype=torch.float32,
        )  # fmt: skip
        for number in range(30):
            step.run(number)
        step.wait()
        found.append([tensor.detach().cpu() for tensor in (block.weight, block.bias, step.losses)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-4)
