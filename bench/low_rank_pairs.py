"""Give a finished checkpoint a low-rank correction that the tool would not compute: another kind of pair, or random numbers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import open_source
from lrq_offline.run_manifest import manifest_of
from lrq_vllm.checkpoint.correction import LOW_RANK_SUFFIXES
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.seal import write_seal
from lrq_vllm.checkpoint.store import read_config, read_manifest

__all__ = ["add_pairs"]

Pair = Callable[[Manifest, str, int, dict[str, Tensor]], tuple[Tensor, Tensor]]
"""From the manifest, a module, its rank and the tensors of its file: U [out, k] and V [in, k]."""


def add_pairs(model: Path, folder: Path, settings: QuantizeSettings, pair: Pair) -> None:
    """``folder`` was made of ``model`` by these settings but for the correction, whose ranks they say."""
    correction = manifest_of(open_source(model, settings).config, settings).correction
    assert correction is not None
    manifest = replace(read_manifest(folder), correction=correction)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for module in [name for name in manifest.quantized if f"{name}.qweight" in tensors]:
            factors = pair(manifest, module, correction.rank[module], tensors)
            for suffix, factor in zip(LOW_RANK_SUFFIXES, factors, strict=True):
                tensors[f"{module}.{suffix}"] = factor.to(correction.dtype).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    config = read_config(folder) | {"quantization_config": manifest.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_seal(folder, config)
