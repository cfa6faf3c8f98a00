"""Layers of two tensor-parallel ranks, put together, against the whole layer: every scheme, every kind of layer."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest
from lrq_vllm.errors import CheckpointError, SettingsError
from tests.vllm_layers import INTEGERS, Tensors, load, lrq_config, manifest_for, plugin_world, random_tensors, reference_outputs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's layers on the CPU, which needs its CPU build"),
]

RANKS = 2
CORRECTED = "w4a8 corrected"
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def _qkv(key_value_heads: int) -> Callable[[Any], Any]:
    def make(config: Any) -> Any:
        from vllm.model_executor.layers.linear import QKVParallelLinear

        return QKVParallelLinear(
            256, 64, 4, key_value_heads, bias=False, quant_config=config, prefix=f"{ATTENTION}.qkv_proj", return_bias=False
        )

    return make


def _gate_up(config: Any) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        256, [384, 384], bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj", return_bias=False
    )


def _down(config: Any, *, bias: bool = False) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(384, 256, bias=bias, quant_config=config, prefix=f"{MLP}.down_proj", return_bias=False)


def _down_with_bias(config: Any) -> Any:
    layer = _down(config, bias=True)
    layer.bias.data.copy_(torch.linspace(-9, 9, 256))
    return layer


class Kind(NamedTuple):
    """A kind of layer: its modules in the checkpoint, how vLLM names the parts, and which of them every rank has whole."""

    make: Callable[[Any], Any]
    modules: dict[str, tuple[int, int]]
    shards: tuple[Any, ...]
    replicated: bool = False  # keys and values, where there are fewer heads than ranks
    by_rows: bool = False  # ranks share the inputs, not the outputs


def _projections(prefix: str, **shapes: tuple[int, int]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{name}_proj": shape for name, shape in shapes.items()}


KINDS = {
    "qkv": Kind(_qkv(2), _projections(ATTENTION, q=(256, 256), k=(128, 256), v=(128, 256)), ("q", "k", "v")),
    "qkv-one-head": Kind(_qkv(1), _projections(ATTENTION, q=(256, 256), k=(64, 256), v=(64, 256)), ("q", "k", "v"), True),
    "qkv-fused": Kind(_qkv(2), _projections(ATTENTION, qkv=(512, 256)), (None,)),
    "gate-up": Kind(_gate_up, _projections(MLP, gate=(384, 256), up=(384, 256)), (0, 1)),
    "gate-up-fused": Kind(_gate_up, _projections(MLP, gate_up=(768, 256)), (None,)),
    "down": Kind(_down, _projections(MLP, down=(256, 384)), (None,), by_rows=True),
}
# Group sizes too, where a scheme has them, and one with a low-rank correction.
FORMATS = [*((scheme, None) for scheme in SCHEMES), ("w4a16", 64), ("w3a16", 32), ("w4a8", 64), (CORRECTED, None)]
CASES = [(kind, scheme, group) for kind in KINDS for scheme, group in FORMATS]
CASES.append(("down", "w4a8", 192))  # one group for each rank


def case(kind: str, scheme: str, group: int | None) -> tuple[Manifest, Tensors, Tensor]:
    """The whole layer's tensors and inputs [7, in], the same in every process."""
    torch.manual_seed(0)
    modules = KINDS[kind].modules
    correction = Correction(torch.bfloat16, {module: 8 * (at + 1) for at, module in enumerate(modules)})
    manifest = manifest_for(scheme.split()[0], modules, group, correction=correction if scheme == CORRECTED else None)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    inputs = next(iter(manifest.quantized.values()))[1]
    return manifest, tensors, torch.randn(7, inputs, dtype=torch.float32).mul(3).bfloat16()


KERNELS = {"chosen": "", "reference": "reference"}
"""What LRQ_KERNEL is."""

Outputs = dict[tuple[str, str, int | None], Tensor]
"""By case."""


def layer_outputs(rank: int, ranks: int) -> Outputs:
    """Of every case, as one of the ranks computes them."""
    found = {}
    for kind, scheme, group in CASES:
        manifest, tensors, x = case(kind, scheme, group)
        layer = KINDS[kind].make(lrq_config(manifest))
        load(layer, tensors, KINDS[kind].shards)
        layer.quant_method.process_weights_after_loading(layer)
        found[kind, scheme, group] = layer(x.chunk(ranks, dim=1)[rank] if KINDS[kind].by_rows else x)
    return found


def run_rank(rank: int, folder: Path) -> None:
    """Compute with layers cut as vLLM cuts them, and so that the number of ranks changes nothing."""
    with plugin_world(rank, RANKS, folder / "store"):
        torch.save(layer_outputs(rank, RANKS), folder / f"{rank}.pt")
        os.environ["LRQ_TP_INVARIANT"] = "1"
        KINDS["down"] = KINDS["down"]._replace(make=_down_with_bias)
        for kernel in KERNELS:
            os.environ["LRQ_KERNEL"] = KERNELS[kernel]
            torch.save(layer_outputs(rank, RANKS), folder / f"{kernel}-{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        spawn(run_rank, (folder,), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def outputs(ran: Path) -> list[Outputs]:
    """By rank, from the kernels that are chosen."""
    return [torch.load(ran / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module", params=KERNELS)
def invariant_outputs(ran: Path, request: pytest.FixtureRequest) -> list[Outputs]:
    """By rank, cut so that their number changes nothing; in the end, those of one rank that has everything."""
    with pytest.MonkeyPatch.context() as patch, plugin_world():
        patch.setenv("LRQ_KERNEL", KERNELS[request.param])
        patch.setitem(KINDS, "down", KINDS["down"]._replace(make=_down_with_bias))
        whole = layer_outputs(0, 1)
    return [*(torch.load(ran / f"{request.param}-{rank}.pt") for rank in range(RANKS)), whole]


@pytest.mark.parametrize(("kind", "scheme", "group"), CASES)
def test_ranks_together_compute_what_one_computes(kind: str, scheme: str, group: int | None, outputs: list[Outputs]) -> None:
    manifest, tensors, x = case(kind, scheme, group)
    own = [found[kind, scheme, group] for found in outputs]
    if KINDS[kind].by_rows:
        assert torch.equal(own[0], own[1])  # after the sum over ranks
        parts = [row_part(manifest, tensors, x, rank) for rank in range(RANKS)]
        # Each rank's part is rounded to bfloat16.
        assert (own[0].float() - sum(parts)).norm() <= 8e-3 * sum(parts).norm()
        return
    wanted = torch.cat(reference_outputs(manifest, tensors, x), dim=1)
    for rank, y in enumerate(own):
        expected = of_rank(wanted, rank, kind)
        if scheme in INTEGERS:
            assert torch.equal(y, expected)
        else:
            assert (y.float() - expected.float()).norm() <= 4e-3 * expected.float().norm()


def row_part(manifest: Manifest, tensors: Tensors, x: Tensor, rank: int) -> Tensor:
    """What the reference computes of a rank's share of the inputs; it quantizes tokens by what it sees of them."""

    def share(suffix: str, tensor: Tensor) -> Tensor:
        if suffix == "low_rank_v":
            return tensor.chunk(RANKS)[rank]
        return tensor.chunk(RANKS, dim=1)[rank] if suffix.startswith(("qweight", "weight")) and tensor.shape[1] > 1 else tensor

    modules = {name: (rows, inputs // RANKS) for name, (rows, inputs) in manifest.quantized.items()}
    shares = {name: {suffix: share(suffix, tensor) for suffix, tensor in of.items()} for name, of in tensors.items()}
    return reference_outputs(replace(manifest, quantized=modules), shares, x.chunk(RANKS, dim=1)[rank])[0].float()


@pytest.mark.parametrize(("kind", "scheme", "group"), CASES)
def test_ranks_that_share_outputs_alone_give_the_whole_layers_result_to_the_bit(
    kind: str, scheme: str, group: int | None, invariant_outputs: list[Outputs]
) -> None:
    *own, whole = (found[kind, scheme, group] for found in invariant_outputs)
    for rank, y in enumerate(own):
        assert torch.equal(y, whole if KINDS[kind].by_rows else of_rank(whole, rank, kind))
    manifest, tensors, x = case(kind, scheme, group)
    wanted = torch.cat(reference_outputs(manifest, tensors, x), dim=1).float()
    if kind == "down":
        wanted += torch.linspace(-9, 9, 256).bfloat16()
    assert (whole.float() - wanted).norm() <= 8e-3 * wanted.norm()


def of_rank(whole: Tensor, rank: int, kind: str) -> Tensor:
    """The columns that a rank has of what a layer puts out, of each part its share."""
    sizes = [256, 128, 128] if kind == "qkv-fused" else [384, 384] if kind == "gate-up-fused" else None
    parts = whole.split(sizes or [rows for rows, _ in KINDS[kind].modules.values()], dim=1)
    whole_in_every_rank = KINDS[kind].replicated
    return torch.cat(
        [part if whole_in_every_rank and at else part.chunk(RANKS, dim=1)[rank] for at, part in enumerate(parts)], 1
    )


def test_a_cut_through_packed_words_is_refused_with_the_numbers() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from lrq_vllm.layer_weights import LayerWeights

    manifest = manifest_for("w4a16", _projections(MLP, down=(256, 384)), 128)
    with set_current_vllm_config(VllmConfig()), pytest.raises(CheckpointError, match="384 inputs on 2 GPUs give 192 each"):
        LayerWeights(manifest, list(manifest.quantized)).create(torch.nn.Module(), 192, [256], 384, lambda *_: None)


def test_outputs_that_ranks_cannot_share_and_a_sum_that_stays_vllms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrq_vllm.tp_invariance import check_sum, own_outputs

    with pytest.raises(SettingsError, match=r"down_proj has 250 outputs, which 4 ranks cannot share"):
        own_outputs(250, 4, "down_proj")
    monkeypatch.setenv("LRQ_TP_INVARIANT", "1")
    with plugin_world():
        layer = _down(lrq_config(replace(manifest_for("w4a16", KINDS["qkv"].modules), skipped=(f"{MLP}.down_proj",))))
        layer.tp_size = RANKS
        with pytest.raises(SettingsError, match=r"down_proj is not quantized: vLLM adds up what 2 ranks make"):
            check_sum(layer, "down_proj")
