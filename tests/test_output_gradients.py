"""The Fisher information of blocks' outputs: what the whole model's gradients give, and what a block learns by it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.block_learning import LearningWindows, learn_block
from lrq_offline.calibration import first_block_inputs
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import blocks_of, empty_model, load_block
from lrq_offline.hidden_states import HiddenStates, HiddenStatesStore
from lrq_offline.output_gradients import OutputGradients, drawn_tokens, some_windows
from lrq_offline.output_metric import PLAIN, OutputMetric, fisher_metric
from lrq_offline.ranks import ONE_RANK
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import SourceModel
from tests.checkpoints import FAMILIES, TINY, write_random_model

CPU = torch.device("cpu")


def moments_block_by_block(folder: Path, tokens: Tensor, scratch: Path) -> Tensor:
    """Window number n is drawn with seed n."""
    source = SourceModel.open(folder)
    model = empty_model(source.config)
    first = first_block_inputs(source, model, tokens, torch.float32)

    def load(index: int) -> nn.Module:
        return load_block(model, source.block_names[index], source.read, torch.float32, CPU)

    store, width = HiddenStatesStore(CPU, 0, scratch), source.config.hidden_size
    moments = store.like((len(source.block_names), width, width), torch.float32)
    gradients = OutputGradients(model, source.family, load, source.read_tied, store, torch.float32, ONE_RANK)
    gradients.moments(tokens, first.hidden, first.arguments, range(len(tokens)), moments)
    return moments.get(slice(None))


def moments_of_whole_model(folder: Path, tokens: Tensor) -> Tensor:
    """By autograd through transformers' model, window by window."""
    model, family = load_model(folder), SourceModel.open(folder).family
    outputs: list[Tensor] = []
    for block in blocks_of(model, family):
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    embedded = model.get_input_embeddings().weight.requires_grad_()
    moments = torch.zeros(model.config.num_hidden_layers, embedded.shape[1], embedded.shape[1])
    for seed, window in enumerate(tokens):
        outputs.clear()
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits
        drawn = drawn_tokens(logits.detach(), seed)
        likelihood = logits.log_softmax(dim=-1).gather(-1, drawn).sum()
        for index, gradient in enumerate(torch.autograd.grad(likelihood, outputs)):
            moments[index] += gradient[0].T @ gradient[0]
    return moments * 2 / tokens.numel()


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_a_pass_block_by_block_gives_the_moments_of_the_whole_models_gradients(family: str, tmp_path: Path) -> None:
    folder = TINY if family == "tiny" else write_random_model(family, tmp_path / "model")
    tokens = torch.randint(0, 4096, (3, 48), generator=torch.Generator().manual_seed(1))
    found, wanted = moments_block_by_block(folder, tokens, tmp_path), moments_of_whole_model(folder, tokens)
    assert wanted.diagonal(dim1=1, dim2=2).min() > 0
    for of_block, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(of_block, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_token_is_drawn_as_often_as_the_model_expects_it() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 5
    drawn = drawn_tokens(logits.expand(40_000, 4), seed=3)
    assert drawn.flatten().bincount(minlength=4).tolist() == pytest.approx([4000, 8000, 12000, 16000], rel=0.05)
    assert torch.equal(drawn, drawn_tokens(logits.expand(40_000, 4), seed=3))


@pytest.mark.parametrize(("samples", "ranks", "count"), [(128, 1, 32), (64, 2, 16), (5, 1, 5), (1, 64, 1)])
def test_windows_are_spread_over_all_of_a_process(samples: int, ranks: int, count: int) -> None:
    rows = some_windows(samples, ranks).tolist()
    assert len(rows) == len(set(rows)) == count and rows[0] == 0 and samples - samples // count <= rows[-1] < samples


def test_lengths_in_the_metric_are_those_of_the_fisher_information() -> None:
    gradients, differences = torch.randn(500, 12) @ torch.randn(12, 12), torch.randn(7, 12)
    moments = gradients.T @ gradients
    metric = fisher_metric(moments, torch.float32)
    normed = moments / moments.diagonal().mean()
    of_both = 0.95 * torch.einsum("ti,ij,tj->t", differences, normed, differences) + 0.05 * differences.square().sum(dim=1)
    torch.testing.assert_close(metric(differences).square().sum(dim=1), of_both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moments", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.full((4, 4), torch.inf)])
def test_moments_that_say_nothing_leave_all_channels_alike(moments: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    assert fisher_metric(moments, torch.float32) is PLAIN
    assert "channels count alike" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighs", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_squared_lengths(weighs: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    output, targets, gradients = (torch.randn(shape, generator=generator) for shape in ((3, 5, 24), (3, 5, 24), (60, 24)))
    metric = fisher_metric(gradients.T @ gradients, dtype) if weighs else PLAIN
    output.requires_grad_()
    wanted = metric(output - targets).square().mean()
    found = metric.mean_square(output, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(3 * loss, output)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize(("metric", "best"), [(PLAIN, 1.0), (OutputMetric(torch.diag(torch.tensor([3.0, 1.0]))), 1.8)])
def test_a_block_learns_what_its_metric_asks_for(metric: OutputMetric, best: float) -> None:
    inputs, block = torch.ones(8, 4, 2), Gain()
    targets = inputs * torch.tensor([2.0, 0.0])  # one gain for both channels, which want different ones
    settings, generator = QuantizeSettings("w4a16", iters=200), torch.Generator().manual_seed(0)
    windows = LearningWindows.drawn(len(inputs), generator)
    states = [HiddenStates(values, CPU) for values in (inputs, targets)]
    result = learn_block(block, *states, {}, settings, 0.1, windows, generator, torch.float32, metric=metric)
    assert block.gain.item() == pytest.approx(best, abs=1e-2)
    error = metric(inputs * best - targets).square().sum() / metric(targets).square().sum()
    assert result.error_after == pytest.approx(error.item(), rel=1e-2)
