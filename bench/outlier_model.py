#!/usr/bin/env python3
"""Write a model that computes the same as another and is hard to quantize: some norm gains are 16 to 64 times larger.

    python bench/outlier_model.py tests/models/tiny /tmp/tiny-outliers
    python bench/quality.py /tmp/tiny-outliers --cells rtn:w8a8 lrq:w8a8 --text heldout=tests/data/heldout.jsonl --out hard.json

The columns that read an enlarged channel are divided by the same power of two, so that no weight is rounded anew.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lrq_offline.source_model import SourceModel
from lrq_vllm.checkpoint.store import is_weight_file

CHANNELS = 8
# Norm -> the layers that read it, in a decoder block of a Llama.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    source = SourceModel.open(arguments.model)
    tensors = {name: source.read(name) for name in source.tensors}
    generator = torch.Generator().manual_seed(0)
    for block in source.block_names:
        for norm, readers in READERS.items():
            gain = tensors[f"{block}.{norm}.weight"]
            factors = torch.ones(len(gain))
            chosen = torch.randperm(len(gain), generator=generator)[:CHANNELS]
            factors[chosen] = 2.0 ** torch.randint(4, 7, (CHANNELS,), generator=generator)
            tensors[f"{block}.{norm}.weight"] = (gain.float() * factors).to(gain.dtype)
            for reader in readers:
                weight = tensors[f"{block}.{reader}.weight"]
                tensors[f"{block}.{reader}.weight"] = (weight.float() / factors).to(weight.dtype)
    arguments.output.mkdir(parents=True)
    save_file(tensors, arguments.output / "model.safetensors", metadata={"format": "pt"})
    for path in arguments.model.iterdir():
        if not is_weight_file(path):
            shutil.copy(path, arguments.output)


if __name__ == "__main__":
    main()
