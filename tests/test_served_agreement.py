"""Schemes and families in vLLM's engine against the reference path, by bench/served_agreement.py: several in one process."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrq_offline.agreement import reference_noise
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_offline.source_model import load_tokenizer
from tests.checkpoints import FAMILIES, HELDOUT, QUICK, SCHEMES, TINY, Checkpoints, write_random_model
from tests.vllm_layers import EQUAL, GREEDY_AGREEMENT, MEAN_DIFFERENCE, SAME_SUMS

pytestmark = [
    pytest.mark.server,
    # A GPU rounds elsewhere, and quantized activations magnify that: bench/served_agreement.py measures it there.
    pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU"),
]

PROMPTS, PROMPT_TOKENS = 8, 96  # as the bench takes them
AGREEMENT = Path(__file__).parents[1] / "bench" / "served_agreement.py"
GROUPED, ROTATED, CORRECTED = "w4a8-groups", "w4a4-rotated", "w4a16-rotated-corrected"
MAGNIFIED = "w4a4-rotated-corrected"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family, a checkpoint of a random model."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        source = write_random_model(family, folder / f"{family}-float")
        quantize_model(source, folder / family, QuantizeSettings("w8a8", "smoothquant-rtn", **QUICK))
    return {family: folder / family for family in FAMILIES}


def agreement(checkpoints: list[Path], out: Path, *options: str, **variables: str) -> list[dict[str, Any]]:
    """What bench/served_agreement.py finds with these options and environment variables, and writes to ``out``."""
    command = [sys.executable, AGREEMENT, *map(str, checkpoints), "--text", str(HELDOUT), "--out", str(out), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(command, env=environment | variables, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def measured(
    checkpoints: Checkpoints, families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By scheme or family, what bench/served_agreement.py found."""
    # vLLM runs OLMo 2 as transformers' own code, which it compiles in another order than its own (cpu_compilation.py).
    compiled = {scheme: checkpoints(scheme, "lrq") for scheme in SCHEMES if scheme != "w8a8"} | {"olmo2": families["olmo2"]}
    eager = {family: folder for family, folder in families.items() if family not in compiled}
    folder = tmp_path_factory.mktemp("agreement")
    for name, settings, served in (
        (GROUPED, QuantizeSettings("w4a8", "rtn", group_size=64, **QUICK), eager),
        (ROTATED, QuantizeSettings("w4a4", "gptq", **QUICK), eager),
        (MAGNIFIED, QuantizeSettings("w4a4", "gptq", correction_rank="10%", **QUICK), compiled),
        (CORRECTED, QuantizeSettings("w4a16", "gptq", correction_rank="10%", rotate=True, **QUICK), compiled),
    ):
        served[name] = folder / name
        quantize_model(TINY, served[name], settings)

    def measure(mode: str, checkpoints: dict[str, Path]) -> dict[str, dict[str, Any]]:
        rows = agreement([*checkpoints.values()], folder / f"{mode}.json", "--modes", mode)
        return {name: row | {"folder": path} for (name, path), row in zip(checkpoints.items(), rows, strict=True)}

    # Side by side: imports and compilation, which take long, keep one core busy.
    with ThreadPoolExecutor() as pool:
        found = pool.map(measure, ("compiled", "eager"), (compiled, eager))
        return {name: row for rows in found for name, row in rows.items()}


@pytest.mark.parametrize("name", [*(scheme for scheme in SCHEMES if scheme != "w8a8"), GROUPED, ROTATED, CORRECTED, *FAMILIES])
def test_schemes_and_families_compute_in_the_engine_as_the_reference_path_does(
    name: str, measured: dict[str, dict[str, Any]]
) -> None:
    row = measured[name]
    assert row["kernels"] != ["vLLM's own"]
    assert row["mean_difference"] <= MEAN_DIFFERENCE and row["greedy_agreement"] >= GREEDY_AGREEMENT
    if SAME_SUMS and "expanded" not in row["kernels"]:  # which rounds weights to 16 bits
        assert row["median_difference"] <= EQUAL


def test_what_4_bit_activations_magnify_is_no_more_than_the_order_of_sums_makes(measured: dict[str, dict[str, Any]]) -> None:
    """A correction hands on what attention rounds the other way, and 4-bit activations magnify it (docs/correction.md)."""
    row = measured[MAGNIFIED]
    folder = row["folder"]
    prompts = token_windows(load_tokenizer(folder), read_texts(HELDOUT), PROMPTS, PROMPT_TOKENS)
    assert row["kernels"] != ["vLLM's own"]
    assert row["mean_difference"] <= 1.5 * reference_noise(folder, prompts)
    assert not SAME_SUMS or row["median_difference"] <= EQUAL


def test_two_ranks_that_compute_as_the_reference_give_the_numbers_and_tokens_of_one(tmp_path: Path) -> None:
    # All that ranks share: a token's step, sums of groups of integers, and what a correction shrinks a token to; and experts.
    settings = QuantizeSettings("w4a8", "rtn", group_size=64, **QUICK)
    quantize_model(TINY, tmp_path / "corrected", replace(settings, correction_rank="10%"))
    quantize_model(write_random_model("mixtral", tmp_path / "float"), tmp_path / "experts", settings)
    options = ("--modes", "eager", "--layouts", "tp1", "tp2")
    made = [tmp_path / "corrected", tmp_path / "experts"]
    rows = agreement(made, tmp_path / "found.json", *options, LRQ_KERNEL="reference")
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert [row["layout"] for row in (one, two)] == ["tp1", "tp2"] and one["kernels"] == two["kernels"] == ["reference"]
        assert two["as_first"] == {"tokens": 1.0, "prompts": 1.0}
        assert one["mean_difference"] == two["mean_difference"] and one["max_difference"] == two["max_difference"]
