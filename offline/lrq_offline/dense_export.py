"""An LRQ checkpoint as an ordinary 16-bit model, for runtimes that do not know the format."""

import json
from pathlib import Path

import torch
from torch import Tensor

from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_offline.report_data import REPORT_NAME
from lrq_offline.served_precision import served_dtype
from lrq_vllm.checkpoint.golden import GOLDEN_NAME
from lrq_vllm.checkpoint.schema import Manifest, config_without_quantization
from lrq_vllm.checkpoint.seal import SEAL_NAME, check_seal
from lrq_vllm.checkpoint.store import ShardWriter, TensorFolder, check_tensors, read_config, read_manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels.reference import dequantize_weight

__all__ = ["export_dense"]

_OF_THE_CHECKPOINT = (SEAL_NAME, GOLDEN_NAME, REPORT_NAME)


def export_dense(folder: Path, output: Path) -> int:
    """Write the model in ``folder`` with W_hat, rounded to the model's 16-bit dtype, in place of integers; returns bytes.

    It computes what a server computes that multiplies 16-bit activations with the checkpoint's weights, to the bit. ``output``
    appears whole or not at all. Raises SettingsError for a scheme with 8-bit activations, whose rounding no dense model has,
    and CheckpointError or ModelFolderError for a checkpoint that is not whole.
    """
    check_output(output, folder, overwrite=False)
    manifest, tensors, config = read_manifest(folder), TensorFolder(folder), read_config(folder)
    check_tensors(tensors, manifest)
    check_seal(tensors)
    if manifest.activation is not None:
        raise SettingsError(
            f"{folder} is {manifest.scheme}: its layers round their inputs to 8 bits, which a dense model would not do, so "
            "it would give other numbers. Export a scheme with 16-bit activations, or serve this one with the plugin."
        )
    dtype = served_dtype(config)
    files = sorted({tensors.file_of(name) for name in tensors})
    with new_folder(output) as partial:
        writer = ShardWriter(partial, len(files))
        for number, file in enumerate(files, start=1):
            names = [name for name in tensors if tensors.file_of(name) == file]
            writer.write_shard(number, _dense(names, manifest, tensors, dtype))
        total_bytes = writer.finish()
        carry_over(folder, partial, without=_OF_THE_CHECKPOINT)
        (partial / "config.json").write_text(json.dumps(config_without_quantization(config), indent=2) + "\n")
    return total_bytes


def _dense(names: list[str], manifest: Manifest, tensors: TensorFolder, dtype: torch.dtype) -> dict[str, Tensor]:
    """One shard's tensors: a weight for each quantized module, all else as it is."""
    written = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        if module not in manifest.quantized or suffix not in manifest.tensors_of(module):
            written[name] = tensors.get(name)
        elif suffix == "qweight":
            step, zero_point = (tensors.get(f"{module}.{part}") for part in ("weight_step", "weight_zero_point"))
            inputs = manifest.quantized[module][1]
            weight = dequantize_weight(tensors.get(name), step, zero_point, manifest.weight.bits, inputs)
            written[f"{module}.weight"] = weight.to(dtype)
    return written
