"""An LRQ checkpoint as an ordinary 16-bit model, for runtimes that do not know the format."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lrq_offline.checkpoint_rewrite import open_checkpoint, outside_of_weights, rewrite
from lrq_offline.served_precision import served_dtype
from lrq_vllm.checkpoint.schema import config_without_quantization
from lrq_vllm.errors import SettingsError, one_paragraph
from lrq_vllm.kernels.reference import dequantize_weight

__all__ = ["export_dense"]


def export_dense(folder: Path, output: Path) -> int:
    """Write the model in ``folder`` with W_hat, rounded to the model's 16-bit dtype, in place of integers; returns bytes.

    It computes what a server computes that multiplies 16-bit activations with the checkpoint's weights, to the bit. ``output``
    appears whole or not at all. Raises SettingsError for quantized activations or keys and values, whose rounding no dense
    model has, and for corrections and rotations, and CheckpointError or ModelFolderError for a checkpoint that is not whole.
    """
    source = open_checkpoint(folder, output)
    manifest, dtype = source.manifest, served_dtype(source.config)
    if manifest.activation is not None:
        raise SettingsError(
            f"{folder} is {manifest.scheme}: its layers round their inputs to {manifest.activation.bits} bits, which a dense "
            "model would not do, so it would give other numbers. Export a scheme with 16-bit activations, or serve this one "
            "with the plugin."
        )
    if manifest.kv_bits is not None:
        raise SettingsError(
            f"{folder} asks for 8-bit keys and values (--kv-bits 8), which a dense model cannot say, so it would give other "
            "numbers. Quantize without --kv-bits to export, or serve this one with the plugin."
        )
    extras = outside_of_weights(manifest)
    if extras:
        raise SettingsError(
            f"{folder} cannot be a dense model that gives the same numbers: "
            + one_paragraph(extras, "Quantize without these to export, or serve this one with the plugin.")
        )

    def dense(module: str, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored = (layer["qweight"], layer["weight_step"], layer["weight_zero_point"])
        return {"weight": dequantize_weight(*stored, manifest.weight.bits, manifest.quantized[module][1]).to(dtype)}

    return rewrite(source, output, config_without_quantization(source.config), dense)
