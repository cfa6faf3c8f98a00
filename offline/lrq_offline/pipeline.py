"""Quantize a model folder: open, calibrate, learn block by block, write. Reads top to bottom.

In memory at any time: one decoder block, its quantized copy, and the cached block inputs of both models.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.activation_ranges import calibrate_static_ranges
from lrq_offline.block_learning import LearningResult, learn_block, run_block
from lrq_offline.calibration import BlockInputs, capture_block_inputs, read_texts, shipped_calibration, token_windows
from lrq_offline.config import QuantizeSettings, default_learning_rate
from lrq_offline.decoder_blocks import blocks_of, empty_model, load_block, restore_rotary
from lrq_offline.learned_scales import FlexRoundScale, FrozenRounding, LearnedRounding, LrqScale
from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.quantized_block import (
    ActivationQuantizer,
    FakeQuantizedLinear,
    dynamic_activations,
    fix_weights,
    quantized_copy,
    static_activations,
)
from lrq_offline.source_model import SourceModel, load_tokenizer
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.checkpoint.schema import Manifest, undivided_layers
from lrq_vllm.checkpoint.store import ShardWriter
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["REPORT_NAME", "BlockReport", "quantize_model"]

logger = logging.getLogger(__name__)

REPORT_NAME = "lrq_report.json"


@dataclass(frozen=True)
class BlockReport:
    """What is told of one finished block; errors are relative squared errors of the block's output."""

    block: int
    blocks: int
    error_before: float
    error_after: float
    seconds: float


def quantize_model(
    model_dir: Path,
    output: Path,
    settings: QuantizeSettings,
    *,
    overwrite: bool = False,
    on_block: Callable[[BlockReport], None] = lambda report: None,
) -> dict[str, Any]:
    """Quantize ``model_dir`` into ``output`` and return what was written to lrq_report.json.

    ``output`` appears whole at the end or not at all. Raises a child of LrqError for anything the user can put right.
    """
    started = time.monotonic()
    check_output(output, model_dir, overwrite=overwrite)
    source = SourceModel.open(model_dir)
    manifest = plan(source, settings)
    calibration = settings.calibration or shipped_calibration()
    windows = token_windows(load_tokenizer(model_dir), read_texts(calibration), settings.samples, settings.seq_len)
    with new_folder(output) as folder:
        writer = ShardWriter(folder)
        reports = _quantize_blocks(source, manifest, settings, windows, writer, on_block)
        writer.finish()
        report = _report(source, manifest, settings, calibration, reports, writer.total_bytes, time.monotonic() - started)
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        carry_over(model_dir, folder)
        config = {**source.raw_config, "quantization_config": manifest.to_dict()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return report


def plan(source: SourceModel, settings: QuantizeSettings) -> Manifest:
    """The manifest of the result. Raises SettingsError before any work if the group size does not divide a layer's inputs."""
    family, model = source.family, empty_model(source.config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [f"{family.blocks}.{i}.{linear}" for i in range(len(blocks_of(model, family))) for linear in family.linears]
    quantized = {name: (linears[name].out_features, linears[name].in_features) for name in modules}
    skipped = [name for name in linears if name not in quantized]
    problems = [] if settings.group_size is None else undivided_layers(settings.group_size, quantized)
    if problems:
        raise SettingsError(one_paragraph(problems, "Choose a --group-size that divides all of them, or leave it out."))
    return Manifest(settings.scheme, settings.weight_format, quantized, tuple(skipped), version("lrq"))


def _quantize_blocks(
    source: SourceModel,
    manifest: Manifest,
    settings: QuantizeSettings,
    windows: Tensor,
    writer: ShardWriter,
    on_block: Callable[[BlockReport], None],
) -> list[BlockReport]:
    generator = torch.Generator().manual_seed(settings.seed)
    device = torch.device("cpu")
    family, model = source.family, empty_model(source.config)
    names = [f"{family.blocks}.{index}" for index in range(len(blocks_of(model, family)))]
    outside = [name for name in source.tensors if not name.startswith(f"{family.blocks}.")]
    writer.write_shard({name: source.read(name) for name in outside})
    inputs = _first_block_inputs(source, model, windows, device)
    float_hidden = quantized_hidden = inputs.hidden
    reports = []
    for index, name in enumerate(names):
        block = load_block(model, name, source.read, torch.float32, device)
        target = run_block(block, float_hidden, inputs.arguments, settings.batch_size)
        activations = _Activations.of(block, quantized_hidden, inputs, source, settings, generator)
        quantized = quantized_copy(block, _roundings(block, source, settings, generator), activations.quantizers)
        result = learn_block(
            quantized, quantized_hidden, target, inputs.arguments, settings, _rate(source, settings), generator
        )
        linears = {linear: quantized.get_submodule(linear) for linear in family.linears}
        writer.write_shard(_block_tensors(name, source, manifest, linears, activations.stored))
        fix_weights(quantized)
        quantized_hidden = run_block(quantized, quantized_hidden, inputs.arguments, settings.batch_size)
        float_hidden = target
        reports.append(_block_report(index, len(names), result))
        on_block(reports[-1])
    return reports


def _first_block_inputs(source: SourceModel, model: nn.Module, windows: Tensor, device: torch.device) -> BlockInputs:
    embedding = load_block(model, source.family.embedding, source.read, torch.float32, device)
    model.set_submodule(source.family.embedding, embedding)
    restore_rotary(model, source.family, source.config)
    inputs = capture_block_inputs(model, source.family, windows)
    # Hidden states are kept in the model's own precision, which is what a server hands from block to block.
    return BlockInputs(inputs.hidden.to(source.config.dtype or torch.bfloat16), inputs.arguments)


def _rate(source: SourceModel, settings: QuantizeSettings) -> float:
    return settings.learning_rate or default_learning_rate(settings.method, settings.scheme, source.config.hidden_size)


def _roundings(
    block: nn.Module, source: SourceModel, settings: QuantizeSettings, generator: torch.Generator
) -> dict[str, LearnedRounding]:
    rank = settings.rank or max(source.config.hidden_size // 4, 1)
    roundings: dict[str, LearnedRounding] = {}
    for name in source.family.linears:
        linear, bits = block.get_submodule(name), settings.bits.weight_bits
        assert isinstance(linear, nn.Linear)
        weight = linear.weight
        initial = search_steps(weight, bits, settings.group_size, symmetric=settings.symmetric)
        match settings.method:
            case "lrq":
                roundings[name] = LrqScale(weight, initial, bits, rank, generator)
            case "flexround":
                roundings[name] = FlexRoundScale(weight, initial, bits)
            case _:
                roundings[name] = FrozenRounding(weight, initial, bits)
    return roundings


@dataclass(frozen=True)
class _Activations:
    """By linear name: the fake quantizer to learn with, and the tensors to store (static schemes only)."""

    quantizers: Mapping[str, ActivationQuantizer]
    stored: Mapping[str, dict[str, Tensor]]

    @classmethod
    def of(
        cls,
        block: nn.Module,
        hidden: Tensor,
        inputs: BlockInputs,
        source: SourceModel,
        settings: QuantizeSettings,
        generator: torch.Generator,
    ) -> "_Activations":
        """What the scheme asks for: nothing, a quantizer for each token, or ranges calibrated on ``hidden``."""
        rule = settings.bits.activation
        if rule is None:
            return cls({}, {})
        if not rule.static:
            return cls(dict.fromkeys(source.family.linears, dynamic_activations(rule.bits)), {})
        ranges = calibrate_static_ranges(block, hidden, inputs.arguments, source.family, generator)
        return cls(
            {name: static_activations(quantizer, rule.bits) for name, quantizer in ranges.items()},
            {
                name: {"input_step": quantizer.step, "input_zero_point": quantizer.zero_point.to(torch.uint8)}
                for name, quantizer in ranges.items()
            },
        )


def _block_tensors(
    block_name: str,
    source: SourceModel,
    manifest: Manifest,
    linears: Mapping[str, nn.Module],
    activations: Mapping[str, dict[str, Tensor]],
) -> dict[str, Tensor]:
    """One block as stored: every quantized linear's tensors, and the rest exactly as in the source."""
    tensors = {}
    replaced = {f"{block_name}.{name}.weight" for name in linears}
    for name in source.tensors:
        if name.startswith(f"{block_name}.") and name not in replaced:
            tensors[name] = source.read(name)
    for name, linear in linears.items():
        assert isinstance(linear, FakeQuantizedLinear)
        module = f"{block_name}.{name}"
        q, (step, zero_point) = linear.rounding.quantized()
        stored = {
            "qweight": pack(q, manifest.weight.bits),
            "weight_step": step,
            "weight_zero_point": zero_point.to(torch.uint8),
            # Linears of one group share these; safetensors wants a tensor of its own for each name.
            **{suffix: tensor.clone() for suffix, tensor in activations.get(name, {}).items()},
        }
        for suffix, spec in manifest.tensors_of(module).items():
            assert (stored[suffix].dtype, tuple(stored[suffix].shape)) == (spec.dtype, spec.shape), (module, suffix)
            tensors[f"{module}.{suffix}"] = stored[suffix]
    return tensors


def _block_report(index: int, count: int, result: LearningResult) -> BlockReport:
    report = BlockReport(index + 1, count, result.error_before, result.error_after, result.seconds)
    logger.info(
        "block %d/%d: relative error %.3e to %.3e in %.1f s",
        report.block, report.blocks, report.error_before, report.error_after, report.seconds,
    )  # fmt: skip
    return report


def _report(
    source: SourceModel,
    manifest: Manifest,
    settings: QuantizeSettings,
    calibration: Path,
    blocks: list[BlockReport],
    checkpoint_bytes: int,
    seconds: float,
) -> dict[str, Any]:
    float_bytes = sum(
        rows * columns * source.tensors.spec(f"{module}.weight").dtype.itemsize
        for module, (rows, columns) in manifest.quantized.items()
    )
    quantized_bytes = sum(
        spec.dtype.itemsize * torch.Size(spec.shape).numel()
        for module in manifest.quantized
        for spec in manifest.tensors_of(module).values()
    )
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    return {
        "tool_version": manifest.tool_version,
        "settings": {**shown, "learning_rate": _rate(source, settings), "calibration": calibration.name},
        "quantized_linears": {
            "modules": len(manifest.quantized),
            "float_bytes": float_bytes,
            "bytes": quantized_bytes,
            "ratio": quantized_bytes / float_bytes,
        },
        "checkpoint_bytes": checkpoint_bytes,
        "blocks": [asdict(block) for block in blocks],
        "seconds": seconds,
    }
