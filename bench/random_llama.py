"""A Llama of any size with random weights, and its round-to-nearest forms: ours, and the stock ones of compressed-tensors."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from low_rank_pairs import add_pairs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq_offline.compute import choose_device
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint.schema import Manifest

__all__ = ["SIZES", "write_llama", "write_ours", "write_stock"]

SIZES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "narrow": {  # as many layers as 8b, and next to nothing for a GPU to do: what is left is the host's time
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 32, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
    },
}  # fmt: skip
TOKENIZER = Path(__file__).parents[1] / "tests" / "models" / "tiny"  # its tokens are a part of the vocabulary
CALIBRATION = {"samples": 4, "seq_len": 128}  # of the static activation steps, all that round-to-nearest calibrates


def write_llama(folder: Path, size: dict[str, int]) -> None:
    """bfloat16; linear weights are normal with variance 1 / inputs, so that activations keep their size."""
    device = choose_device("auto")
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, device=device, generator=generator)
        return (weight * columns**-0.5).bfloat16().cpu()

    hidden, wide, head = size["hidden_size"], size["intermediate_size"], size["head_dim"]
    queries, keys = size["num_attention_heads"] * head, size["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    ends = {f"{name}.weight": normal(size["vocab_size"], hidden) for name in ("model.embed_tokens", "lm_head")}
    files = {"ends.safetensors": ends | {"model.norm.weight": ones}}
    folder.mkdir(parents=True)
    index = _save(folder, files)
    for layer in range(size["num_hidden_layers"]):
        tensors = {f"model.layers.{layer}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = ones.clone()
        index |= _save(folder, {f"layer-{layer}.safetensors": tensors})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 1, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, **size,
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    _describe(folder, config, index)


def write_ours(source: Path, folder: Path, scheme: str, rank: str | None = None) -> None:
    """As ``lrq-offline quantize --method rtn`` writes it. rank: of a correction, whose pairs are random."""
    settings = QuantizeSettings(scheme, "rtn", **CALIBRATION)
    quantize_model(source, folder, settings)
    if rank is not None:
        add_pairs(source, folder, replace(settings, correction_rank=rank), _random_pair)


def _random_pair(manifest: Manifest, module: str, rank: int, _tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Small beside the layer's product, so that activations keep their size."""
    out_features, in_features = manifest.quantized[module]
    return torch.randn(out_features, rank) / (100 * rank**0.5), torch.randn(in_features, rank) / in_features**0.5


def write_stock(source: Path, folder: Path, scheme: str) -> None:
    """compressed-tensors, symmetric, a scale per channel: w8a8 with dynamic activations, or w4a16."""
    device = choose_device("auto")
    quantize = {"w8a8": _stock_w8, "w4a16": _stock_w4}[scheme]
    index: dict[str, str] = {}
    folder.mkdir(parents=True)
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in _tensors(path):
            tensors |= _converted(name, tensor.to(device), quantize)
        index |= _save(folder, {path.name: tensors})
    weights = {"num_bits": int(scheme[1]), "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights} | ({"input_activations": inputs} if scheme == "w8a8" else {})
    stock = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"],
        "format": "int-quantized" if scheme == "w8a8" else "pack-quantized", "config_groups": {"group_0": group},
    }  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    _describe(folder, config | {"quantization_config": stock}, index)


def _converted(name: str, tensor: Tensor, quantize: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    if "_proj." not in name:
        return {name: tensor.cpu()}
    parts = quantize(tensor.float())
    return {f"{name.removesuffix('weight')}{part}": value.cpu().contiguous() for part, value in parts.items()}


def _stock_w8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale.bfloat16()}


def _stock_w4(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 7.5
    q = (weight / scale).round().clamp(-8, 7).long() + 8
    words = (q.unflatten(1, (-1, 8)) << 4 * torch.arange(8, device=q.device)).sum(dim=2)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words, "weight_scale": scale.bfloat16(), "weight_shape": shape}


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def _save(folder: Path, files: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    return {name: file for file, tensors in files.items() for name in tensors}


def _describe(folder: Path, config: dict[str, Any], index: dict[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")
