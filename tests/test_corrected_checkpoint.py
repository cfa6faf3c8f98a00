"""Checkpoints with 4-bit activations, rotations and low-rank corrections, from the command line to the reference path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrq_offline.cli import main
from lrq_offline.compute import Machine
from lrq_offline.config import QuantizeSettings
from lrq_offline.evaluate import Quality, evaluate_folder
from lrq_offline.pipeline import quantize_model
from lrq_offline.reference_linear import ReferenceLinear
from lrq_offline.resource_plan import plan_run
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import SourceModel
from lrq_offline.verification import check_files
from lrq_vllm.checkpoint.affine import clipped_token_step_and_zero_point
from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard, paley_matrix
from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest, WeightFormat
from lrq_vllm.checkpoint.store import TensorFolder, read_manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kernels.reference import dequantize_weight
from tests.checkpoints import HELDOUT, QUICK, TINY, write_random_model

SOME: dict[str, Any] = {"samples": 16, "seq_len": 256}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model in w4a4, rotated, without and with a correction."""
    folder = tmp_path_factory.mktemp("w4a4")
    for name, options in (("plain", {}), ("corrected", {"correction_rank": "10%"})):
        quantize_model(TINY, folder / name, QuantizeSettings("w4a4", "gptq", **SOME, **options))
    return {name: folder / name for name in ("plain", "corrected")}


def quality(folder: Path) -> Quality:
    return evaluate_folder(folder, HELDOUT, reference=TINY, windows=8, seq_len=256)


# --- what a layer computes ---


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8", "w4a8", "w4a16", "w3a16"])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_reference_layer_is_the_formula(scheme: str, rotated: bool) -> None:
    out, inputs, rank, bits = 6, 24, 3, SCHEMES[scheme].weight_bits
    manifest = Manifest(
        scheme, WeightFormat(bits), {"m": (out, inputs)}, (), "test", correction=Correction(torch.bfloat16, {"m": rank}),
        online_hadamard=OnlineHadamard(("m",), 24, 12) if rotated else None,
    )  # fmt: skip
    q = torch.randint(0, 2**bits, (out, inputs))
    stored = {
        "qweight": pack(q, bits),
        "weight_step": torch.rand(out, 1) + 0.1,
        "weight_zero_point": torch.randint(0, 2**bits, (out, 1), dtype=torch.uint8),
        "low_rank_u": torch.randn(out, rank).bfloat16(),
        "low_rank_v": torch.randn(inputs, rank).bfloat16(),
    }
    if scheme == "w8a8":
        stored |= {"input_step": torch.tensor([0.05]), "input_zero_point": torch.tensor([131], dtype=torch.uint8)}
    if scheme == "w4a4":
        stored["input_clip"] = torch.tensor([0.8])
    layer, x, bias = ReferenceLinear(manifest, "m", torch.zeros(out)), torch.randn(5, inputs), torch.randn(out)
    layer.load_state_dict(stored | {"bias": bias}, assign=True)
    seen = x.double()
    if rotated:
        whole = torch.kron(paley_matrix(12), torch.tensor([[1.0, 1.0], [1.0, -1.0]])).double() / 24**0.5
        seen = seen @ whole.T
    used = seen
    if scheme == "w8a8":
        used = ((seen / 0.05).round() + 131).clamp(0, 255).sub(131) * 0.05
    elif scheme == "w4a8":
        low, high = seen.amin(1, keepdim=True).clamp(max=0), seen.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        used = (((seen / step).round() + zero).clamp(0, 255) - zero) * step
    elif scheme == "w4a4":
        step = 0.8 * seen.abs().amax(1, keepdim=True) / 7.5
        used = (seen / step).round().clamp(-8, 7) * step
    w_hat = (q - stored["weight_zero_point"].int()) * stored["weight_step"]
    expected = used @ w_hat.double().T + (seen @ stored["low_rank_v"].double()) @ stored["low_rank_u"].double().T + bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_is_zeros_and_clipping_is_relative() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
    step, zero_point = clipped_token_step_and_zero_point(x, torch.tensor([0.5]), 4)
    assert step.tolist() == [[1.0], [pytest.approx(0.2)]] and zero_point.tolist() == [[8.0], [8.0]]


def test_in_16_bits_the_branch_is_rounded_once_inside_and_the_sum_once() -> None:
    manifest = Manifest(
        "w4a16", WeightFormat(4), {"m": (2, 8)}, (), "test", correction=Correction(torch.bfloat16, {"m": 1})
    )  # fmt: skip
    layer = ReferenceLinear(manifest, "m", None)
    u, v = torch.randn(2, 1).bfloat16(), torch.randn(8, 1).bfloat16()
    qweight = pack(torch.randint(0, 16, (2, 8)), 4)
    stored = {"weight_step": torch.full((2, 1), 0.01), "weight_zero_point": torch.zeros(2, 1, dtype=torch.uint8)}
    layer.load_state_dict({"qweight": qweight, **stored, "low_rank_u": u, "low_rank_v": v}, assign=True)
    x = torch.randn(3, 8).bfloat16()
    inner = (x.float() @ v.float()).bfloat16().float()
    weight = dequantize_weight(qweight, stored["weight_step"], stored["weight_zero_point"], 4, 8).bfloat16().float()
    assert torch.equal(layer(x), (nn.functional.linear(x.float(), weight) + inner @ u.float().T).bfloat16())


# --- whole checkpoints ---


def test_a_correction_brings_4_bit_activations_nearer_to_the_float_model(made: dict[str, Path]) -> None:
    plain, corrected = quality(made["plain"]), quality(made["corrected"])
    assert plain.kl is not None and corrected.kl is not None
    assert corrected.kl < 0.8 * plain.kl
    assert corrected.perplexity < plain.perplexity


def test_a_corrected_checkpoint_holds_what_its_manifest_says(made: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    manifest, tensors = read_manifest(made["corrected"]), TensorFolder(made["corrected"])
    assert manifest.correction is not None
    assert manifest.correction.rank["model.layers.0.self_attn.k_proj"] == 13  # 10% of 128
    assert manifest.correction.rank["model.layers.0.mlp.down_proj"] == 26  # 10% of 256
    assert check_files(made["corrected"]) == len(tensors)
    clips = [tensors.get(name) for name in tensors if name.endswith("input_clip")]
    assert len(clips) == 28 and all(0 < clip.item() <= 1 for clip in clips)
    for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({tensors.get(f"model.layers.2.{name}.input_clip").item() for name in group}) == 1
    assert main(["inspect", str(made["corrected"])]) == 0
    shown = capsys.readouterr().out
    assert "4-bit, dynamic per token, clipped" in shown and "ranks 13 to 26 for 28 layers" in shown
    assert "4 inputs while serving, 768 values together" in shown


@pytest.mark.parametrize("form", ["dense", "compressed-tensors"])
def test_an_export_that_would_drop_the_correction_is_refused(
    form: str, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize_model(TINY, tmp_path / "w4a16", QuantizeSettings("w4a16", "rtn", correction_rank=4, rotate=True, **QUICK))
    assert main(["export", str(tmp_path / "w4a16"), "--to", form, "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "low-rank correction" in said and "rotated while serving" in said
    assert main(["export", str(made["plain"]), "--to", form, "-o", str(tmp_path / "out")]) == 2
    assert "4 bits" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_plan_knows_the_factors_and_the_head_of_its_own(made: dict[str, Path]) -> None:
    plan = plan_run(TINY, QuantizeSettings("w4a4", "gptq", correction_rank="10%", **SOME), Machine("cpu"))
    written = TensorFolder(made["corrected"])
    assert plan.output_bytes == sum(written.spec(name).nbytes for name in written)


# --- refusals, before any work ---


def test_a_rank_above_a_layers_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"--correction-rank 129 .*layers\.0\.self_attn\.k_proj has ranks up to 128"):
        manifest_of(SourceModel.open(TINY).config, QuantizeSettings("w4a8", "gptq", correction_rank=129))


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings("w4a8", "gptq", correction_rank=2),
        QuantizeSettings("w4a4", "gptq"),
        QuantizeSettings("w4a4", "gptq", rotate=False),
    ],
)
def test_experts_go_without(settings: QuantizeSettings, tmp_path: Path) -> None:
    source = SourceModel.open(write_random_model("mixtral", tmp_path / "model"))
    with pytest.raises(SettingsError, match="has experts, which go without"):
        manifest_of(source.config, settings)
