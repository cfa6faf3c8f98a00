"""lrq-offline plan: what it says of a model that is only headers, and against what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from lrq_offline.attention import plain_attention
from lrq_offline.cli import main
from lrq_offline.compute import Machine, product_dtype
from lrq_offline.config import PRESETS, QuantizeSettings
from lrq_offline.decoder_blocks import FAMILIES, empty_model
from lrq_offline.pipeline import open_source
from lrq_offline.resource_plan import block_flops, plan_run, step_memory
from lrq_offline.run_manifest import manifest_of
from tests.checkpoints import TINY

MEASURED = Path(__file__).parent.parent / "bench" / "results" / "learning-speed-h200.json"


def llama_8b(folder: Path) -> Path:
    """A folder with the headers of Llama-3-8B, in one sparse file that takes no room."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir()
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, parameter in empty_model(config).state_dict().items():
        size = parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return llama_8b(tmp_path / "Llama-3-8B")


def test_a_plan_reads_headers_only(big: Path) -> None:
    plan = plan_run(big, QuantizeSettings("w4a16"), Machine("cpu"))
    assert (plan.blocks, plan.quantized_modules, plan.skipped_modules) == (32, 224, ("lm_head",))
    # 218 M weights a block at 4 bits and a step per row, and two 128256 x 4096 matrices in 16 bits.
    assert plan.output_bytes == pytest.approx(32 * 218.1e6 / 2 + 2 * 128256 * 4096 * 2, rel=0.02)
    assert plan.gpu_bytes is None
    assert plan.minutes > 0


def test_more_text_needs_more_memory_and_time(big: Path) -> None:
    few, many = (plan_run(big, QuantizeSettings("w4a16", samples=n, loss="mse"), Machine("cpu")) for n in (16, 256))
    assert many.host_bytes - few.host_bytes == pytest.approx(3 * 240 * 512 * 4096 * 2, rel=0.01)


def test_a_loss_that_weighs_errors_is_planned_for(big: Path) -> None:
    plain, weighing = (plan_run(big, QuantizeSettings("w4a16", loss=loss), Machine("cpu")) for loss in ("mse", "fisher"))
    window = 512 * 4096 * 2
    # Of 32 windows what each block receives, what the last one puts out, and gradients in float32; moments of all blocks.
    passed = 32 * (32 + 1 + 2) * window + 32 * 4096**2 * 4
    of_a_block = 4096**2 * product_dtype(torch.device("cpu")).itemsize
    assert weighing.host_bytes - plain.host_bytes == passed - 2 * 64 * window + of_a_block
    assert weighing.output_bytes == plain.output_bytes


@pytest.mark.parametrize("row", json.loads(MEASURED.read_text())["rows"], ids=lambda row: f"{row['scheme']} {row['preset']}")
def test_the_planned_peak_is_near_the_measured_one(row: dict[str, Any]) -> None:
    preset = PRESETS[str(row["preset"])]
    settings = QuantizeSettings(str(row["scheme"]), renew=bool(row["renews"]), **vars(preset))
    attention, mlp = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)], [(14336, 4096)] * 2 + [(4096, 14336)]
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336)
    assert len(row["hidden_states_in"]) == settings.caches
    hidden_states = row["hidden_states_in"].count("GPU memory") * preset.samples * preset.seq_len * 4096 * 2
    planned = step_memory(attention + mlp, settings, config, FAMILIES["llama"], torch.bfloat16) + hidden_states
    assert planned == pytest.approx(float(row["peak_gb"]) * 1e9, rel=0.25)


def test_the_plan_has_room_for_capped_scores_and_their_gradients() -> None:
    settings = QuantizeSettings("w4a16", batch_size=2, seq_len=64)
    configs = [Gemma2Config(attn_logit_softcapping=cap, num_attention_heads=8) for cap in (None, 50.0)]
    planned = [step_memory([(128, 128)], settings, config, FAMILIES["gemma2"], torch.float32) for config in configs]
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.shape[-2:] == (64, 64):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    q, k, v = (torch.randn(2, 8, 64, 32, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        plain_attention(q, k, v, None, 0.2, 50.0)
    assert planned[1] - planned[0] == 2 * sum(kept.values())


def test_methods_that_learn_nothing_need_less_memory_and_time() -> None:
    learned = plan_run(TINY, QuantizeSettings("w4a16"), Machine("cpu"))
    rounded = plan_run(TINY, QuantizeSettings("w4a16", method="rtn"), Machine("cpu"))
    assert rounded.host_bytes < learned.host_bytes
    assert replace(rounded, minutes=0, host_bytes=0) == replace(learned, minutes=0, host_bytes=0)


def test_a_correction_that_is_learned_is_planned_for() -> None:
    def needed(method: str, rank: int | None) -> tuple[int, float]:
        settings = QuantizeSettings("w4a16", method, correction_rank=rank, iters=500)
        plan = plan_run(TINY, settings, Machine("cpu"))
        source = open_source(TINY, settings)
        return plan.host_bytes, block_flops(source, manifest_of(source.config, settings), settings, 0)

    plain, corrected, larger = (needed("lrq", rank) for rank in (None, 8, 16))
    extra = [needed("gptq", rank) for rank in (8, 16)]
    assert plain < corrected < larger
    # Of a block: U and V and what learning keeps of them, in float32 five times and once for the products.
    sides = 2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 768)
    assert larger[0] - corrected[0] - (extra[1][0] - extra[0][0]) == 8 * sides * (
        5 * 4 + product_dtype(torch.device("cpu")).itemsize
    )
    # Forwards and backwards, over the tokens of every step.
    steps = 500 * 6 * 2 * 512 * 8 * sides
    assert larger[1] - corrected[1] - (extra[1][1] - extra[0][1]) == pytest.approx(steps)


def test_the_command_prints_a_line_for_each_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--scheme", "w3a16", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for words in ("28 linear layers in 4 blocks", "lm_head", "peak host memory", "disk", "minutes"):
        assert words in printed
    assert "warning" not in printed


def test_a_plan_warns_as_quantize_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--scheme", "w4a8", "--group-size", "32", "--device", "cpu"]) == 0
    assert "warning: In groups of 32 inputs w4a8 " in " ".join(capsys.readouterr().out.split())


def test_a_plan_refuses_what_quantize_would_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "absent"), "--scheme", "w4a16"]) == 2
    assert main(["plan", str(TINY), "--scheme", "w4a16", "--group-size", "96"]) == 2
    assert "96 does not divide" in capsys.readouterr().err
    assert main(["plan", str(TINY), "--scheme", "w4a16", "--seq-len", "4096"]) == 2
    assert "--seq-len is 4096" in capsys.readouterr().err
