"""An LRQ checkpoint in the compressed-tensors format, which vLLM serves without the plugin.

The format is that of https://github.com/vllm-project/compressed-tensors, here 0.17, as vLLM 0.32 reads it. Two of its forms can
hold our layers without changing an integer:

16-bit activations, "pack-quantized", 4 bits: weights in int32 words, the first input in the lowest bits, and along the outputs
    zero-points likewise, all on the unsigned grid: as in an LRQ checkpoint. 3- and 2-bit weights become symmetric 4-bit ones,
    q - z, whose range -7 .. 7 fits. (At 3 bits the library and vLLM pack differently, and few of vLLM's kernels know them.)
8-bit activations, "int-quantized", 8 bits: weights in int8, symmetric: q - z. That of 4-bit weights, -15 .. 15, fits too.

Steps of the first form are kept in the model's 16-bit dtype by every reader, those of the second in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq_offline.checkpoint_rewrite import LayerForm, OpenCheckpoint, open_checkpoint, outside_of_weights, rewrite
from lrq_offline.served_precision import served_dtype
from lrq_vllm.checkpoint.packing import pack, values_per_group
from lrq_vllm.checkpoint.schema import Manifest, config_without_quantization
from lrq_vllm.errors import SettingsError, one_paragraph
from lrq_vllm.kernels.reference import dequantize_weight

__all__ = ["CompressedTensorsExport", "export_compressed_tensors", "layer_form", "quantization_config", "why_not"]

_PACKED_BITS = 4
_SIGN = 1 << (_PACKED_BITS - 1)  # symmetric packed weights are stored with this added


@dataclass(frozen=True)
class CompressedTensorsExport:
    """What was written. step_change: the largest relative change of a step by rounding; 0 if all steps are as they were."""

    total_bytes: int
    step_change: float


def export_compressed_tensors(folder: Path, output: Path, *, round_steps: bool = False) -> CompressedTensorsExport:
    """Write the model in ``folder`` as compressed-tensors: the same integers, zero-points and steps.

    round_steps: round steps that the model's 16-bit dtype does not hold, which are refused otherwise (16-bit activations only;
    else steps stay float32). ``output`` appears whole or not at all. Raises SettingsError for what the format cannot hold, and
    CheckpointError or ModelFolderError for a checkpoint that is not whole.
    """
    source = open_checkpoint(folder, output)
    manifest, change = source.manifest, 0.0
    problems = why_not(manifest)
    if problems:
        cure = "Quantize again with other settings, or serve this checkpoint with the plugin."
        raise SettingsError(f"compressed-tensors cannot hold {folder}: {one_paragraph(problems, cure)}")
    dtype = served_dtype(source.config)
    if manifest.activation is None:
        change = _step_change(source, dtype, round_steps)
    config = config_without_quantization(source.config) | {"quantization_config": quantization_config(manifest)}
    return CompressedTensorsExport(rewrite(source, output, config, layer_form(manifest, dtype)), change)


def why_not(manifest: Manifest) -> list[str]:
    """The reasons why no compressed-tensors model computes what a checkpoint means; none if one does."""
    problems = outside_of_weights(manifest)
    if any(".experts." in name for name in manifest.quantized):
        problems.append("it has experts, which vLLM takes there in other forms than ours: none was seen to be served")
    if manifest.activation is not None and manifest.activation.bits < 8:
        problems.append("its inputs are clipped and rounded to 4 bits, which vLLM does not do there")
    if manifest.kv_bits is not None:
        problems.append(
            "it asks for 8-bit keys and values with a step for each token and head (--kv-bits 8), which has no name there"
        )
    if manifest.activation is not None and manifest.weight.group_size is not None:
        problems.append("its groups of inputs have steps of their own, which vLLM takes there with 16-bit activations only")
    if manifest.weight.bits == 8 and not manifest.weight.symmetric:
        problems.append("vLLM takes 8-bit weights only if they are symmetric there, and these are not (--symmetric makes such)")
    if _has_zero_points(manifest):
        unit = values_per_group(_PACKED_BITS)
        problems += [
            f"{module} has {out} outputs, whose packed zero-points vLLM finds only by {unit}s (--symmetric needs none)"
            for module, (out, _) in manifest.quantized.items()
            if out % unit
        ]
    return problems


def quantization_config(manifest: Manifest) -> dict[str, Any]:
    """The format's ``quantization_config``: all linear layers but the skipped ones, in one form."""
    size, activation = manifest.weight.group_size, manifest.activation
    weights = {
        "num_bits": _PACKED_BITS if activation is None else 8,
        "type": "int",
        "symmetric": not _has_zero_points(manifest),
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    inputs = None if activation is None else {
        "num_bits": activation.bits, "type": "int", "symmetric": False,
        "strategy": "tensor" if activation.static else "token", "dynamic": not activation.static,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if activation is None else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(manifest.skipped),
        "kv_cache_scheme": None,
    }


def layer_form(manifest: Manifest, dtype: torch.dtype) -> LayerForm:
    """What turns a module's tensors into the format's. dtype: the model's 16-bit one, to which steps are rounded where readers
    keep them in it.
    """
    return partial(_packed, manifest, dtype) if manifest.activation is None else partial(_integers, manifest)


def _has_zero_points(manifest: Manifest) -> bool:
    """Whether weights keep zero-points of their own; elsewhere q - z is stored."""
    return manifest.activation is None and manifest.weight.bits == _PACKED_BITS and not manifest.weight.symmetric


def _packed(manifest: Manifest, dtype: torch.dtype, module: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for 16-bit activations."""
    if manifest.weight.bits == _PACKED_BITS:
        words = layer["qweight"]
    else:
        words = pack(_centred(manifest, module, layer) + _SIGN, _PACKED_BITS)
    written = {
        "weight_packed": words,
        "weight_scale": layer["weight_step"].to(dtype),
        "weight_shape": torch.tensor(manifest.quantized[module], dtype=torch.int64),
    }
    if _has_zero_points(manifest):
        written["weight_zero_point"] = pack(layer["weight_zero_point"].T, _PACKED_BITS).T
    return written


def _integers(manifest: Manifest, module: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for 8-bit activations, and a static input's step and zero-point."""
    written = {"weight": _centred(manifest, module, layer).to(torch.int8), "weight_scale": layer["weight_step"]}
    if "input_step" in layer:
        written["input_scale"] = layer["input_step"]
        written["input_zero_point"] = (layer["input_zero_point"].to(torch.int16) - 128).to(torch.int8)
    return written


def _centred(manifest: Manifest, module: str, layer: Mapping[str, Tensor]) -> Tensor:
    """q - z [out, in], in int16."""
    unit = torch.ones_like(layer["weight_step"])
    stored = (layer["qweight"], unit, layer["weight_zero_point"])
    return dequantize_weight(*stored, manifest.weight.bits, manifest.quantized[module][1]).to(torch.int16)


def _step_change(source: OpenCheckpoint, dtype: torch.dtype, round_steps: bool) -> float:
    """The largest relative change of a step when all are rounded to ``dtype``.

    Raises SettingsError if it is not 0 and not wanted, or if a step lies outside the dtype's normal range.
    """
    count, changed, largest, where = 0, 0, 0.0, ""
    for module in source.manifest.quantized:
        step = source.tensors.get(f"{module}.weight_step")
        changes = (step.to(dtype).float() - step).abs() / step
        count, changed = count + changes.numel(), changed + int(changes.count_nonzero())
        if (change := changes.max().item()) > largest:
            largest, where = change, module
    name = str(dtype).removeprefix("torch.")
    if largest > torch.finfo(dtype).eps / 2:
        raise SettingsError(
            f"{source.folder}: {where} has a step outside the range of {name}, in which compressed-tensors readers keep steps. "
            "Export it with --to dense, or serve it with the plugin, which keeps float32."
        )
    if changed and not round_steps:
        raise SettingsError(
            f"{source.folder}: compressed-tensors readers keep steps in the model's {name}, which does not hold {changed:,} of "
            f"these {count:,} float32 steps. Rounding would change a step, and its weights with it, by up to {largest:.2%} "
            f"({where}): pass --round-steps to accept that. --to dense changes nothing, nor does serving with the plugin."
        )
    return largest
