#!/usr/bin/env python3
"""Seconds per iteration and peak memory of learning one decoder block, and what a whole model of such blocks would take.

    python bench/learning_speed.py --out bench/results/learning-speed-h200.json         # one Llama-3-8B-shaped block, on a GPU
    python bench/learning_speed.py --gpus 2 --schemes w4a16 --presets paper                     # one block on two GPUs
    python bench/learning_speed.py --shape qwen3-30b-a3b --schemes w4a16 --presets fast         # one with 128 experts
    python bench/learning_speed.py --small                                              # the same code on a small block

Weights are random, hidden states are random with outlier channels, and errors are weighed at random where the tool weighs them;
the code is the tool's own (block_quantizer.py). What finds those weights before the first block is not in the time.
"""

import argparse
import datetime
import gc
import json
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from lrq_offline.block_learning import run_block, windows_at_once
from lrq_offline.block_quantizer import BlockQuantizer
from lrq_offline.compute import choose_device, device_name, product_dtype
from lrq_offline.config import LOSSES, PRESETS, QuantizeSettings
from lrq_offline.decoder_blocks import block_family, empty_model
from lrq_offline.hidden_states import HiddenStates, HiddenStatesStore
from lrq_offline.output_metric import PLAIN, fisher_metric
from lrq_offline.rank_processes import started_ranks
from lrq_offline.ranks import Ranks

# By what is called so, the config of one block and how many blocks the model has.
SHAPES: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama-3-8b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
            vocab_size=64, dtype="bfloat16",
        ),
        32,
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig(
            hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_hidden_layers=1, vocab_size=64, dtype="bfloat16",
        ),
        48,
    ),
}  # fmt: skip
# Of the same kinds, that a laptop can learn.
SMALL: dict[str, tuple[PreTrainedConfig, int]] = {
    "llama-3-8b": (
        LlamaConfig(
            hidden_size=256, intermediate_size=896, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
            vocab_size=64, dtype="bfloat16",
        ),
        32,
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig(
            hidden_size=128, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1, vocab_size=64, dtype="bfloat16",
        ),
        48,
    ),
}  # fmt: skip
TIMED_ITERS = 500  # enough that the waits at the checks, one in TIMED_ITERS / 10, do not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w3a16", "w4a8", "w8a8"])
    parser.add_argument("--presets", nargs="+", default=["fast", "paper"])
    parser.add_argument("--loss", choices=LOSSES, help="default: the scheme's")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="whose block")
    parser.add_argument("--timed-iters", type=int, default=TIMED_ITERS, metavar="N", help="at most so many are taken")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--max-gpu-gb", type=float, default=12.0, help="for cached hidden states")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = choose_device("auto")
    config, blocks = (SMALL if arguments.small else SHAPES)[arguments.shape]
    work = partial(all_rows, config, blocks, device, arguments)
    with started_ranks(arguments.gpus, device, work) as ranks:
        rows = work(ranks)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "gpus": arguments.gpus,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "block": {
            "of": f"{arguments.shape}, small" if arguments.small else arguments.shape, "blocks": blocks,
            "hidden": config.hidden_size, "heads": [config.num_attention_heads, config.num_key_value_heads],
        },
        "rows": rows,
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'scheme':<8}{'preset':<9}{'ms/iter':>9}{'peak GB':>9}{'fixed s':>9}{'minutes':>9}  for {blocks} blocks")
    for row in rows:
        print(
            f"{row['scheme']:<8}{row['preset']:<9}{row['ms_per_iteration']:>9.2f}{row['peak_gb']:>9.1f}"
            f"{row['fixed_seconds']:>9.2f}{row['minutes_for_all_blocks']:>9.1f}"
        )


def all_rows(config: PreTrainedConfig, blocks: int, device: torch.device, arguments: Any, ranks: Ranks) -> list[dict[str, Any]]:
    choose_device("auto")  # in every process: it also asks for deterministic algorithms
    rows = []
    for scheme in arguments.schemes:
        for name in arguments.presets if scheme == arguments.schemes[0] else arguments.presets[-1:]:
            rows.append(measured(config, blocks, scheme, name, device, arguments, ranks))
            if ranks.rank == 0:
                print(json.dumps(rows[-1]), flush=True)
    return rows


def measured(
    config: PreTrainedConfig, blocks: int, scheme: str, preset: str, device: torch.device, arguments: Any, ranks: Ranks
) -> dict[str, Any]:
    """Quantize one block as the tool does, with fewer iterations; the rest is extrapolated from the time of one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    wanted = PRESETS[preset]
    if arguments.small:
        wanted = replace(wanted, samples=8, seq_len=64)
    iters = 20 if arguments.small else min(wanted.iters, arguments.timed_iters)
    settings = QuantizeSettings(
        scheme=scheme, iters=iters, samples=wanted.samples, seq_len=wanted.seq_len,
        batch_size=wanted.batch_size, renew=QuantizeSettings(scheme, iters=wanted.iters).renews,
        loss=arguments.loss,
    )  # fmt: skip
    dtype = product_dtype(device)
    torch.manual_seed(0)
    family = block_family(config, 0)
    model = empty_model(config)
    block = model.get_submodule(f"{family.blocks}.0").to_empty(device=device).to(torch.float32 if settings.smooths else dtype)
    for name, parameter in block.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    block.requires_grad_(False)
    rotary = type(model.get_submodule(family.rotary))(config=config)
    positions = torch.arange(settings.seq_len).unsqueeze(0)
    tables = rotary(torch.zeros(1, settings.seq_len, config.hidden_size), positions)
    call = {"position_embeddings": tuple(table.to(device) for table in tables), "attention_mask": None}
    store = HiddenStatesStore(device, int(arguments.max_gpu_gb * 1e9), Path("."))
    shape = (settings.samples // ranks.size, settings.seq_len, config.hidden_size)
    inputs, targets, *kept = (store.like(shape, torch.bfloat16) for _ in range(settings.caches))
    torch.manual_seed(1 + ranks.rank)
    fill(inputs, config.hidden_size)
    for float_inputs in kept:
        float_inputs.copy(inputs)
    metric = PLAIN
    if settings.weighs_errors:
        gradients = torch.randn(4 * config.hidden_size, config.hidden_size, device=device)
        metric = fisher_metric(gradients.T @ gradients, dtype)
    started = time.monotonic()
    run_block(block, inputs, targets, call, windows_at_once(block), dtype)
    quantizer = BlockQuantizer(settings, family, config, dtype, ranks)
    generator, float_inputs = torch.Generator().manual_seed(0), kept[0] if kept else None
    result = quantizer.quantize(block, inputs, targets, call, generator, float_inputs, metric=metric)
    run_block(block, inputs, inputs, call, windows_at_once(block), dtype)
    synchronize(device)
    seconds = time.monotonic() - started
    per_iteration = result.learning.seconds_per_step
    fixed = seconds - result.learning.steps * per_iteration
    return {
        "scheme": scheme,
        "preset": preset,
        "tokens_per_step": settings.batch_size * settings.seq_len,
        "rank": settings.matrix_rank(config.hidden_size),
        "renews": settings.renews,
        "loss": settings.decided_loss,
        "ms_per_iteration": per_iteration * 1e3,
        "fixed_seconds": fixed,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0,
        "hidden_states_in": store.places,
        "iterations": wanted.iters,
        "minutes_for_all_blocks": blocks * (fixed + wanted.iters * per_iteration) / 60,
        "error_before": result.learning.error_before,
        "error_after": result.learning.error_after,
    }


def fill(states: HiddenStates, width: int) -> None:
    """Normal values, one channel in 64 ten times as large."""
    sizes = torch.ones(width, device=states.device)
    sizes[::64] = 10
    for rows in states.slices(8):
        shape = (rows.stop - rows.start, *states.stored.shape[1:])
        states.put(rows, torch.randn(shape, device=states.device) * sizes)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
