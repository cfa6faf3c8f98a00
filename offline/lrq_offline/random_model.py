"""Small models with random weights, of the classes that real ones have."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lrq_offline.decoder_blocks import FAMILIES, with_names_of_files

__all__ = ["shrunk_config", "write_byte_tokenizer", "write_random_model"]

_LAYERS, _KEY_VALUE_HEADS, _WIDTH, _EXPERTS, _VOCABULARY = 2, 2, 512, 8, 512


def shrunk_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What differs in the config.json of a model with two layers, two heads of keys and values, and narrow layers.

    A head keeps its size, and as many heads of queries share one of keys and values.
    """
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    few = min(of_keys, _KEY_VALUE_HEADS)
    changes: dict[str, Any] = {
        "num_hidden_layers": _LAYERS, "num_attention_heads": heads // of_keys * few, "num_key_value_heads": few,
        "hidden_size": heads // of_keys * few * head, "intermediate_size": _WIDTH, "vocab_size": _VOCABULARY,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "dtype": "bfloat16",
    }  # fmt: skip
    experts = FAMILIES[config.model_type].experts
    if experts is not None:
        changes |= {experts.count: min(getattr(config, experts.count), _EXPERTS), experts.width: _WIDTH}
        if experts.dense is not None:
            mixed = any(experts.dense.among(config, index) for index in range(config.num_hidden_layers))
            changes |= experts.dense.settings([0] if mixed else [])
    kinds = getattr(config, "layer_types", None) or []
    each_first = [*dict.fromkeys(kinds), *kinds]
    return changes | ({"layer_types": each_first[:_LAYERS]} if kinds else {})


def write_random_model(config: PreTrainedConfig, folder: Path, seed: int = 0) -> None:
    """bfloat16; weights are normal with variance 1 / inputs, so that activations keep their size. Norms' gains are about 1."""
    torch.manual_seed(seed)
    model = with_names_of_files(AutoModelForCausalLM.from_config(config))
    lowest = 0.5 - FAMILIES[config.model_type].gain_offset
    embedded = 1 / getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0)
    if config.tie_word_embeddings:  # the output head too
        embedded = config.hidden_size**-0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1:
                parameter.uniform_(lowest, lowest + 1)
            else:
                parameter.normal_(std=embedded if "embed" in name else parameter.shape[1] ** -0.5)
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(
        {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, for a model that has none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: 2 + place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
