"""An LRQ checkpoint rewritten for readers that do not know the format: shard by shard, with its layers in another form."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lrq_offline.output_folder import carry_over, check_output, new_folder
from lrq_vllm.checkpoint.golden import GOLDEN_NAME
from lrq_vllm.checkpoint.report import REPORT_NAME
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.seal import SEAL_NAME, check_seal
from lrq_vllm.checkpoint.store import ShardWriter, TensorFolder, check_tensors, read_config, read_manifest

__all__ = ["LayerForm", "OpenCheckpoint", "open_checkpoint", "outside_of_weights", "rewrite"]

_OF_THE_CHECKPOINT = (SEAL_NAME, GOLDEN_NAME, REPORT_NAME)

LayerForm = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""A quantized module's name and its tensors, by suffix, to the tensors that take their place, by suffix."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose headers are right, and config.json's content."""

    folder: Path
    manifest: Manifest
    tensors: TensorFolder
    config: Mapping[str, Any]


def open_checkpoint(folder: Path, output: Path) -> OpenCheckpoint:
    """Open a checkpoint that is to be rewritten to ``output``; reads headers only.

    Raises SettingsError for an output that would destroy something, CheckpointError or ModelFolderError for a checkpoint that
    is not whole.
    """
    check_output(output, folder, overwrite=False)
    manifest, tensors = read_manifest(folder), TensorFolder(folder)
    check_tensors(tensors, manifest)
    return OpenCheckpoint(folder, manifest, tensors, read_config(folder))


def outside_of_weights(manifest: Manifest) -> list[str]:
    """What a checkpoint's layers compute beside the product with their weights, of which other forms know nothing."""
    problems = []
    if manifest.correction is not None:
        problems.append("its layers add a low-rank correction in 16 bits (--correction-rank)")
    if manifest.online_hadamard is not None:
        problems.append("inputs of its layers are rotated while serving (--rotate)")
    return problems


def rewrite(source: OpenCheckpoint, output: Path, config: Mapping[str, Any], form: LayerForm) -> int:
    """Write ``output`` with ``config`` as its config.json and each quantized module in ``form``, all else as it is; returns
    the tensors' bytes. One shard is in memory; the folder appears whole or not at all.

    Raises CheckpointError for a checkpoint that is not as its seal says.
    """
    tensors = source.tensors
    check_seal(tensors)
    files = sorted({tensors.file_of(name) for name in tensors})
    with new_folder(output, check=lambda: check_output(output, source.folder, overwrite=False)) as partial:
        writer = ShardWriter(partial, len(files))
        for number, file in enumerate(files, start=1):
            writer.write_shard(number, _shard(source, [name for name in tensors if tensors.file_of(name) == file], form))
        total_bytes = writer.finish()
        carry_over(source.folder, partial, without=_OF_THE_CHECKPOINT)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return total_bytes


def _shard(source: OpenCheckpoint, names: list[str], form: LayerForm) -> dict[str, Tensor]:
    """One shard's tensors; a module's all lie where its integers lay."""
    written = {}
    for name in names:
        module, _, suffix = name.rpartition(".")
        stored = source.manifest.tensors_of(module) if module in source.manifest.quantized else {}
        if suffix not in stored:
            written[name] = source.tensors.get(name)
        elif suffix == "qweight":
            layer = form(module, {part: source.tensors.get(f"{module}.{part}") for part in stored})
            written |= {f"{module}.{part}": tensor for part, tensor in layer.items()}
    return written
