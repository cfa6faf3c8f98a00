"""vLLM's own layers without an engine: the world that they need around them, random checkpoint tensors, loading."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_offline.reference_linear import ReferenceLinear
from lrq_offline.served_precision import _instructions
from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest, WeightFormat
from lrq_vllm.integer_backends import _multiplies_bytes_exactly
from lrq_vllm.vllm_world import vllm_world

# Where vLLM's own product of bytes is wrong, which the plugin avoids (integer_backends.OneDnnBackend).
EXACT_BYTES = pytest.mark.skipif(not _multiplies_bytes_exactly(), reason="oneDNN's sums saturate on this CPU, without VNNI")

# Without such instructions vLLM's own weight-only product rounds on the way too.
ROUNDS_ONCE = torch.cpu.get_capabilities().get("avx512_bf16", False)

# The reference path adds up attention as vLLM does on this machine, and most numbers are equal but for float32's last bits.
SAME_SUMS, EQUAL = _instructions(torch.bfloat16, 64) is not None, 1e-5

# Between what is served on a CPU and the reference path: nats, on average; share of tokens.
MEAN_DIFFERENCE, GREEDY_AGREEMENT = 0.02, 0.97

INTEGERS = [name for name, scheme in SCHEMES.items() if scheme.activation is not None]
"""The schemes whose products are sums of integers, equal to the bit."""

Tensors = dict[str, dict[str, Tensor]]
"""By module of the checkpoint, its tensors by suffix."""


def whole_graph(of: Callable[..., Any]) -> Any:
    """What torch.compile makes of ``of`` in one graph for any number of tokens. What earlier tests left is freed first: vLLM
    frees a oneDNN product by reading a tensor, which fails while torch traces.
    """
    gc.collect()
    return torch.compile(of, fullgraph=True, dynamic=True)


@contextmanager
def plugin_world(rank: int = 0, size: int = 1, store: Path | None = None) -> Iterator[None]:
    """One rank of ``size`` processes that meet at the file ``store``; bfloat16."""
    from vllm.config import VllmConfig
    from vllm.plugins import load_general_plugins

    with vllm_world(VllmConfig(), torch.bfloat16, rank, size, store):
        load_general_plugins()
        yield


def manifest_for(
    scheme: str, modules: dict[str, tuple[int, int]], group_size: int | None = None, *,
    correction: Correction | None = None, hadamard: OnlineHadamard | None = None,
) -> Manifest:  # fmt: skip
    weight = WeightFormat(SCHEMES[scheme].weight_bits, group_size=group_size)
    return Manifest(scheme, weight, modules, ("lm_head",), "test", None, (1, 2, 8), correction, hadamard)


def random_tensors(manifest: Manifest, module: str) -> dict[str, Tensor]:
    out_features, in_features = manifest.quantized[module]
    bits, groups = manifest.weight.bits, manifest.weight.groups(in_features)
    tensors = {
        "qweight": pack(torch.randint(0, 2**bits, (out_features, in_features)), bits),
        "weight_step": torch.rand(out_features, groups, dtype=torch.float32) * 0.01 + 0.001,
        "weight_zero_point": torch.randint(0, 2**bits, (out_features, groups), dtype=torch.uint8),
    }
    if scheme_is_static(manifest):
        tensors["input_step"] = torch.tensor([0.03], dtype=torch.float32)
        tensors["input_zero_point"] = torch.tensor([117], dtype=torch.uint8)
    if manifest.activation is not None and manifest.activation.symmetric:
        tensors["input_clip"] = torch.tensor([0.7], dtype=torch.float32)
    if manifest.correction is not None and module in manifest.correction.rank:
        rank = manifest.correction.rank[module]
        for suffix, rows in (("low_rank_u", out_features), ("low_rank_v", in_features)):
            tensors[suffix] = (torch.randn(rows, rank) / 4).to(manifest.correction.dtype)
    return tensors


def scheme_is_static(manifest: Manifest) -> bool:
    return manifest.activation is not None and manifest.activation.static


def lrq_config(manifest: Manifest) -> Any:
    """The plugin's configuration, as vLLM makes it."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    config = get_quantization_config("lrq").from_config(manifest.to_dict())
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return config


def load(layer: Any, tensors: Tensors, shards: tuple[Any, ...] = ("q", "k", "v")) -> None:
    """Load as the engine does: each tensor through its parameter's loader, with the shard's name in a fused layer."""
    for (_module, by_suffix), shard in zip(tensors.items(), shards, strict=False):
        for suffix, tensor in by_suffix.items():
            parameter = getattr(layer, suffix)
            if len(tensors) > 1:
                parameter.weight_loader(parameter, tensor, shard)
            else:
                parameter.weight_loader(parameter, tensor)


def reference_outputs(manifest: Manifest, tensors: Tensors, x: Tensor) -> list[Tensor]:
    """What the reference path computes, module by module."""
    outputs = []
    for module, by_suffix in tensors.items():
        linear = ReferenceLinear(manifest, module, None)
        linear.load_state_dict(by_suffix, assign=True)
        outputs.append(linear(x))
    return outputs
