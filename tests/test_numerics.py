"""Weights and activations out of the ordinary: the run ends, the result is finite, and the report says what was done."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrq_offline.config import QuantizeSettings
from lrq_offline.evaluate import evaluate_folder
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint import TensorFolder
from tests.checkpoints import HELDOUT, QUICK, TINY

BLOCK = "model.layers.1"


def model_with(folder: Path, changes: dict[str, Tensor]) -> Path:
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weight(name: str) -> Tensor:
    return load_file(TINY / "model.safetensors")[f"{BLOCK}.{name}.weight"].clone()


def outlier() -> dict[str, Tensor]:
    up = weight("mlp.up_proj")
    up[5, 7] = 1e5
    return {f"{BLOCK}.mlp.up_proj.weight": up}


def dead_channels() -> dict[str, Tensor]:
    gate, down = weight("mlp.gate_proj"), weight("mlp.down_proj")
    gate[3] = 0  # an output that is always zero, and with it an input of down_proj
    down[:, 9] = 0  # an input that nobody reads
    down[11] = 0
    return {f"{BLOCK}.mlp.gate_proj.weight": gate, f"{BLOCK}.mlp.down_proj.weight": down}


def constant_rows() -> dict[str, Tensor]:
    query = weight("self_attn.q_proj")
    query[2] = 0.125
    return {f"{BLOCK}.self_attn.q_proj.weight": query}


@pytest.mark.parametrize("change", [outlier, dead_channels, constant_rows], ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    ("scheme", "method"), [("w8a8", "lrq"), ("w4a8", "flexround"), ("w3a16", "gptq"), ("w4a16", "lrq")], ids="-".join
)
def test_odd_weights_give_a_finite_checkpoint(tmp_path: Path, scheme: str, method: str, change) -> None:
    model = model_with(tmp_path / "model", change())
    quantize_model(model, tmp_path / "out", QuantizeSettings(scheme, method, **QUICK))
    tensors = TensorFolder(tmp_path / "out")
    assert all(torch.isfinite(tensors.get(name)).all() for name in tensors if tensors.spec(name).dtype.is_floating_point)
    quality = evaluate_folder(tmp_path / "out", HELDOUT, reference=model, windows=1, seq_len=64)
    assert quality.kl is not None and 0 <= quality.kl < 20


@pytest.mark.parametrize(("scheme", "method"), [("w8a8", "lrq"), ("w4a16", "gptq"), ("w4a8", "lrq")], ids="-".join)
def test_a_block_whose_activations_overflow_is_rounded_to_nearest_and_the_report_says_so(
    tmp_path: Path, scheme: str, method: str
) -> None:
    huge = {f"{BLOCK}.mlp.{name}.weight": weight(f"mlp.{name}") * 2.0**100 for name in ("gate_proj", "up_proj")}
    model = model_with(tmp_path / "model", huge)
    quantize_model(model, tmp_path / "out", QuantizeSettings(scheme, method, **QUICK))
    report = (tmp_path / "out" / "lrq_report.json").read_text()
    assert "NaN" not in report.replace("NaN or infinite", "") and "Infinity" not in report
    blocks = json.loads(report)["blocks"]
    assert all(layer["fallback"] is None for layer in blocks[0]["layers"].values())
    assert all("NaN or infinite" in layer["fallback"] for layer in blocks[1]["layers"].values())
    tensors = TensorFolder(tmp_path / "out")
    for name in tensors:
        if name.endswith(("weight_step", "input_step")):
            assert torch.isfinite(tensors.get(name)).all() and (tensors.get(name) > 0).all()
