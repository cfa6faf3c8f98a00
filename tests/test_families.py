"""Families beside Llama: what is quantized, and that the paths through them compute the same. Served: test_served.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lrq_offline import blockwise_run
from lrq_offline.calibration import first_block_inputs
from lrq_offline.compute import block_output
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES as KNOWN
from lrq_offline.decoder_blocks import empty_model, load_block
from lrq_offline.evaluate import evaluate_folder
from lrq_offline.fused_norms import FusedNorm, fused_norms
from lrq_offline.kv_cache import quantize_kv_cache
from lrq_offline.pipeline import quantize_model
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import SourceModel, model_config
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import ModelFolderError
from tests.checkpoints import FAMILIES, HELDOUT, QUICK, model_type_of, write_random_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, a random float model."""
    folder = tmp_path_factory.mktemp("models")
    return {family: write_random_model(family, folder / family) for family in FAMILIES}


def test_every_declared_family_is_tested() -> None:
    assert set(KNOWN) == {"llama", *map(model_type_of, FAMILIES)}


@pytest.mark.parametrize("method", ["smoothquant-rtn", "lrq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_whole_and_keeps_its_function(
    family: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    quantize_model(models[family], output, QuantizeSettings("w8a8", method, **QUICK))
    source = SourceModel.open(models[family])
    in_blocks = [name for name in source.names() if ".layers." in name and len(source.spec_of(name).shape) == 2]
    routers = [name for name in in_blocks if name.endswith(".gate.weight")]
    assert {f"{module}.weight" for module in read_manifest(output).quantized} == {*in_blocks} - {*routers}
    kl = evaluate_folder(output, HELDOUT, reference=models[family], windows=2, seq_len=64).kl
    # What static ranges cost that were found on 64 tokens. A norm that is divided and a weight that is not cost whole nats.
    assert kl is not None and kl < 0.03


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_float_path_computes_what_transformers_does(family: str, models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (1, 64))
    plain = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32, attn_implementation="eager")
    assert torch.allclose(load_model(models[family])(input_ids=tokens).logits, plain(input_ids=tokens).logits, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_blocks_one_by_one_compute_what_the_whole_model_does(family: str, models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (3, 64))
    source, cpu = SourceModel.open(models[family]), torch.device("cpu")
    whole, seen = load_model(models[family]), []
    whole.get_submodule(source.family.final_norm).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    whole(input_ids=tokens)
    empty = empty_model(source.config)
    inputs = first_block_inputs(source, empty, tokens, torch.float32)
    hidden = inputs.hidden
    for name, arguments in zip(source.block_names, inputs.arguments, strict=True):
        block = load_block(empty, name, source.read, torch.float32, cpu)
        hidden = block_output(block, hidden, arguments, torch.float32)
    torch.testing.assert_close(hidden, seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_norms_compute_what_the_familys_own_do_and_keep_their_names(family: str, models: dict[str, Path]) -> None:
    source, cpu = SourceModel.open(models[family]), torch.device("cpu")
    empty = empty_model(source.config)
    inputs = first_block_inputs(source, empty, torch.randint(0, 4096, (2, 16)), torch.float32)
    own, fused = (load_block(empty, source.block_names[0], source.read, torch.float32, cpu) for _ in range(2))
    for block in (own, fused):
        for name in source.family.norms:
            block.get_submodule(name).weight.data.copy_(torch.linspace(0.5, 2, len(block.get_submodule(name).weight)))

    def fused_ones() -> int:
        return sum(isinstance(module, FusedNorm) for module in fused.modules())

    outputs = []
    with fused_norms(fused, source.family):
        assert fused.state_dict().keys() == own.state_dict().keys()
        assert fused_ones() == (2 if source.family.norms_read_residual else 0)
        for block in (own, fused):
            hidden = inputs.hidden.clone().requires_grad_()
            output = block_output(block, hidden, inputs.arguments[0], torch.float32)
            outputs.append((output.detach(), *torch.autograd.grad(output.square().mean(), hidden)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    assert fused_ones() == 0


def test_a_run_gives_each_block_the_mask_and_the_rotary_tables_of_its_kind(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = blockwise_run.run_block, []

    def watched(block: nn.Module, source: Any, target: Any, arguments: dict[str, Any], *rest: Any) -> None:
        seen.append(arguments)
        original(block, source, target, arguments, *rest)

    monkeypatch.setattr(blockwise_run, "run_block", watched)
    quantize_model(models["gemma3_text"], tmp_path / "out", QuantizeSettings("w4a16", "rtn", samples=2, seq_len=64))
    window, _, full, _ = seen  # each block as it was and quantized
    assert not window["attention_mask"][0, 0, 63, 63 - 40] and window["attention_mask"][0, 0, 63, 63 - 39]
    assert full["attention_mask"] is None or full["attention_mask"][0, 0, 63].all()
    assert not torch.equal(window["position_embeddings"][0], full["position_embeddings"][0])


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rounding_to_float32_changes_nothing(family: str, models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (1, 64))
    logits = [load_model(models[family], served_in=dtype)(input_ids=tokens).logits for dtype in (None, torch.float32)]
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_sliding_window_stays_with_quantized_keys_and_values(models: dict[str, Path]) -> None:
    window = FAMILIES["mistral"]["sliding_window"]
    tokens = torch.randint(0, 4096, (1, window + 1 + 2 * window))
    model = load_model(models["mistral"])
    quantize_kv_cache(model, 8)
    last = model(input_ids=tokens).logits[0, -1]
    tokens[0, 0] = (tokens[0, 0] + 1) % 4096  # out of the last token's sight, through two blocks
    assert torch.equal(model(input_ids=tokens).logits[0, -1], last)


@torch.inference_mode()
def test_capped_scores_stay_capped_with_quantized_keys_and_values(models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (1, 64))
    model = load_model(models["gemma2"])
    before = model(input_ids=tokens).logits
    quantize_kv_cache(model, 8)
    # Without the cap it is 3.
    assert (model(input_ids=tokens).logits - before).abs().max() < 0.2


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, "layer_types": None},
            "several kinds .*full_attention and sliding_attention.* does not serve for qwen2, only for gemma2, gemma3_text",
        ),
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention"]}, "does not know .*: chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its tokens see those after them"),
    ],
    ids=["mixed where vLLM does not mix", "an unknown kind", "both directions"],
)
def test_attention_that_is_not_served_is_refused(
    model_type: str, changes: dict[str, Any], said: str, models: dict[str, Path]
) -> None:
    raw = json.loads((models[model_type] / "config.json").read_text())
    with pytest.raises(ModelFolderError, match=said):
        model_config(raw | changes, models[model_type])
