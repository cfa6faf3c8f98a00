"""A small checkpoint, as docs/checkpoint-format.md shows it, byte for byte."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest, WeightFormat
from lrq_vllm.checkpoint.store import ShardWriter

INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.mlp.down_proj"
# The worked examples of the specification: bits, one row of integers, the bytes on disk.
GOLDEN_ROWS = [
    (8, [0, 1, 127, 128, 255], "80 81 ff 00 7f"),
    (4, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "21 43 65 87 a9 00 00 00"),
    (2, [0, 1, 2, 3, 3, 2, 1, 0, 1], "e4 1b 01 00"),
    (
        3,
        [0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 6],
        "e4 e4 1b 1b 55 55 00 80 f0 0f 00 ff",
    ),
]

# The whole of a small checkpoint, as in the specification.
GOLDEN_MANIFEST = """\
{
  "quant_method": "lrq",
  "format_version": 1,
  "tool_version": "0.1.0",
  "scheme": "w8a8",
  "weight": {
    "bits": 8,
    "granularity": "channel",
    "group_size": null,
    "symmetric": false,
    "packed_along": "input"
  },
  "activation": {
    "bits": 8,
    "granularity": "tensor",
    "mode": "static",
    "symmetric": false
  },
  "kv_cache": null,
  "tensor_parallel_sizes": [
    1
  ],
  "correction": null,
  "online_hadamard": null,
  "quantized": {
    "model.layers.0.mlp.down_proj": [
      2,
      3
    ]
  },
  "skipped": [
    "lm_head"
  ]
}
"""
GOLDEN_HEADER = """\
{
  "__metadata__": {"format": "pt"},
  "model.layers.0.mlp.down_proj.input_step": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
  "model.layers.0.mlp.down_proj.weight_step": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]},
  "model.layers.0.input_layernorm.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [12, 18]},
  "model.layers.0.mlp.down_proj.qweight": {"dtype": "I8", "shape": [2, 3], "data_offsets": [18, 24]},
  "model.layers.0.mlp.down_proj.input_zero_point": {"dtype": "U8", "shape": [1], "data_offsets": [24, 25]},
  "model.layers.0.mlp.down_proj.weight_zero_point": {"dtype": "U8", "shape": [2, 1], "data_offsets": [25, 27]}
}
"""
GOLDEN_DATA = "0000803d 0000003f 0000803e 803f 0040 c0bf 80007f 81ff00 80 6480"
GOLDEN_INDEX = """\
{
  "metadata": {
    "total_size": 27
  },
  "weight_map": {
    "model.layers.0.input_layernorm.weight": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.input_step": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.input_zero_point": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.qweight": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.weight_step": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.weight_zero_point": "model-00001-of-00001.safetensors"
  }
}
"""


def manifest_of(scheme: str, shape: tuple[int, int] = (2, 64), **weight: Any) -> Manifest:
    return Manifest(scheme, WeightFormat(SCHEMES[scheme].weight_bits, **weight), {MODULE: shape}, ("lm_head",), "0.1.0")


def golden_tensors() -> dict[str, Tensor]:
    return {
        "model.layers.0.input_layernorm.weight": torch.tensor([1.0, 2.0, -1.5], dtype=torch.bfloat16),
        f"{MODULE}.qweight": pack(torch.tensor([[0, 128, 255], [1, 127, 128]]), 8),
        f"{MODULE}.weight_step": torch.tensor([[0.5], [0.25]]),
        f"{MODULE}.weight_zero_point": torch.tensor([[100], [128]], dtype=torch.uint8),
        f"{MODULE}.input_step": torch.tensor([0.0625]),
        f"{MODULE}.input_zero_point": torch.tensor([128], dtype=torch.uint8),
    }


def write_model(folder: Path, tensors: dict[str, Tensor]) -> Path:
    writer = ShardWriter(folder, 1)
    writer.write_shard(1, tensors)
    writer.finish()
    return folder
