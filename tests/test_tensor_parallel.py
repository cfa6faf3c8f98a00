"""Layers of two tensor-parallel ranks, put together, against the whole layer: every scheme, every kind of layer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import CheckpointError
from tests.vllm_layers import SERVED, Tensors, load, lrq_config, manifest_for, plugin_world, random_tensors, reference_outputs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's layers on the CPU, which needs its CPU build"),
]

RANKS = 2
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


def _down(config: Any) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(384, 256, bias=False, quant_config=config, prefix=f"{MLP}.down_proj", return_bias=False)


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
# Group sizes too, where a scheme has them.
FORMATS = [*((scheme, None) for scheme in SERVED), ("w4a16", 64), ("w3a16", 32)]
CASES = [(kind, scheme, group) for kind in KINDS for scheme, group in FORMATS]


def case(kind: str, scheme: str, group: int | None) -> tuple[Manifest, Tensors, Tensor]:
    """The whole layer's tensors and inputs [7, in], the same in every process."""
    torch.manual_seed(0)
    manifest = manifest_for(scheme, KINDS[kind].modules, group)
    tensors = {module: random_tensors(manifest, module) for module in manifest.quantized}
    inputs = next(iter(manifest.quantized.values()))[1]
    return manifest, tensors, torch.randn(7, inputs, dtype=torch.float32).mul(3).bfloat16()


def run_rank(rank: int, folder: Path) -> None:
    """Compute every case's outputs as one of the ranks."""
    found = {}
    with plugin_world(rank, RANKS, folder / "store"):
        for kind, scheme, group in CASES:
            manifest, tensors, x = case(kind, scheme, group)
            layer = KINDS[kind].make(lrq_config(manifest))
            load(layer, tensors, KINDS[kind].shards)
            layer.quant_method.process_weights_after_loading(layer)
            found[kind, scheme, group] = layer(x.chunk(RANKS, dim=1)[rank] if KINDS[kind].by_rows else x)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[Any, Tensor]]]:
    """By rank, the outputs of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        spawn(run_rank, (folder,), nprocs=RANKS)
    yield [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("kind", "scheme", "group"), CASES)
def test_ranks_together_compute_what_one_computes(
    kind: str, scheme: str, group: int | None, outputs: list[dict[Any, Tensor]]
) -> None:
    manifest, tensors, x = case(kind, scheme, group)
    own = [found[kind, scheme, group] for found in outputs]
    wanted = torch.cat(reference_outputs(manifest, tensors, x), dim=1)
    if KINDS[kind].by_rows:
        assert torch.equal(own[0], own[1])  # after the sum over ranks
        # Each rank's part is rounded to bfloat16, and tokens are quantized by what a rank sees of them.
        assert (own[0].float() - wanted.float()).norm() <= 0.02 * wanted.float().norm()
        return
    sizes = [256, 128, 128] if kind == "qkv-fused" else [384, 384] if kind == "gate-up-fused" else None
    parts = wanted.split(sizes or [rows for rows, _ in manifest.quantized.values()], dim=1)
    for rank, y in enumerate(own):
        expected = torch.cat([of_rank(part, rank, at, KINDS[kind]) for at, part in enumerate(parts)], dim=1)
        if scheme in ("w8a8", "w4a8"):
            assert torch.equal(y, expected)
        else:
            assert (y.float() - expected.float()).norm() <= 4e-3 * expected.float().norm()


def of_rank(part: Tensor, rank: int, at: int, kind: Kind) -> Tensor:
    return part if kind.replicated and at > 0 else part.chunk(RANKS, dim=1)[rank]


def test_a_cut_through_packed_words_is_refused_with_the_numbers() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from lrq_vllm.layer_weights import LayerWeights

    manifest = manifest_for("w4a16", _projections(MLP, down=(256, 384)), 128)
    with set_current_vllm_config(VllmConfig()), pytest.raises(CheckpointError, match="384 inputs on 2 GPUs give 192 each"):
        LayerWeights(manifest, list(manifest.quantized)).create(torch.nn.Module(), 192, [256], 384, lambda *_: None)
