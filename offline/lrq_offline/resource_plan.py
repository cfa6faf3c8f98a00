"""What a run will need, from a model's headers and the settings alone: memory, disk, time."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from lrq_offline.compute import Machine, choose_device, product_dtype
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import Family, block_families, block_family
from lrq_offline.golden_texts import golden_memory
from lrq_offline.hidden_states import HiddenStatesStore
from lrq_offline.output_gradients import some_windows
from lrq_offline.pipeline import open_source
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import SourceModel
from lrq_vllm.checkpoint.schema import Manifest

__all__ = ["ResourcePlan", "block_flops", "plan_run", "step_memory"]

# Passes over all calibration windows in which nothing is learned: targets, inputs of layers, error before and after, outputs.
_PASSES = 5
# A step's products run at this share of a large product's speed: what lies between them takes the rest (measured for a
# Llama-3-8B-shaped block, bench/results/learning-speed-h200.json).
_EFFICIENCY = 0.6


@dataclass(frozen=True)
class ResourcePlan:
    """Bytes, minutes and names. gpu_bytes: None where the run computes on the CPU; the block's state is then in host memory."""

    blocks: int
    quantized_modules: int
    skipped_modules: tuple[str, ...]
    tensor_parallel_sizes: tuple[int, ...]
    output_bytes: int
    gpu_bytes: int | None
    host_bytes: int
    disk_bytes: int
    hidden_states_in: str
    minutes: float


def plan_run(model_dir: Path, settings: QuantizeSettings, machine: Machine) -> ResourcePlan:
    """Estimate a run of ``settings``. Reads headers only and times one matrix product. Raises LrqError's children."""
    source = open_source(model_dir, settings)
    manifest = manifest_of(source.config, settings)
    device, config = choose_device(machine.device), source.config
    dtype = product_dtype(device)
    blocks = block_families(config)
    one_of_each_kind = {family: name for name, family in blocks.items()}
    window = settings.seq_len * config.hidden_size * (config.dtype or torch.bfloat16).itemsize
    cache = settings.samples * window
    computing = max(
        step_memory([manifest.quantized[f"{name}.{linear}"] for linear in family.linears], settings, config, family, dtype)
        for family, name in one_of_each_kind.items()
    )
    room = _room([cache] * settings.caches, device, machine)
    if settings.weighs_errors:
        computing = max(computing, _head_memory(settings, config, dtype))
        passed = [len(some_windows(settings.samples, 1)) * window] * (len(blocks) + 3)  # the gradients have 32 bits
        before = _room(passed, device, machine)
        kept = _room([len(blocks) * config.hidden_size**2 * 4], device, replace(machine, max_gpu_gb=0))
        room = {place: max(size, before[place]) + kept[place] for place, size in room.items()}
    largest = max(source.stored_bytes(name) for name in source.names())
    # A tensor outside the blocks is rotated in float32, beside what it was.
    largest *= 3 if settings.rotates else 1
    output = manifest.quantized_bytes + sum(
        source.stored_bytes(name) for name in source.names() if name.removesuffix(".weight") not in manifest.quantized
    )
    host = room["host memory"] + cache + 2 * largest
    in_the_end = _golden_memory(source)
    flops = sum(block_flops(source, manifest, settings, index) for index in range(len(blocks)))
    return ResourcePlan(
        blocks=len(blocks),
        quantized_modules=len(manifest.quantized),
        skipped_modules=manifest.skipped,
        tensor_parallel_sizes=manifest.tensor_parallel_sizes,
        output_bytes=output,
        gpu_bytes=max(computing + room["GPU memory"], in_the_end) if device.type == "cuda" else None,
        host_bytes=host if device.type == "cuda" else max(host + computing, in_the_end),
        disk_bytes=output + room["disk"],
        hidden_states_in=", ".join(place for place, size in room.items() if size),
        minutes=flops / (_flops_per_second(device) * _EFFICIENCY) / 60,
    )


def _room(caches: list[int], device: torch.device, machine: Machine) -> dict[str, int]:
    """Bytes by place of caches that are there at the same time."""
    store = HiddenStatesStore(device, machine.cache_bytes(device), Path())
    room = dict.fromkeys(("GPU memory", "host memory", "disk"), 0)
    for size in caches:
        room[store.place_for(size)] += size
    return room


def _golden_memory(source: SourceModel) -> int:
    """Bytes of what the reference path takes to say something of the finished checkpoint."""
    blocks, outside = f"{source.family.blocks}.", 0
    of_block: dict[str, int] = defaultdict(int)
    for name in source.names():
        size = math.prod(source.spec_of(name).shape)
        if name.startswith(blocks):
            of_block[name.removeprefix(blocks).partition(".")[0]] += size
        else:
            outside += size
    return golden_memory(outside, max(of_block.values()), source.config.vocab_size)


def _head_memory(settings: QuantizeSettings, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the output head, and of one window's logits with what is made of them."""
    return int(config.vocab_size * (config.hidden_size * dtype.itemsize + settings.seq_len * 5 * 4))


def step_memory(
    shapes: list[tuple[int, int]], settings: QuantizeSettings, config: PreTrainedConfig, family: Family, dtype: torch.dtype
) -> int:
    """Bytes at the peak of quantizing one block with linear layers of these (out, in), apart from cached hidden states.

    family: as the block has it. dtype: of matrix products.
    """
    elements = sum(rows * columns for rows, columns in shapes)
    # W, W rounded to nearest and its integers.
    of_weight = 4 if settings.changes_weights else dtype.itemsize
    total = elements * (of_weight + dtype.itemsize + 1)
    if settings.learns:
        rank = settings.matrix_rank(config.hidden_size)
        learned = elements if rank is None else sum(min(rank, *shape) * sum(shape) for shape in shapes)
        # Parameters with their gradients, Adam's two moments, best values, and a copy for products.
        total += learned * (5 * 4 + dtype.itemsize)
        # W_hat, S2's matrix and the gradients of both; the weight under earlier factors, and its best values; the weights of
        # experts above each other.
        total += elements * 2 * (dtype.itemsize + (4 if rank is None else dtype.itemsize))
        total += elements * of_weight * (2 * settings.renews + (family.experts is not None))
    if settings.weighs_errors:
        total += config.hidden_size**2 * dtype.itemsize
    if settings.learns and settings.corrects:
        # U and V as the other parameters, and the float32 weight that is rounded beside them.
        corrected = sum(settings.correction_rank_of(shape) * sum(shape) for shape in shapes)
        total += corrected * (5 * 4 + dtype.itemsize) + 4 * elements
    if settings.corrects:
        # Moments in float64: three of each input (of one after the other, or of all at once). While one is solved: regularized,
        # their Cholesky factors and what is divided by them, and a few matrices of the layer's size.
        inputs = [columns**2 for _, columns in shapes]
        kept = sum(inputs) if settings.corrects_from_float else max(inputs)
        total += 8 * (3 * kept + 7 * max(inputs) + 4 * max(rows * columns for rows, columns in shapes))
    # What a step keeps for its backward pass, roughly: a dozen tensors of the block's width, four of the MLP's.
    tokens = settings.batch_size * settings.seq_len
    experts = family.experts
    inner = config.intermediate_size if experts is None else getattr(config, experts.width) * getattr(config, experts.choices)
    total += tokens * 4 * (12 * config.hidden_size + 4 * inner)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        # Capped scores are computed in plain sight: their tanh and their softmax, each with its gradient.
        total += tokens * settings.seq_len * config.num_attention_heads * 4 * 4
    return int(total)


def block_flops(source: SourceModel, manifest: Manifest, settings: QuantizeSettings, index: int) -> float:
    """Of learning or correcting block ``index``, from 0, and of the passes over it.

    Of experts a token is multiplied by those it meets.
    """
    config, block, family = source.config, source.block_names[index], block_family(source.config, index)
    experts = family.experts
    met = 1.0 if experts is None else getattr(config, experts.choices) / family.expert_count
    elements = per_token = beside = 0.0
    for name in family.linears:
        rows, columns = manifest.quantized[f"{block}.{name}"]
        elements += rows * columns
        beside += settings.correction_rank_of((rows, columns)) * (rows + columns) if settings.corrects else 0
        per_token += rows * columns * (met if experts is not None and name.startswith(f"{experts.module}.") else 1)
    rank = min(settings.matrix_rank(config.hidden_size) or 0, config.hidden_size)
    step = 6 * ((per_token + beside) * settings.batch_size * settings.seq_len + elements * rank)
    steps, tokens = settings.iters if settings.learns else 0, settings.samples * settings.seq_len
    moments = 0.0
    if settings.corrects:
        # Three moments of each input, in float64: two products' worth of time each, if not more.
        inputs = [manifest.quantized[f"{block}.{group[0]}"][1] for group in family.linear_groups]
        moments = sum(3 * 2 * 2 * tokens * columns**2 for columns in inputs)
    # Forward twice and back once.
    passed = 0.0
    if settings.weighs_errors:
        passed = 3 * 2 * per_token * len(some_windows(settings.samples, 1)) * settings.seq_len
    return steps * step + _PASSES * 2 * (per_token + beside) * tokens + moments + passed


def _flops_per_second(device: torch.device) -> float:
    """Of one square product in the products' dtype, timed now: large enough for the machine's full speed."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=product_dtype(device))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
