"""Memory that a server needs at least: a rank's share of the weights, and keys and values of one sequence."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.store import TensorFolder
from lrq_vllm.errors import SettingsError

__all__ = ["MemoryNeed", "available_host_bytes", "cpu_kv_space_bytes", "in_gib", "memory_need"]

_CGROUP = Path("/sys/fs/cgroup")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of one rank. tokens: of the sequence that kv_bytes are for; 0 if nobody says how long one may be."""

    weight_bytes: int
    kv_bytes: int
    tokens: int


def memory_need(
    tensors: TensorFolder, manifest: Manifest, config: Mapping[str, Any], ranks: int, tokens: int | None, kv_bits: int,
    *, on_cpu: bool,
) -> MemoryNeed:  # fmt: skip
    """What vLLM cannot do without; activations, CUDA graphs and further sequences come on top.

    config: of config.json. tokens: --max-model-len; None for the most that the model knows.
    """
    stored = sum(tensors.spec(name).nbytes for name in tensors)
    weights = stored - manifest.quantized_bytes + (_expanded_bytes(manifest) if on_cpu else manifest.quantized_bytes)
    longest = tokens or min((config[name] for name in _LENGTHS if isinstance(config.get(name), int)), default=0)
    return MemoryNeed(weights // ranks, _kv_bytes(config, ranks, longest, kv_bits), longest)


def _expanded_bytes(manifest: Manifest) -> int:
    """Of the quantized weights as a CPU serves them: in bytes, or for 16-bit activations as 16-bit numbers."""
    width = 2 if manifest.activation is None else 1
    return sum(width * rows * columns for rows, columns in manifest.quantized.values())


def _kv_bytes(config: Mapping[str, Any], ranks: int, tokens: int, kv_bits: int) -> int:
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    per_token = 2 * -(-kv_heads // ranks) * head_dim * kv_bits // 8
    return sum(min(tokens, window or tokens) * per_token for window in _windows(config))


def _windows(config: Mapping[str, Any]) -> Iterator[int | None]:
    """Of each block, the tokens that it sees; None for all."""
    layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        window = None
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    for kind in kinds[:layers]:
        yield window if kind == "sliding_attention" else None


def available_host_bytes() -> int:
    """Of the machine, or what this container has left of its own limit."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # another system, or no limit of its own
        return available
    # What the kernel keeps of files gives way.
    return available if limit == "max" else min(available, int(limit) - used + int(statistics.get("inactive_file", 0)))


def in_gib(size: int) -> str:
    """For people."""
    return f"{size / 2**30:,.1f} GiB"


def cpu_kv_space_bytes() -> int | None:
    """That vLLM takes for keys and values on a CPU, each rank; None if the environment does not say.

    Raises SettingsError if it says something else than a number.
    """
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    try:
        return int(float(space) * 2**30) if space else None
    except ValueError as error:
        raise SettingsError(
            f"VLLM_CPU_KVCACHE_SPACE is {space!r}, which is no number of GiB. Correct it or unset it."
        ) from error
