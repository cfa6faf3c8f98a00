"""vLLM's stacks of experts: what each rank takes of the checkpoint, and what it computes, for every scheme."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_vllm.checkpoint.schema import SCHEMES, Manifest
from lrq_vllm.errors import CheckpointError, SettingsError
from lrq_vllm.expert_stack import Routing
from tests.vllm_layers import Tensors, manifest_for, random_tensors

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the backend for experts one by one is the CPU's"),
]

EXPERTS, HIDDEN, INNER, TOKENS, CHOICES = 4, 64, 128, 9, 2
PREFIX = "model.layers.0.mlp.experts"
SHARDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FORMATS = [*((scheme, None) for scheme in SCHEMES if scheme != "w4a4"), ("w4a16", 32), ("w4a8", 32), ("w4a8", 64)]


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def checkpoint(scheme: str, group: int | None) -> tuple[Manifest, Tensors]:
    """Every expert's tensors; the two layers that read one input have one range for it."""
    torch.manual_seed(0)
    modules = {}
    for expert in range(EXPERTS):
        modules |= {f"{PREFIX}.{expert}.{name}": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
        modules[f"{PREFIX}.{expert}.down_proj"] = (HIDDEN, INNER)
    manifest = manifest_for(scheme, modules, group)
    tensors = {module: random_tensors(manifest, module) for module in modules}
    for module, by_suffix in tensors.items():
        if "input_step" in by_suffix and module.endswith("down_proj"):
            by_suffix["input_step"] *= 1 + int(module.split(".")[-2])  # each expert's own
    return manifest, tensors


def loaded(
    manifest: Manifest, tensors: Tensors, rank: int, ranks: int, local: Callable[[int], int] = int, *, by_outputs: bool = False
) -> Any:
    """w13 and w2 of one rank, loaded tensor by tensor as vLLM does."""
    from lrq_vllm.expert_weights import ExpertShape, ExpertWeights

    layer, weights = torch.nn.Module(), ExpertWeights(manifest, PREFIX)
    here = sum(local(expert) >= 0 for expert in range(EXPERTS))
    weights.create(layer, ExpertShape(here, HIDDEN, INNER // ranks, rank, ranks, by_outputs=by_outputs), local)
    for module, by_suffix in tensors.items():
        expert, name = module.removeprefix(f"{PREFIX}.").split(".")
        shard = next(shard for shard, own in SHARDS.items() if own == name)
        for suffix, tensor in by_suffix.items():
            parameter: Any = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{suffix}")
            came = parameter.weight_loader(parameter, tensor, f"{module}.{suffix}", shard, int(expert), return_success=True)
            assert came == (local(int(expert)) >= 0)
    return weights.take(layer)


def product(stack: Any, x: Tensor, slots_per_row: int, expert_of: Tensor, *, integers: bool) -> Tensor:
    """Of one layer of all experts."""
    from lrq_vllm.expert_backends import choose_expert_backend

    backend = choose_expert_backend(stack, torch.bfloat16, integers=integers)
    linear = backend.linear(stack, torch.bfloat16, integers=integers)
    return linear(x, slots_per_row, Routing(expert_of, len(stack.q)))


def products(stacks: Any, x: Tensor, expert_of: Tensor, *, integers: bool) -> tuple[Tensor, Tensor]:
    """What comes out of gate and up, and of down."""
    between = product(stacks[0], x, CHOICES, expert_of, integers=integers)
    return between, product(stacks[1], activated(between), 1, expert_of, integers=integers)


def activated(between: Tensor) -> Tensor:
    gate, up = between.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def case(scheme: str, group: int | None) -> tuple[Manifest, Tensors, Tensor, Tensor]:
    manifest, tensors = checkpoint(scheme, group)
    x = torch.randn(TOKENS, HIDDEN).mul(2).bfloat16()
    return manifest, tensors, x, torch.randint(0, EXPERTS, (TOKENS * CHOICES,))


@pytest.mark.parametrize(("scheme", "group"), FORMATS)
def test_a_slot_gets_what_its_experts_linear_layers_compute(scheme: str, group: int | None) -> None:
    from tests.vllm_layers import reference_outputs

    manifest, tensors, x, expert_of = case(scheme, group)
    between, y = products(loaded(manifest, tensors, 0, 1), x, expert_of, integers=manifest.activation is not None)
    for slot, expert in enumerate(expert_of.tolist()):
        of_expert = {name: tensors[f"{PREFIX}.{expert}.{name}"] for name in SHARDS.values()}
        one = {f"{PREFIX}.{expert}.{name}": of_expert[name] for name in ("gate_proj", "up_proj")}
        wanted = torch.cat(reference_outputs(manifest, one, x[slot // CHOICES][None]), dim=1)
        torch.testing.assert_close(between[slot][None], wanted, rtol=1e-2, atol=1e-2 * wanted.float().abs().max().item())
        gate, up = between[slot][None].chunk(2, dim=1)
        down = {f"{PREFIX}.{expert}.down_proj": of_expert["down_proj"]}
        (wanted,) = reference_outputs(manifest, down, torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(y[slot][None], wanted, rtol=1e-2, atol=1e-2 * wanted.float().abs().max().item())


@pytest.mark.parametrize(("scheme", "group"), FORMATS)
def test_two_tensor_parallel_ranks_together_compute_what_one_computes(scheme: str, group: int | None) -> None:
    manifest, tensors, x, expert_of = case(scheme, group)
    integers = manifest.activation is not None
    whole, y = products(loaded(manifest, tensors, 0, 1), x, expert_of, integers=integers)
    ranks = [products(loaded(manifest, tensors, rank, 2), x, expert_of, integers=integers) for rank in range(2)]
    for at, part in enumerate(whole.chunk(2, dim=1)):
        own = torch.cat([between.chunk(2, dim=1)[at] for between, _ in ranks], dim=1)
        assert torch.equal(own, part)
    total = ranks[0][1].float() + ranks[1][1].float()
    # Each rank's part is rounded to bfloat16, and w4a8 quantizes a token by what a rank sees of it.
    assert (total - y.float()).norm() <= 0.02 * y.float().norm()


@pytest.mark.parametrize("kernel", ["", "reference"])
@pytest.mark.parametrize(("scheme", "group"), FORMATS)
def test_ranks_that_share_outputs_alone_have_one_ranks_result_to_the_bit(
    scheme: str, group: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRQ_KERNEL", kernel)
    manifest, tensors, x, expert_of = case(scheme, group)
    integers = manifest.activation is not None
    _, whole = products(loaded(manifest, tensors, 0, 1), x, expert_of, integers=integers)
    inner, outer = zip(*(loaded(manifest, tensors, rank, 2, by_outputs=True) for rank in range(2)), strict=True)
    between = [activated(product(stack, x, CHOICES, expert_of, integers=integers)) for stack in inner]
    y = [product(stack, torch.cat(between, dim=1), 1, expert_of, integers=integers) for stack in outer]
    assert [part.shape[1] for part in y] == [HIDDEN // 2] * 2
    assert torch.equal(torch.cat(y, dim=1), whole)


def test_an_expert_parallel_rank_has_its_experts_whole_and_gives_zero_for_others() -> None:
    manifest, tensors, x, expert_of = case("w8a8", None)
    _, y = products(loaded(manifest, tensors, 0, 1), x, expert_of, integers=True)
    total = torch.zeros_like(y)
    for first in (0, 2):

        def local(expert: int, first: int = first) -> int:
            return expert - first if first <= expert < first + 2 else -1

        own = torch.tensor([local(expert) for expert in expert_of.tolist()])
        _, part = products(loaded(manifest, tensors, 0, 1, local), x, own, integers=True)
        assert (part[own < 0] == 0).all()
        total += part
    assert torch.equal(total, y)


def test_a_missing_a_misshapen_and_a_contradictory_tensor_are_named() -> None:
    manifest, tensors = checkpoint("w8a8", None)
    lacking = {module: dict(by_suffix) for module, by_suffix in tensors.items()}
    del lacking[f"{PREFIX}.2.up_proj"]["weight_step"]
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight_step was not loaded"):
        loaded(manifest, lacking, 0, 1)
    wrong = {module: dict(by_suffix) for module, by_suffix in tensors.items()}
    wrong[f"{PREFIX}.1.down_proj"]["qweight"] = wrong[f"{PREFIX}.1.down_proj"]["qweight"].T.contiguous()
    with pytest.raises(CheckpointError, match=r"experts\.1\.down_proj\.qweight is torch\.int8 \[128, 64\]"):
        loaded(manifest, wrong, 0, 2)
    torn = {module: dict(by_suffix) for module, by_suffix in tensors.items()}
    torn[f"{PREFIX}.3.up_proj"]["input_step"] = torn[f"{PREFIX}.3.up_proj"]["input_step"] * 2
    with pytest.raises(CheckpointError, match="read one input but carry different input_step"):
        loaded(manifest, torn, 0, 1)


def test_a_cut_through_groups_is_refused_with_the_numbers() -> None:
    manifest, tensors = checkpoint("w4a16", 64)
    with pytest.raises(CheckpointError, match="128 inputs on 4 GPUs give 32 each"):
        loaded(manifest, tensors, 0, 4)


def test_experts_that_the_checkpoint_does_not_list_are_refused() -> None:
    from lrq_vllm.expert_weights import ExpertWeights

    manifest = manifest_for("w4a16", {"model.layers.0.mlp.down_proj": (HIDDEN, INNER)})
    with pytest.raises(CheckpointError, match="does not list their gate, up and down projections"):
        ExpertWeights(manifest, PREFIX)


def test_several_engines_whose_number_is_to_change_nothing_are_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lrq_vllm.experts_method import LrqExpertsMethod

    monkeypatch.setenv("LRQ_TP_INVARIANT", "1")
    method = LrqExpertsMethod(
        checkpoint("w4a8", None)[0], PREFIX, SimpleNamespace(num_experts=EXPERTS, dp_size=2, tp_rank=0, tp_size=1, ep_size=2)
    )
    layer = SimpleNamespace(activation="silu", apply_router_weight_on_input=False)
    with pytest.raises(SettingsError, match="is for one engine, not for data-parallel ones"):
        method.create_weights(layer, EXPERTS, HIDDEN, INNER, torch.bfloat16)
