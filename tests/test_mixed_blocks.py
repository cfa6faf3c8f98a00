"""Models of which some blocks have experts and others one MLP. Their function: test_families.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lrq_offline.cli import main
from lrq_offline.compute import Machine
from lrq_offline.config import QuantizeSettings
from lrq_offline.decoder_blocks import block_families
from lrq_offline.expert_tokens import TOO_FEW
from lrq_offline.pipeline import quantize_model
from lrq_offline.random_model import shrunk_config
from lrq_offline.resource_plan import block_flops, plan_run
from lrq_offline.run_manifest import manifest_of
from lrq_offline.source_model import SourceModel, model_config
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import ModelFolderError
from tests.checkpoints import QUICK, write_random_model

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
DENSE = ATTENTION | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SPARSE = ATTENTION | {f"mlp.experts.{expert}.{name}_proj" for expert in range(8) for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float model whose second of three blocks has no experts."""
    return write_random_model("qwen3_moe", tmp_path_factory.mktemp("mixed") / "model", num_hidden_layers=3, mlp_only_layers=[1])


@pytest.fixture(scope="module")
def learned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkpoint learned with enough tokens for every expert, and its report. Not to be changed."""
    output = tmp_path_factory.mktemp("learned") / "out"
    # More slowly than usual: the few held-out tokens of a random model lose as often as they gain at full rate.
    settings = QuantizeSettings("w3a16", "lrq", iters=20, samples=32, seq_len=32, learning_rate=4e-3)
    return output, quantize_model(model, output, settings)


def config_of(**changes: Any) -> PreTrainedConfig:
    """Of 4 heads, 2 of keys and values."""
    shape = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64, "num_experts": 8, "moe_intermediate_size": 96,
    }  # fmt: skip
    return AutoConfig.for_model("qwen3_moe", **shape | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [True] * 6),
        ({"mlp_only_layers": [0, 4]}, [False, True, True, True, False, True]),
        ({"decoder_sparse_step": 3}, [False, False, True, False, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 2]}, [False, False, False, True, False, True]),
    ],
    ids=str,
)
def test_a_block_has_experts_where_transformers_gives_it_some(changes: dict[str, Any], expected: list[bool]) -> None:
    config = config_of(**changes)
    with torch.device("meta"):
        blocks = AutoModelForCausalLM.from_config(config).model.layers
    assert [hasattr(block.mlp, "experts") for block in blocks] == expected
    assert [family.experts is not None for family in block_families(config).values()] == expected


@pytest.mark.parametrize("method", ["rtn", "gptq", "smoothquant-rtn", "flexround"])
def test_every_method_quantizes_the_layers_that_a_block_has(method: str, model: Path, tmp_path: Path) -> None:
    report = quantize_model(model, tmp_path / "out", QuantizeSettings("w8a8", method, **QUICK))
    assert [set(block["layers"]) for block in report["blocks"]] == [SPARSE, DENSE, SPARSE]
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest.quantized) == 2 * len(SPARSE) + len(DENSE)
    assert manifest.skipped == ("lm_head", "model.layers.0.mlp.gate", "model.layers.2.mlp.gate")


def test_both_kinds_of_blocks_learn(learned: tuple[Path, dict[str, Any]]) -> None:
    blocks = learned[1]["blocks"]
    assert [set(block["layers"]) for block in blocks] == [SPARSE, DENSE, SPARSE]
    for block in blocks:
        assert block["error_after"] < block["error_before"]
        assert all(layer["fallback"] is None for layer in block["layers"].values())


def test_only_layers_of_experts_are_said_to_have_too_few_tokens(model: Path, tmp_path: Path) -> None:
    # 2 windows of 32 tokens: as many as an expert needs, of which each gets some.
    report = quantize_model(model, tmp_path / "out", QuantizeSettings("w4a16", "lrq", **QUICK))
    for block, experts in zip(report["blocks"], (SPARSE - ATTENTION, set(), SPARSE - ATTENTION), strict=True):
        assert {name for name, layer in block["layers"].items() if layer["fallback"] == TOO_FEW} == experts


def test_the_report_s_page_shows_both_kinds_of_blocks(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(learned[0]), "-o", str(page)]) == 0
    assert {name for name in SPARSE | DENSE if f"{name}<" not in page.read_text()} == set()


def test_a_plan_counts_each_block_as_what_it_is(model: Path) -> None:
    source, settings = SourceModel.open(model), QuantizeSettings("w4a16", "rtn", samples=1, seq_len=2)
    manifest = manifest_of(source.config, settings)
    # 128 x 128 for queries and the output, 64 x 128 for keys and values; an MLP's three layers of 128 x 256, or those of 3
    # experts of 128 x 96. Five passes over two tokens.
    attention = 2 * 128 * 128 + 2 * 64 * 128
    per_token = [attention + 3 * 3 * 128 * 96, attention + 3 * 128 * 256, attention + 3 * 3 * 128 * 96]
    assert [block_flops(source, manifest, settings, index) for index in range(3)] == pytest.approx(
        [5 * 2 * 2 * flops for flops in per_token]
    )
    plan = plan_run(model, settings, Machine("cpu"))
    assert plan.quantized_modules == 2 * len(SPARSE) + len(DENSE)


def test_a_plan_has_room_for_the_largest_block_of_either_kind(tmp_path: Path) -> None:
    def host_bytes(name: str, **changes: Any) -> int:
        folder = write_random_model("qwen3_moe", tmp_path / name, **changes)
        return plan_run(folder, QuantizeSettings("w4a16", "lrq"), Machine("cpu")).host_bytes

    alike = host_bytes("alike")
    assert host_bytes("small MLP first", mlp_only_layers=[0]) == alike
    assert host_bytes("large MLP last", mlp_only_layers=[1], intermediate_size=4096) > alike


@pytest.mark.parametrize(
    ("widths", "alike", "mixed"),
    [
        ({"moe_intermediate_size": 96, "intermediate_size": 98}, (1, 2, 4), (1, 2)),
        ({"moe_intermediate_size": 98, "intermediate_size": 96}, (1, 2), (1, 2)),
    ],
    ids=str,
)
def test_tensor_parallelism_has_to_divide_both_kinds_of_blocks(
    widths: dict[str, int], alike: tuple[int, ...], mixed: tuple[int, ...]
) -> None:
    settings = QuantizeSettings("w8a8", "rtn")
    assert manifest_of(config_of(**widths), settings).tensor_parallel_sizes == alike
    assert manifest_of(config_of(**widths, decoder_sparse_step=2), settings).tensor_parallel_sizes == mixed


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 0},  # as transformers writes num_experts
        {"mlp_only_layers": [0, 1, 2]},
        {"decoder_sparse_step": 4},
        {"decoder_sparse_step": 0},
    ],
    ids=str,
)
def test_a_model_without_any_experts_is_refused(changes: dict[str, Any], model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    with pytest.raises(ModelFolderError, match=r"experts in none of its blocks .*decoder_sparse_step.*does not serve"):
        model_config(raw | changes, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [True, True]), ({"mlp_only_layers": [5]}, [False, True]), ({"decoder_sparse_step": 3}, [False, True])],
    ids=str,
)
def test_a_model_to_try_has_a_block_of_each_kind(changes: dict[str, Any], expected: list[bool], tmp_path: Path) -> None:
    config = config_of(**changes)
    small = model_config({**config.to_dict(), **shrunk_config(config)}, tmp_path)
    assert [family.experts is not None for family in block_families(small).values()] == expected


@pytest.mark.server
@pytest.mark.skipif(torch.cuda.is_available(), reason="builds vLLM's model on the CPU, which needs its CPU build")
def test_verify_says_right_of_mixed_blocks(learned: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(learned[0])]) == 0
    printed = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM, each unchanged" in printed
    assert printed.splitlines()[-1].split() == ["verdict", "right"]


@pytest.mark.server
@pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on one GPU")
def test_experts_that_two_ranks_cannot_share_are_served_whole(
    learned: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(learned[0]), "--tensor-parallel-size", "2"]
    assert read_manifest(learned[0]).tensor_parallel_sizes == (1,)  # of 96 inner values of an expert, words take 32
    assert main(command) == 2
    assert "--tensor-parallel-size 2 cannot serve this checkpoint" in capsys.readouterr().err
    assert main([*command, "--enable-expert-parallel"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["verdict", "right"]
