"""lrq-server bench and eval with the real thing: two vLLM servers, vLLM's load generator, and offline evaluation to compare."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.evaluate import compare
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import load_tokenizer
from lrq_server import measured_servers
from lrq_server.cli import main
from lrq_server.endpoint import Endpoint
from tests.checkpoints import HELDOUT, TINY, Checkpoints

pytestmark = pytest.mark.server

OPTIONS = ("--max-model-len", "512", "--enforce-eager", "--max-logprobs", "4096")


@pytest.fixture(scope="module", autouse=True)
def started_once() -> Iterator[None]:
    """What --auto starts goes on until the last test here, so that each model's server is started once."""
    start, running = measured_servers.served, dict[str, Endpoint]()
    with ExitStack() as servers, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def served(model: str, log: Path, options: Sequence[str]) -> Iterator[Endpoint]:
            if model not in running:
                running[model] = servers.enter_context(start(model, log, options))
            yield running[model]

        patch.delenv("TRITON_INTERPRET", raising=False)  # it is for the kernel tests of this process, not for vLLM
        patch.setattr(measured_servers, "served", served)
        yield


@pytest.fixture(scope="module")
def checkpoint(checkpoints: Checkpoints) -> Path:
    return checkpoints("w8a8", "lrq")


def test_a_checkpoint_is_benchmarked_against_its_float_model(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    load = ["--concurrency", "1", "4", "--requests-per-level", "8", "--input-tokens", "32", "--output-tokens", "8"]
    assert main(["bench", "--auto", str(checkpoint), str(TINY), *load, "--out", str(out), "--", *OPTIONS]) == 0
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


@pytest.mark.parametrize(("windows", "seq_len", "top_logprobs"), [(16, 128, 20), (2, 32, 4096)], ids=["top 20", "all"])
def test_served_quality_is_what_the_reference_path_says(
    windows: int, seq_len: int, top_logprobs: int, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = ["--texts", str(HELDOUT), "--windows", str(windows), "--seq-len", str(seq_len)]
    text += ["--top-logprobs", str(top_logprobs), "--out", str(out)]
    assert main(["eval", "--auto", str(checkpoint), str(TINY), *text, "--", *OPTIONS]) == 0
    found = json.loads((out / "eval.json").read_text())
    tokenizer = load_tokenizer(TINY)
    tokens = token_windows(tokenizer, read_texts(HELDOUT, tokenizer), windows, seq_len)
    # With a server's roundings: without them two windows' perplexity is up to 4% another.
    expected = compare(*(load_model(folder, served_in=torch.bfloat16) for folder in (checkpoint, TINY)), tokens)
    print(found["model"]["perplexity"], found["baseline"]["perplexity"], found["comparison"], expected)
    assert found["tokens"] == expected.tokens
    assert found["model"]["perplexity"]["value"] == pytest.approx(expected.perplexity, rel=0.01)
    assert found["baseline"]["perplexity"]["value"] == pytest.approx(expected.reference_perplexity, rel=0.01)
    recovery = found["comparison"]["recovery"]
    assert recovery["value"] == pytest.approx(found["baseline"]["perplexity"]["value"] / found["model"]["perplexity"]["value"])
    assert recovery["low"] <= recovery["value"] <= recovery["high"]
    assert found["comparison"]["top1"]["value"] == pytest.approx(expected.top1, abs=0.04)
    assert expected.kl is not None
    if top_logprobs == 4096:  # the whole vocabulary
        assert found["comparison"]["kl_covers"] == pytest.approx(1, abs=1e-5)
        assert found["comparison"]["kl_at_least"]["value"] == pytest.approx(expected.kl, rel=0.25)
    else:
        assert 0.5 * expected.kl < found["comparison"]["kl_at_least"]["value"] < expected.kl
        assert 0.6 < found["comparison"]["kl_covers"] < 0.95
