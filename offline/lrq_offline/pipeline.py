"""Quantize a model folder: open, calibrate, learn block by block (blockwise_run.py), write. Reads top to bottom."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.block_quantizer import QuantizedBlock
from lrq_offline.blockwise_run import BlockwiseRun, FinishedBlock
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_lint import lint_texts
from lrq_offline.calibration_text import read_texts, shipped_calibration
from lrq_offline.compute import Machine, choose_device, device_name, served_in
from lrq_offline.config import QuantizeSettings
from lrq_offline.golden_texts import golden_texts
from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.progress import Progress, fingerprint
from lrq_offline.rank_processes import started_ranks
from lrq_offline.rotated_source import RotatedSource
from lrq_offline.rotation import rotation_of
from lrq_offline.run_manifest import manifest_of
from lrq_offline.scheme_advice import scheme_warnings
from lrq_offline.source_model import SourceModel, check_length, check_vocabulary, load_tokenizer
from lrq_offline.stored_block import block_tensors
from lrq_vllm.checkpoint.golden import write_golden
from lrq_vllm.checkpoint.report import REPORT_NAME
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.seal import write_seal
from lrq_vllm.checkpoint.store import CONFIG_NAME, ShardWriter
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["BlockReport", "open_source", "quantize_model"]

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


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
    evaluation: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    on_warning: Callable[[str], None] = lambda warning: None,
    on_gradients: Callable[[int], None] = lambda windows: None,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> dict[str, Any]:
    """Quantize ``model_dir`` into ``output`` and return what was written to lrq_report.json.

    evaluation: a text that the result will be measured on, only looked for in the calibration text. on_gradients: told of how
    many windows are passed through the float model and back, before they are, if learning weighs errors.
    ``output`` appears whole at the end or not at all. A run that was stopped goes on after its last finished block, unless
    ``restart``. Raises a child of LrqError for anything the user can put right.
    """
    started = time.monotonic()
    check_output(output, model_dir, overwrite=overwrite)
    machine = machine or Machine()
    device = choose_device(machine.device)
    source = open_source(model_dir, settings, device)
    manifest = manifest_of(source.config, settings)
    _check_ranks(machine.gpus, device, settings, source, manifest)
    tokenizer = load_tokenizer(model_dir)
    texts = read_texts(settings.calibration or shipped_calibration(), tokenizer)
    windows = token_windows(tokenizer, texts, settings.samples, settings.seq_len)
    check_vocabulary(model_dir, windows, source.config)
    unseen = read_texts(evaluation, tokenizer) if evaluation else []
    warnings = source.warnings + scheme_warnings(settings)
    warnings += lint_texts(texts, tokenizer, samples=settings.samples, seq_len=settings.seq_len, evaluation=unseen)
    for warning in warnings:
        on_warning(warning)
    with new_folder(output, restart=restart, check=lambda: check_output(output, model_dir, overwrite=overwrite)) as folder:
        run = fingerprint(source.tensors, source.raw_config, windows, settings, _place(machine, device))
        progress = Progress(folder, run)
        writer = ShardWriter(folder, len(source.block_names) + 1)
        shards = _Shards(source, manifest, writer, progress, on_block, settings.smooths)
        finished = [shards.path(index) for index in range(len(progress.finished))]
        started -= sum(done["seconds"] for done in progress.finished)  # what an earlier run took for them
        progress.keep_only([writer.path(1), *finished] if finished else [])
        shards.start()
        blockwise = BlockwiseRun(source, manifest, settings, machine, windows, finished, folder)
        with started_ranks(machine.gpus, device, blockwise) as ranks:
            blockwise(ranks, shards.take, on_gradients)
        total_bytes = writer.finish()
        report = _report(source, manifest, settings, progress.finished, warnings, total_bytes, time.monotonic() - started)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        carry_over(model_dir, folder, without=(CONFIG_NAME,))
        config = {**source.raw_config, "quantization_config": manifest.to_dict()}
        write_golden(folder, golden_texts(folder, config, windows, device))
        write_seal(folder, config)
        written = folder / "config.partial"
        written.write_text(json.dumps(config, indent=2) + "\n")
        written.rename(folder / CONFIG_NAME)
    return report


def open_source(model_dir: Path, settings: QuantizeSettings, device: torch.device = _CPU) -> SourceModel:
    """The float model as it is going to be quantized: rotated on ``device``, if the settings say so.

    Raises ModelFolderError for a folder that cannot be quantized, SettingsError for windows longer than it was made for.
    """
    source = SourceModel.open(model_dir)
    check_length(model_dir, settings.seq_len, source.config)
    if not settings.rotates:
        return source
    rotation = rotation_of(source.config, source.family, settings.seed, settings.hadamard_block, device)
    return RotatedSource.of(source, rotation)


def _check_ranks(count: int, device: torch.device, settings: QuantizeSettings, source: SourceModel, manifest: Manifest) -> None:
    """Raises SettingsError if so many GPUs are not there, or the work cannot be divided among them."""
    problems, rank = [], settings.matrix_rank(source.config.hidden_size)
    if count < 1:
        problems.append(f"gpus is {count}, but must be at least 1")
    elif device.type == "cuda" and count > torch.cuda.device_count():
        problems.append(f"gpus is {count}, but this machine has {torch.cuda.device_count()}")
    else:
        divided = {"samples": settings.samples, "batch-size": settings.batch_size}
        divided |= {f"the outputs of {name}": out_features for name, (out_features, _) in manifest.quantized.items()}
        if settings.learns and rank is not None:
            divided |= {f"the rank of {name}": min(rank, *shape) for name, shape in manifest.quantized.items()}
        problems += [f"{name} ({value}) cannot be divided by {count} GPUs" for name, value in divided.items() if value % count]
    if problems:
        raise SettingsError("The work does not fit the GPUs: " + one_paragraph(problems, "Change --gpus or these options."))


def _place(machine: Machine, device: torch.device) -> str:
    return device_name(device) if machine.gpus == 1 else f"{machine.gpus} x {device_name(device)}"


@dataclass(frozen=True)
class _Shards:
    """What is written while a run goes on: a shard for each block and the note that it is finished."""

    source: SourceModel
    manifest: Manifest
    writer: ShardWriter
    progress: Progress
    on_block: Callable[[BlockReport], None]
    smooths: bool

    def start(self) -> None:
        """Write what stands outside the blocks, unless an earlier run has done it."""
        if not self.progress.finished:
            outside = [name for name in self.source.names() if not name.startswith(f"{self.source.family.blocks}.")]
            self.writer.write_shard(1, {name: self.source.read(name) for name in outside})

    def path(self, index: int) -> Path:
        """The file of block ``index``, from 0."""
        return self.writer.path(index + 2)

    def take(self, finished: FinishedBlock) -> None:
        """Make a block durable, and tell of it."""
        index, count, result = finished.index, len(self.source.block_names), finished.result
        if result is not None:
            self.writer.write_shard(index + 2, self._tensors(finished.name, finished.block, result))
            self.progress.record(_block_report(index, count, result, finished.seconds))
        done = self.progress.finished[index]
        self.on_block(BlockReport(index + 1, count, done["error_before"], done["error_after"], done["seconds"], result is None))

    def _tensors(self, name: str, block: nn.Module, result: QuantizedBlock) -> dict[str, Tensor]:
        """The block's shard; tensors of the source that the model does not use go along as they are."""
        stored = block_tensors(block, name, self.manifest, result.ranges, result.clips, self._dtype_of)
        replaced = {f"{module}.weight" for module in self.manifest.quantized}
        others = [key for key in self.source.names() if key.startswith(f"{name}.") and key not in {*stored, *replaced}]
        return stored | {key: self.source.read(key) for key in others}

    def _dtype_of(self, name: str) -> torch.dtype:
        """That of the source; where SmoothQuant has made values that a server's dtype holds, one that holds them too."""
        dtype = self.source.spec_of(name).dtype
        return torch.promote_types(dtype, served_in(self.source.config)) if self.smooths else dtype


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
        "renew": settings.renews,
        "loss": settings.decided_loss,
        "learn_inputs": "float" if settings.learns_from_float else "quantized",
        "rotate": settings.rotates,
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
            "correction_bytes": manifest.correction_bytes,
        },
        "source_bytes": sum(source.stored_bytes(name) for name in source.tensors),
        "checkpoint_bytes": checkpoint_bytes,
        "warnings": warnings,
        "blocks": blocks,
        "seconds": seconds,
    }
