"""Mixtures of experts: apart they compute what the fused ones do; few tokens, GPTQ, refusals. Served: test_served.py. Quantized
by several processes: test_expert_ranks.py."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import empty_model
from lrq_offline.expert_tokens import TOO_FEW
from lrq_offline.pipeline import quantize_model
from lrq_offline.reference_model import load_model
from lrq_offline.resource_plan import block_flops
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import SourceModel
from lrq_vllm.checkpoint.store import read_manifest
from tests.checkpoints import QUICK, write_random_model

MODELS = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model type, a random float model."""
    folder = tmp_path_factory.mktemp("models")
    return {model_type: write_random_model(model_type, folder / model_type) for model_type in MODELS}


def layers_of(report: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Of each block, what became of its layers."""
    return [block["layers"] for block in report["blocks"]]


@pytest.mark.parametrize("model_type", MODELS)
@torch.inference_mode()
def test_experts_apart_compute_what_transformers_computes_with_them_fused(model_type: str, models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (2, 48))
    fused = AutoModelForCausalLM.from_pretrained(models[model_type], dtype=torch.float32)
    logits = [model(input_ids=tokens).logits for model in (load_model(models[model_type]), fused)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", MODELS)
def test_modules_are_called_as_vllm_and_checkpoint_files_call_them(model_type: str, models: dict[str, Path]) -> None:
    source = SourceModel.open(models[model_type])
    names = set(empty_model(source.config).state_dict())
    assert names == set(source.tensors)
    expected = {"mixtral": "block_sparse_moe.experts.3.w2", "qwen3_moe": "mlp.experts.3.down_proj"}[model_type]
    assert f"model.layers.0.{expected}.weight" in names


def test_every_expert_is_quantized_and_the_router_is_not(models: dict[str, Path], tmp_path: Path) -> None:
    quantize_model(models["mixtral"], tmp_path / "out", QuantizeSettings("w4a16", "rtn", **QUICK))
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.quantized) == 2 * (4 + 4 * 3)
    assert set(manifest.skipped) == {"lm_head", *(f"model.layers.{block}.block_sparse_moe.gate" for block in range(2))}


def test_the_router_chooses_as_before_when_its_input_is_smoothed(models: dict[str, Path], tmp_path: Path) -> None:
    settings = QuantizeSettings("w8a8", "smoothquant-rtn", **QUICK | {"samples": 16})
    quantize_model(models["qwen3_moe"], tmp_path / "out", settings)
    before, after = (load_model(folder) for folder in (models["qwen3_moe"], tmp_path / "out"))
    x = torch.randn(64, 128)
    products = []
    for model in (before, after):
        block = model.get_submodule("model.layers.0")
        products.append((x * block.post_attention_layernorm.weight) @ block.mlp.gate.weight.T)
    assert not torch.equal(
        before.get_submodule("model.layers.0.mlp.gate").weight, after.get_submodule("model.layers.0.mlp.gate").weight
    )
    # The gain and the router's weight are rounded to bfloat16.
    assert (products[1] - products[0]).norm() <= 4e-3 * products[0].norm()


@pytest.mark.parametrize("method", ["gptq", "lrq"])
def test_experts_that_few_tokens_reach_are_rounded_to_nearest_and_said_so(
    method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    settings = QuantizeSettings("w3a16", method, **QUICK | {"samples": 5, "iters": 8})
    # 5 windows of 32 tokens, 3 of 8 experts each: 60 tokens an expert, of which 64 would be enough.
    layers = layers_of(quantize_model(models["qwen3_moe"], tmp_path / method, settings))
    nearest = QuantizeSettings("w3a16", "rtn", **QUICK | {"samples": 5})
    quantize_model(models["qwen3_moe"], tmp_path / "rtn", nearest)
    found, rounded = load_tensors(tmp_path / method), load_tensors(tmp_path / "rtn")
    few, enough = 0, 0
    for block, by_name in enumerate(layers):
        for name, layer in by_name.items():
            same = torch.equal(*(tensors[f"model.layers.{block}.{name}.qweight"] for tensors in (found, rounded)))
            if layer["fallback"] is None:
                enough += "experts" in name and not same
            else:
                assert layer["fallback"] == TOO_FEW and "experts" in name and same
                few += 1
    assert few > 0 and enough > 0


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_a_static_range_of_an_unreached_expert_is_that_of_the_others(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in models["mixtral"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    # A router that sends nobody to expert 3: its logit is that of expert 0, less half of it.
    for block in range(2):
        router = tensors[f"model.layers.{block}.block_sparse_moe.gate.weight"]
        router[3] = 0.0
        router[:3] = router[:3].abs() + 0.1
        tensors[f"model.layers.{block}.post_attention_layernorm.weight"].fill_(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = quantize_model(folder, tmp_path / "out", QuantizeSettings("w8a8", "rtn", **QUICK))
    written = load_tensors(tmp_path / "out")
    steps = [written[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.input_step"].item() for expert in range(4)]
    assert all(0 < step < 1 for step in steps)
    assert layers_of(report)[0]["block_sparse_moe.experts.3.w2"]["fallback"] == TOO_FEW


@pytest.mark.parametrize(("scheme", "method"), [("w4a16", "rtn"), ("w8a8", "rtn"), ("w4a16", "gptq"), ("w4a16", "lrq")])
def test_experts_that_no_token_reaches_at_all_are_rounded_and_said_so(
    models: dict[str, Path], tmp_path: Path, scheme: str, method: str
) -> None:
    folder = shutil.copytree(models["qwen3_moe"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for block in range(2):
        # Three of the first six have more than 0, whatever the token, and each token has three.
        router = tensors[f"model.layers.{block}.mlp.gate.weight"]
        router[:] = router[:1] * torch.tensor([1.0, 2, 3, -1, -2, -3, 0, 0]).unsqueeze(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layers = layers_of(quantize_model(folder, tmp_path / "out", QuantizeSettings(scheme, method, **QUICK)))
    for by_name in layers:
        assert all(by_name[f"mlp.experts.{expert}.down_proj"]["fallback"] == TOO_FEW for expert in (6, 7))
        assert all(math.isfinite(layer["error_after"]) for layer in by_name.values())


def test_gptq_of_experts_loses_less_than_rounding_to_nearest(models: dict[str, Path], tmp_path: Path) -> None:
    settings = QuantizeSettings("w3a16", "gptq", **QUICK | {"samples": 24})
    for by_name in layers_of(quantize_model(models["mixtral"], tmp_path / "out", settings)):
        experts = [layer for name, layer in by_name.items() if "experts" in name and layer["fallback"] is None]
        assert experts
        assert sum(layer["error_after"] for layer in experts) < sum(layer["error_before"] for layer in experts)


def test_a_plan_counts_a_token_at_the_experts_that_it_meets(models: dict[str, Path]) -> None:
    source, settings = SourceModel.open(models["mixtral"]), QuantizeSettings("w4a16", "rtn", samples=1, seq_len=2)
    # 128 x 128 for queries and the output, 64 x 128 for keys and values; 2 of 4 experts with three layers of 128 x 256.
    # Five passes over two tokens.
    per_token = 2 * 128 * 128 + 2 * 64 * 128 + 2 * 3 * 128 * 256
    assert block_flops(source, manifest_of(source.config, settings), settings, 0) == pytest.approx(5 * 2 * 2 * per_token)
