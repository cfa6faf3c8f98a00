"""bench/served_agreement.py as tests run it, and what it is held to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import HELDOUT
from tests.vllm_layers import EQUAL, GREEDY_AGREEMENT, MEAN_DIFFERENCE, SAME_SUMS

_BENCH = Path(__file__).parents[1] / "bench" / "served_agreement.py"

ON_A_CPU = [
    pytest.mark.server,
    # A GPU rounds elsewhere, and quantized activations magnify that: bench/served_agreement.py measures it there.
    pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU"),
]


def agreement(checkpoints: list[Path], out: Path, *options: str, **variables: str) -> list[dict[str, Any]]:
    """What bench/served_agreement.py finds with these options and environment variables, and writes to ``out``."""
    command = [sys.executable, _BENCH, *map(str, checkpoints), "--text", str(HELDOUT), "--out", str(out), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run(command, env=environment | variables, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


def by_name(checkpoints: dict[str, Path], mode: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What :func:`agreement` finds of each; ``folder`` is written to."""
    rows = agreement([*checkpoints.values()], folder / f"{mode}.json", "--modes", mode)
    return dict(zip(checkpoints, rows, strict=True))


def assert_as_the_reference_path(row: dict[str, Any]) -> None:
    """Served by kernels of ours, with the numbers and the tokens of the reference path."""
    assert row["kernels"] != ["vLLM's own"]
    assert row["mean_difference"] <= MEAN_DIFFERENCE and row["greedy_agreement"] >= GREEDY_AGREEMENT
    if SAME_SUMS and "expanded" not in row["kernels"]:  # which rounds weights to 16 bits
        assert row["median_difference"] <= EQUAL
