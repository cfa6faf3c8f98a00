"""Quantize a model folder: open, calibrate, learn block by block, write. Reads top to bottom.

In memory at any time: one decoder block and its learning state, and the cached hidden states of both models.
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrq_offline.block_learning import run_block
from lrq_offline.block_quantizer import BlockQuantizer, QuantizedBlock
from lrq_offline.calibration import BlockInputs, capture_block_inputs, token_windows
from lrq_offline.calibration_lint import lint_texts
from lrq_offline.calibration_text import read_texts, shipped_calibration
from lrq_offline.compute import choose_device, device_name, product_dtype
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import empty_model, load_block, restore_rotary
from lrq_offline.hidden_states import HiddenStates, HiddenStatesStore
from lrq_offline.kv_cache import quantize_kv_cache
from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.progress import Progress, fingerprint
from lrq_offline.report_data import REPORT_NAME
from lrq_offline.source_model import SourceModel, load_tokenizer
from lrq_offline.stored_block import block_tensors, restore_block
from lrq_vllm.checkpoint.schema import Manifest, undivided_layers
from lrq_vllm.checkpoint.store import ShardWriter
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["BlockReport", "Machine", "gpu_budget", "manifest_of", "quantize_model"]

logger = logging.getLogger(__name__)

# Windows per pass where nothing is learned.
_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Machine:
    """Where a run computes: device ``auto``, ``cpu`` or ``cuda``; the GPU memory that cached hidden states may take."""

    device: str = "auto"
    max_gpu_gb: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """What is told of one finished block; errors are relative squared errors of its output, None if they are not finite."""

    block: int
    blocks: int
    error_before: float | None
    error_after: float | None
    seconds: float
    resumed: bool = False


def quantize_model(
    model_dir: Path,
    output: Path,
    settings: QuantizeSettings,
    *,
    machine: Machine | None = None,
    overwrite: bool = False,
    restart: bool = False,
    on_warning: Callable[[str], None] = lambda warning: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> dict[str, Any]:
    """Quantize ``model_dir`` into ``output`` and return what was written to lrq_report.json.

    ``output`` appears whole at the end or not at all. A run that was stopped goes on after its last finished block, unless
    ``restart``. Raises a child of LrqError for anything the user can put right.
    """
    started = time.monotonic()
    check_output(output, model_dir, overwrite=overwrite)
    source = SourceModel.open(model_dir)
    manifest = manifest_of(source, settings)
    machine = machine or Machine()
    device = choose_device(machine.device)
    tokenizer = load_tokenizer(model_dir)
    texts = read_texts(settings.calibration or shipped_calibration(), tokenizer)
    windows = token_windows(tokenizer, texts, settings.samples, settings.seq_len)
    warnings = lint_texts(texts, tokenizer, samples=settings.samples, seq_len=settings.seq_len)
    for warning in warnings:
        on_warning(warning)
    with new_folder(output, restart=restart) as folder:
        run = fingerprint(source.tensors, source.raw_config, windows, settings, device_name(device))
        progress = Progress(folder, run)
        writer = ShardWriter(folder, len(source.block_names) + 1)
        _BlockwiseRun(source, manifest, settings, writer, device, progress, on_block).run(
            windows, HiddenStatesStore(device, gpu_budget(machine, device), folder)
        )
        total_bytes = writer.finish()
        report = _report(source, manifest, settings, progress.finished, warnings, total_bytes, time.monotonic() - started)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        carry_over(model_dir, folder)
        config = {**source.raw_config, "quantization_config": manifest.to_dict()}
        written = folder / "config.partial"
        written.write_text(json.dumps(config, indent=2) + "\n")
        # Only a rename away from being a model: nothing that can fail comes after the notes of the finished blocks are gone.
        progress.clear()
        written.rename(folder / "config.json")
    return report


def manifest_of(source: SourceModel, settings: QuantizeSettings) -> Manifest:
    """The manifest of the result. Raises SettingsError before any work if the group size does not divide a layer's inputs."""
    family, model = source.family, empty_model(source.config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [f"{block}.{linear}" for block in source.block_names for linear in family.linears]
    quantized = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    skipped = [name for name in linears if name not in quantized]
    problems = [] if settings.group_size is None else undivided_layers(settings.group_size, quantized)
    if problems:
        raise SettingsError(one_paragraph(problems, "Choose a --group-size that divides all of them, or leave it out."))
    return Manifest(settings.scheme, settings.weight_format, quantized, tuple(skipped), version("lrq"))


def gpu_budget(machine: Machine, device: torch.device) -> int:
    """Bytes for cached hidden states: what was asked for, else half of what the GPU has free."""
    if machine.max_gpu_gb is not None:
        return int(machine.max_gpu_gb * 1e9)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0


@dataclass
class _BlockwiseRun:
    """The passage through the model's blocks: those that are finished are restored, the others quantized."""

    source: SourceModel
    manifest: Manifest
    settings: QuantizeSettings
    writer: ShardWriter
    device: torch.device
    progress: Progress
    on_block: Callable[[BlockReport], None]

    def run(self, windows: Tensor, store: HiddenStatesStore) -> None:
        """Write every shard: what stands outside the blocks first, then block after block."""
        family, model = self.source.family, empty_model(self.source.config)
        names = self.source.block_names
        if not self.progress.finished:
            outside = [name for name in self.source.tensors if not name.startswith(f"{family.blocks}.")]
            self.writer.write_shard(1, {name: self.source.read(name) for name in outside})
        inputs = self._first_block_inputs(model, windows)
        caches = [store.like(tuple(inputs.hidden.shape), inputs.hidden.dtype) for _ in range(2)]
        for cache in caches:
            cache.put(slice(None), inputs.hidden)
        arguments = {key: _moved(value, self.device) for key, value in inputs.arguments.items()}
        for index, name in enumerate(names):
            self._block(model, name, index, len(names), caches[0], caches[1], arguments)

    def _block(
        self,
        model: nn.Module,
        name: str,
        index: int,
        count: int,
        float_hidden: HiddenStates,
        quantized_hidden: HiddenStates,
        arguments: dict[str, Any],
    ) -> None:
        """One block: both caches hold its inputs before and its outputs after."""
        started = time.monotonic()
        dtype = product_dtype(self.device)
        # 16-bit weights stay as they are where products are 16-bit, unless smoothing is going to change them.
        as_stored = dtype == torch.bfloat16 and not self.settings.smooths
        block = load_block(model, name, self.source.read, None if as_stored else torch.float32, self.device)
        run_block(block, float_hidden, float_hidden, arguments, _WINDOWS_AT_ONCE, dtype)
        if self.settings.kv_bits is not None:
            quantize_kv_cache(block, self.settings.kv_bits)
        resumed = index < len(self.progress.finished)
        if resumed:
            restore_block(block, name, self.manifest, load_file(self.writer.path(index + 2)), dtype)
        else:
            quantizer = BlockQuantizer(self.settings, self.source.family, self.source.config, dtype)
            # Of the block alone, so that a run that goes on draws what an uninterrupted one would.
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + index)
            result = quantizer.quantize(block, quantized_hidden, float_hidden, arguments, generator)
            self.writer.write_shard(index + 2, self._tensors(name, block, result))
            self.progress.record(_block_report(index, count, result, time.monotonic() - started))
        run_block(block, quantized_hidden, quantized_hidden, arguments, _WINDOWS_AT_ONCE, dtype)
        done = self.progress.finished[index]
        self.on_block(BlockReport(index + 1, count, done["error_before"], done["error_after"], done["seconds"], resumed))

    def _first_block_inputs(self, model: nn.Module, windows: Tensor) -> BlockInputs:
        family, config = self.source.family, self.source.config
        model.set_submodule(
            family.embedding, load_block(model, family.embedding, self.source.read, torch.float32, torch.device("cpu"))
        )
        restore_rotary(model, family, config)
        # Hidden states are kept in the model's own precision, which is what a server hands from block to block.
        return capture_block_inputs(model, family, windows, config.dtype or torch.bfloat16)

    def _tensors(self, name: str, block: nn.Module, result: QuantizedBlock) -> dict[str, Tensor]:
        """The block's shard; tensors of the source that the model does not use go along as they are."""
        stored = block_tensors(block, name, self.manifest, result.ranges, lambda key: self.source.tensors.spec(key).dtype)
        replaced = {f"{module}.weight" for module in self.manifest.quantized}
        others = [key for key in self.source.tensors if key.startswith(f"{name}.") and key not in {*stored, *replaced}]
        return stored | {key: self.source.read(key) for key in others}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _block_report(index: int, count: int, result: QuantizedBlock, seconds: float) -> dict[str, Any]:
    learning = result.learning
    logger.info(
        "block %d/%d: relative error %.3e to %.3e in %d steps, %.1f s",
        index + 1, count, learning.error_before, learning.error_after, learning.steps, seconds,
    )  # fmt: skip
    return {
        "block": index + 1,
        "blocks": count,
        "error_before": _finite(learning.error_before),
        "error_after": _finite(learning.error_after),
        "seconds": seconds,
        "steps": learning.steps,
        "curve": asdict(learning.curve),
        "layers": {
            name: {"error_before": _finite(x.error_before), "error_after": _finite(x.error_after), "fallback": x.fallback}
            for name, x in result.layers.items()
        },
    }


def _finite(error: float) -> float | None:
    """JSON has no NaN."""
    return error if math.isfinite(error) else None


def _report(
    source: SourceModel,
    manifest: Manifest,
    settings: QuantizeSettings,
    blocks: list[dict[str, Any]],
    warnings: list[str],
    checkpoint_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    float_bytes = sum(source.stored_bytes(f"{module}.weight") for module in manifest.quantized)
    width = source.config.hidden_size
    calibration = Path(settings.calibration).name if settings.calibration else shipped_calibration().name
    decided = {
        "rank": settings.matrix_rank(width),
        "learning_rate": settings.rate(width),
        "weight_decay": settings.decay,
        "calibration": calibration,
    }
    return {
        "tool_version": manifest.tool_version,
        "model": source.folder.resolve().name,
        "settings": asdict(settings) | decided,
        "quantized_linears": {
            "modules": len(manifest.quantized),
            "float_bytes": float_bytes,
            "bytes": manifest.quantized_bytes,
            "ratio": manifest.quantized_bytes / float_bytes,
        },
        "source_bytes": sum(source.stored_bytes(name) for name in source.tensors),
        "checkpoint_bytes": checkpoint_bytes,
        "warnings": warnings,
        "blocks": blocks,
        "seconds": seconds,
    }
