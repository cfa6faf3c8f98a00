"""Families beside Llama: what is quantized, and that the paths through them compute the same. Served: test_served.py."""

import json
from pathlib import Path

import pytest
import torch

from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES as KNOWN
from lrq_offline.evaluate import evaluate_folder
from lrq_offline.kv_cache import quantize_kv_cache
from lrq_offline.pipeline import quantize_model
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import model_config
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import ModelFolderError
from tests.checkpoints import FAMILIES, HELDOUT, QUICK, write_random_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model type, a random float model."""
    folder = tmp_path_factory.mktemp("models")
    return {model_type: write_random_model(model_type, folder / model_type) for model_type in FAMILIES}


def test_every_declared_family_is_tested() -> None:
    assert set(KNOWN) == {"llama", *FAMILIES}


@pytest.mark.parametrize("method", ["smoothquant-rtn", "lrq"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_quantized_whole_and_keeps_its_function(
    model_type: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    quantize_model(models[model_type], output, QuantizeSettings("w8a8", method, **QUICK))
    assert len(read_manifest(output).quantized) == 2 * len(KNOWN[model_type].linears)
    kl = evaluate_folder(output, HELDOUT, reference=models[model_type], windows=2, seq_len=64).kl
    # What static ranges cost that were found on 64 tokens. A norm that is divided and a weight that is not cost whole nats.
    assert kl is not None and kl < 0.03


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.inference_mode()
def test_rounding_to_float32_changes_nothing(model_type: str, models: dict[str, Path]) -> None:
    tokens = torch.randint(0, 4096, (1, 64))
    logits = [load_model(models[model_type], served_in=dtype)(input_ids=tokens).logits for dtype in (None, torch.float32)]
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


def test_blocks_of_several_kinds_are_refused(models: dict[str, Path]) -> None:
    raw = json.loads((models["qwen2"] / "config.json").read_text())
    raw |= {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, "layer_types": None}
    with pytest.raises(ModelFolderError, match="several kinds"):
        model_config(raw, models["qwen2"])
