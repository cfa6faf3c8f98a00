"""lrq-server bench with the real thing: two vLLM servers, one after the other, and vLLM's load generator."""

import csv
import json
from pathlib import Path

import pytest

from lrq_server.cli import main
from tests.checkpoints import TINY, Checkpoints

pytestmark = pytest.mark.server


def test_a_checkpoint_is_benchmarked_against_its_float_model(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it is for the kernel tests of this process, not for vLLM
    checkpoint, out = checkpoints("w8a8", "lrq"), tmp_path / "out"
    load = ["--concurrency", "1", "4", "--requests-per-level", "8", "--input-tokens", "32", "--output-tokens", "8"]
    options = ["--max-model-len", "512", "--enforce-eager"]
    assert main(["bench", "--auto", str(checkpoint), str(TINY), *load, "--out", str(out), "--", *options]) == 0
    assert {path.name for path in out.iterdir()} == {
        "bench.csv", "bench.html", "bench.json", "load-generator", "server-model.log", "server-baseline.log",
    }  # fmt: skip
    found = json.loads((out / "bench.json").read_text())
    for role, model in (("model", checkpoint), ("baseline", TINY)):
        assert found[role]["endpoint"]["model"] == str(model) and found[role]["endpoint"]["server"].startswith("vLLM ")
        for point, concurrency in zip(found[role]["points"], (1, 4), strict=True):
            assert (point["concurrency"], point["requests"], point["output_tokens"]) == (concurrency, 8, 8 * 8)
            assert point["output_tokens_per_s"] == pytest.approx(8 * 8 / point["duration_s"])
            raw = json.loads((out / "load-generator" / f"{role}-{concurrency}.json").read_text())
            assert (raw["failed"], raw["completed"], raw["max_concurrency"]) == (0, 8, concurrency)
    # Which of the servers got a quantized model.
    assert "quantization=lrq" in (out / "server-model.log").read_text()
    assert "quantization=lrq" not in (out / "server-baseline.log").read_text()
    with (out / "bench.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    assert "<svg" in (out / "bench.html").read_text(encoding="utf-8")
