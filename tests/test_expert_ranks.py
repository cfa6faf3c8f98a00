"""Experts on several processes: whichever of them a token is on, and however few tokens there are, the outcome is one's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts, shipped_calibration
from lrq_offline.compute import Machine
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.expert_tokens import TOO_FEW
from lrq_offline.experts import Experts, experts_of
from lrq_offline.gptq import HessianSum
from lrq_offline.hidden_states import BatchFeeder, HiddenStates
from lrq_offline.layer_inputs import sample_inputs, watch_inputs
from lrq_offline.learned_experts import ExpertLayers, LearnedExperts
from lrq_offline.learned_scales import FlexRoundScale, LearnedRounding, LrqScale
from lrq_offline.learning_step import LearningStep, ParameterGroup
from lrq_offline.pipeline import quantize_model
from lrq_offline.rank_processes import started_ranks
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import load_tokenizer
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.packing import unpack
from lrq_vllm.checkpoint.store import TensorFolder, read_manifest
from tests.checkpoints import write_random_model

# --- what two processes tell each other ---

KINDS = (LrqScale, FlexRoundScale)
CPU = torch.device("cpu")


class Mixture(nn.Module):
    """Every token meets expert 0, and 1 or 2 by the sign of its first channel. No token meets expert 3."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        names = FAMILIES["mixtral"].experts
        assert names is not None
        shapes = SimpleNamespace(down_proj=torch.empty(0), hidden_dim=8, intermediate_dim=12, num_experts=4, act_fn=nn.SiLU())
        apart = Experts(shapes, names)
        apart.ranks = ranks
        self.experts: nn.Module = apart

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        second = torch.where(tokens[:, 0] > 0, 1, 2)
        chosen = torch.stack([torch.zeros_like(second), second], dim=1)
        out: Tensor = self.experts(tokens, chosen, torch.full(chosen.shape, 0.5))
        return out.view(x.shape)


def windows() -> Tensor:
    """[2, 7, 8]: that of the first process, all of whose tokens meet expert 1, and that of the second, where none does."""
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    x[..., 0] = x[..., 0].abs() * torch.tensor([[1.0], [-1.0]])
    return x


def states(values: Tensor) -> HiddenStates:
    return HiddenStates(values, CPU)


def gradients(kind: type[LearnedRounding], ranks: Ranks) -> dict[str, Tensor | None]:
    """Of every parameter of four experts, by a step whose batch is both windows."""
    torch.manual_seed(0)
    block = Mixture(ranks)

    def layers(name: str, out_features: int, in_features: int) -> ExpertLayers:
        weight = 0.3 * torch.randn(4 * out_features, in_features)
        learned: LearnedRounding = FlexRoundScale(weight, search_steps(weight, 3), 3)
        if kind is LrqScale:
            learned = LrqScale(weight, search_steps(weight, 3), 3, 2, torch.Generator().manual_seed(0), weights=4)
            learned.left.data.normal_(std=0.1)
        return ExpertLayers([f"{expert}.{name}" for expert in range(4)], learned, [], None)

    assert isinstance(block.experts, Experts)
    shapes = {"w1": (12, 8), "w3": (12, 8), "w2": (8, 12)}
    block.experts = LearnedExperts(block.experts, range(4), *(layers(name, *shape) for name, shape in shapes.items()))
    inputs, targets = (states(ranks.share(tensor)) for tensor in (windows(), torch.randn(2, 7, 8)))
    feeder = BatchFeeder(inputs, targets, torch.arange(len(inputs)).unsqueeze(0))
    step = LearningStep(
        block, [ParameterGroup(list(block.parameters()), 0.01)], feeder, {},
        steps=1, scale=0.001, dtype=torch.float32, ranks=ranks,
    )  # fmt: skip
    step.run(0)
    return {name: parameter.grad for name, parameter in block.named_parameters()}


@dataclass(frozen=True)
class Outcome:
    """Of one process. gradients: by kind of scale. sampled: of what expert 1 receives, tokens, low, high and the number
    seen. next_draw: of the generator that sampled.
    """

    gradients: dict[type[LearnedRounding], dict[str, Tensor | None]]
    sampled: tuple[Tensor, Tensor, Tensor, int]
    next_draw: Tensor
    own_draw: Tensor
    joined: Tensor
    hessian: Tensor


def outcomes(ranks: Ranks) -> list[Outcome]:
    """Of all ranks, in order."""
    torch.manual_seed(0)
    block, generator, total = Mixture(ranks), torch.Generator().manual_seed(0), HessianSum()
    hidden, layer = states(ranks.share(windows())), "experts.1.w1"
    sample = sample_inputs(block, hidden, {}, [layer], 10, generator, 1, torch.float32, ranks)[layer]
    watch_inputs(block, hidden, {}, {layer: total}, hidden.slices(1), torch.float32)
    own = Outcome(
        {kind: gradients(kind, ranks) for kind in KINDS},
        (sample.tokens, sample.low, sample.high, sample.seen),
        torch.rand(3, generator=generator),
        torch.rand(3, generator=ranks.own_generator(generator)),
        ranks.joined(windows()[0, : 7 * ranks.rank]),
        total.value(ranks),
    )
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, own)
    return found


def take_part(ranks: Ranks) -> None:
    outcomes(ranks)


@pytest.fixture(scope="module")
def of_both() -> list[Outcome]:
    """What each of two processes finds out."""
    with started_ranks(2, CPU, take_part) as ranks:
        return outcomes(ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_one_process_alone_meets_has_the_gradients_of_one_process_in_both(
    kind: type[LearnedRounding], of_both: list[Outcome]
) -> None:
    expected = gradients(kind, ONE_RANK)
    for outcome in of_both:
        torch.testing.assert_close(outcome.gradients[kind], expected, rtol=1e-4, atol=1e-4)
    for gradient in expected.values():
        assert gradient is not None
        *met, unmet = gradient.chunk(4)
        assert all(of_expert.any() for of_expert in met) and not unmet.any()


def test_rows_of_which_one_process_has_none_are_joined(of_both: list[Outcome]) -> None:
    for outcome in of_both:
        assert torch.equal(outcome.joined, windows()[0])


def test_draws_of_its_own_leave_a_process_in_step_with_the_others(of_both: list[Outcome]) -> None:
    first, second = of_both
    assert torch.equal(first.next_draw, second.next_draw) and not torch.equal(first.own_draw, second.own_draw)


def test_a_sample_that_one_process_alone_has_seen_is_that_of_both(of_both: list[Outcome]) -> None:
    x = windows()[0]
    for tokens, low, high, seen in (outcome.sampled for outcome in of_both):
        assert torch.equal(low, x.amin(dim=0).clamp(max=0)) and torch.equal(high, x.amax(dim=0).clamp(min=0))
        assert seen == 7 and torch.equal(tokens, of_both[0].sampled[0])
        assert len(tokens) == 5 and all(token in x.tolist() for token in tokens.tolist())


def test_a_hessian_is_the_mean_over_all_tokens_wherever_they_are(of_both: list[Outcome]) -> None:
    x = windows()[0]
    for outcome in of_both:
        torch.testing.assert_close(outcome.hessian, 2 / 7 * x.T @ x)


# --- a model ---

SEQ_LEN = 256
METHODS = {"lrq": "w4a8", "gptq": "w4a16", "smoothquant-rtn": "w8a8"}
# Of errors, relative. SmoothQuant and static ranges depend on the tokens drawn: one process's differ by 6% over six seeds.
TOLERANCES = {"lrq": 0.03, "gptq": 0.03, "smoothquant-rtn": 0.1}
LEARNED = {"samples": 2, "seq_len": SEQ_LEN, "batch_size": 2, "iters": 3, "learning_rate": 2e-3}
# Fewer than 64 tokens would be too few.
ONE_WINDOWS, FEW = 2, 3


def windows_of(folder: Path) -> Tensor:
    """The windows of calibration, int64 [2, SEQ_LEN]: with two processes, one on each."""
    tokenizer = load_tokenizer(folder)
    return token_windows(tokenizer, read_texts(shipped_calibration(), tokenizer), 2, SEQ_LEN)


def tokens_met(folder: Path) -> list[list[int]]:
    """By window, how many of its tokens choose each expert of the model's only block."""
    model, counts = load_model(folder), []
    (experts,) = experts_of(model)
    with (
        torch.inference_mode(),
        experts.register_forward_pre_hook(
            lambda module, inputs: counts.append(torch.bincount(inputs[1].flatten(), minlength=4).tolist())
        ),
    ):
        for window in windows_of(folder):
            model(input_ids=window.unsqueeze(0))
    return counts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of one block. Some tokens of the first window alone go to expert ONE_WINDOWS, some of both windows to FEW."""
    changes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    folder = write_random_model("mixtral", tmp_path_factory.mktemp("model") / "mixtral", **changes)
    first, second = (torch.bincount(window, minlength=4096) for window in windows_of(folder))
    shared = ((first > 0) & (second > 0)).nonzero().flatten()
    to_few = shared[(first + second)[shared].cumsum(0) < 60]
    tensors = load_file(folder / "model.safetensors")
    # Two channels say of a token where it goes, louder than attention; the router listens to them.
    kinds = torch.full((4096, 2), -8.0)
    kinds[(first > 0) & (second == 0), 0] = kinds[to_few, 1] = 8.0
    tensors["model.embed_tokens.weight"][:, :2] = kinds
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    router[:, :2], router[[ONE_WINDOWS, FEW]] = 0, 0
    router[ONE_WINDOWS, 0] = router[FEW, 1] = 2.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass(frozen=True)
class Run:
    """A checkpoint, what its report says of the block, and by layer whether it is rounded without data."""

    folder: Path
    block: dict[str, Any]

    @property
    def fallbacks(self) -> dict[str, str | None]:
        return {name: layer["fallback"] for name, layer in self.block["layers"].items()}


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Run]:
    """(method, processes) -> the model quantized by it, made once."""

    @cache
    def made(method: str, processes: int) -> Run:
        folder = tmp_path_factory.mktemp(method) / str(processes)
        settings = QuantizeSettings(METHODS[method], method, **LEARNED)
        report = quantize_model(model, folder, settings, machine=Machine("cpu", gpus=processes))
        return Run(folder, report["blocks"][0])

    return made


def test_the_model_has_an_expert_of_one_window_and_an_expert_of_few_tokens(model: Path) -> None:
    first, second = tokens_met(model)
    assert first[ONE_WINDOWS] >= 64 and second[ONE_WINDOWS] == 0
    # Counted twice they would be enough.
    assert first[FEW] > 0 and second[FEW] > 0 and 32 < first[FEW] + second[FEW] < 64


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_of_one_process_is_not_short_of_tokens_and_one_of_few_in_all_is(
    method: str, run: Callable[[str, int], Run]
) -> None:
    one, two = (run(method, processes).fallbacks for processes in (1, 2))
    assert one == two
    few = {name for name, fallback in two.items() if fallback is not None}
    assert few == {f"block_sparse_moe.experts.{FEW}.{name}" for name in ("w1", "w2", "w3")}
    assert {two[name] for name in few} == {TOO_FEW}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_end_with_the_error_of_one(method: str, run: Callable[[str, int], Run]) -> None:
    one, two = (run(method, processes).block for processes in (1, 2))
    assert two["error_before"] == pytest.approx(one["error_before"], rel=TOLERANCES[method])
    assert two["error_after"] == pytest.approx(one["error_after"], rel=TOLERANCES[method])


def test_two_processes_learn_the_integers_of_one(run: Callable[[str, int], Run]) -> None:
    folders = [run("lrq", processes).folder for processes in (1, 2)]
    manifest, tensors = read_manifest(folders[0]), [TensorFolder(folder) for folder in folders]
    assert set(tensors[0]) == set(tensors[1])
    bits = manifest.weight.bits
    for module, (_, in_features) in manifest.quantized.items():
        first, second = (unpack(folder.get(f"{module}.qweight"), bits, in_features).int() for folder in tensors)
        assert (first != second).float().mean() < 0.02, module
