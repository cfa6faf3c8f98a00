"""The tiny model, its held-out text, and its quantized forms, each made once for the same sources."""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import lrq_offline
import lrq_vllm
from lrq_offline import random_model
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint.seal import write_seal
from lrq_vllm.checkpoint.store import read_config

TINY = Path(__file__).parent / "models" / "tiny"
HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
SCHEMES = ("w8a8", "w4a8", "w4a16", "w3a16")

# Enough for a checkpoint whose quality does not matter: seconds instead of a minute.
QUICK = {"iters": 2, "samples": 2, "seq_len": 32}

# Enough to beat round-to-nearest by far; at the defaults bench/quality.py measures. No test claims anything of w8a8's learning.
LEARNED = {"samples": 32}
ITERS = {"w8a8": 20}

_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}

# Families other than the tiny model's, each with what sets it apart; behind a dash, in which form.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 32, "sliding_window": 40},
    "phi3": {},  # fused queries, keys and values, and gate and up projection
    "qwen2": {},  # biases of queries, keys and values
    "qwen3": {"head_dim": 32},  # norms of queries and keys
    "olmo2": {},  # norms after attention and MLP, and one of all queries and one of all keys
    # Gains of 1 + w, a scaled embedding, one block with a window, capped scores and logits: caps that bend what they see.
    "gemma2": {
        "head_dim": 32,
        "sliding_window": 40,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
    },
    # And rotary tables of its own for each kind of block.
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_moe-mixed": {**_QWEN3_MOE, "decoder_sparse_step": 2},  # experts in the second block alone
}

Checkpoints = Callable[[str, str], Path]


def model_type_of(family: str) -> str:
    """config.json's, for one of FAMILIES."""
    return family.partition("-")[0]


def write_random_model(family: str, folder: Path, **changes: Any) -> Path:
    """A small bfloat16 model of one of FAMILIES, or llama, whose activations keep their size, with tiny's tokenizer.

    changes: of its config.
    """
    shape = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    config = AutoConfig.for_model(model_type_of(family), **shape | FAMILIES.get(family, {}) | changes)
    random_model.write_random_model(config, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def checkpoint_maker(kept: Path) -> Checkpoints:
    """(scheme, method) -> checkpoint, not to be changed. What the same sources have made before is found in ``kept``."""
    folder = kept / _fingerprint()
    folder.mkdir(exist_ok=True)
    for other in kept.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)

    @cache
    def make(scheme: str, method: str) -> Path:
        output = folder / f"{scheme}-{method}"
        if not output.exists():
            with TemporaryDirectory(dir=folder) as own:
                made = Path(own) / output.name
                quantize_model(TINY, made, QuantizeSettings(scheme, method, iters=ITERS.get(scheme, 50), **LEARNED))
                with suppress(OSError):  # another process was faster
                    made.rename(output)
        return output

    return make


def _fingerprint() -> str:
    """Of all that a checkpoint depends on."""
    found = hashlib.sha256(f"torch {torch.__version__}, transformers {transformers.__version__}".encode())
    packages = (Path(package.__file__).parent for package in (lrq_offline, lrq_vllm))
    files = [path for folder in (*packages, TINY) for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in (Path(__file__), *(path for path in files if path.suffix != ".pyc")):
        found.update(str(path).encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def with_16_bit_steps(folder: Path, factor: float = 1) -> None:
    """Change a checkpoint in place: its steps are multiplied and then rounded to bfloat16; sealed again."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(".weight_step"):
                tensors[name] = (tensor * factor).bfloat16().float()
        save_file(tensors, path, metadata={"format": "pt"})
    write_seal(folder, read_config(folder))
