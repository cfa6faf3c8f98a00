"""``lrq-offline try`` on configs of models that nobody has downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from lrq_offline.cli import main
from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.random_model import shrunk_config, write_byte_tokenizer
from lrq_offline.source_model import model_config

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.server
@pytest.mark.skipif(torch.cuda.is_available(), reason="serves with vLLM's CPU build")
def test_a_config_of_70_billion_parameters_is_tried_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", str(written(tmp_path, LLAMA_3_70B)), "--scheme", "w4a8", "--method", "rtn"]) == 0
    printed = capsys.readouterr().out
    assert "560 linear layers" in printed
    assert "serves on    1, 2, 4, 8, 16, 32, 64 GPUs" in printed
    assert "LlamaForCausalLM" in printed and "nats from the reference path" in printed


def test_an_unknown_family_is_refused_with_what_it_would_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", str(written(tmp_path, {"model_type": "bert"}))]) == 2
    said = capsys.readouterr().err
    assert "is a bert" in said and "where its blocks, norms and linears are" in said


def test_the_file_that_is_given_is_the_one_that_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {"model_type": "gpt2"})
    given = tmp_path / "bert.json"
    given.write_text(json.dumps({"model_type": "bert"}))
    assert main(["try", str(given)]) == 2
    assert "bert.json is a bert" in capsys.readouterr().err
    given.write_text(json.dumps({**LLAMA_3_70B, "quantization_config": {"quant_method": "fp8"}}))
    assert main(["try", str(given)]) == 2
    assert "bert.json is already quantized" in capsys.readouterr().err


def test_groups_that_the_full_size_does_not_divide_into_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {**LLAMA_3_70B, "intermediate_size": 28704})
    assert main(["try", str(path), "--group-size", "128"]) == 2
    assert "group_size 128 does not divide the 28704 inputs" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_shrunk_config_keeps_what_makes_the_family(model_type: str, tmp_path: Path) -> None:
    raw = AutoConfig.for_model(model_type).to_dict()
    config = model_config(raw, tmp_path)
    small = model_config({**raw, **shrunk_config(config)}, tmp_path)
    assert small.num_hidden_layers == 2 and small.hidden_size < config.hidden_size
    heads = small.num_attention_heads / small.num_key_value_heads
    assert heads == config.num_attention_heads / config.num_key_value_heads
    for kept in ("rms_norm_eps", "hidden_act", "hidden_activation", "final_logit_softcapping", "sliding_window"):
        assert getattr(small, kept, None) == getattr(config, kept, None)
    kinds = getattr(config, "layer_types", None) or []
    assert set(getattr(small, "layer_types", None) or []) == set(kinds)


def test_the_byte_tokenizer_gives_back_what_it_read(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve, 漢字 & tabs\t"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode()) and max(tokens) < 512
    assert tokenizer.decode(tokens) == text
