"""The whole of ``lrq-server eval`` against small servers that answer like vLLM: numbers, gate, tasks, and what goes wrong."""

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_server import eval_command, lm_eval_tasks
from lrq_server.cli import main
from lrq_server.endpoint import Endpoint
from lrq_server.lm_eval_tasks import TaskScore, TaskSettings, read_scores, tasks_command
from lrq_vllm.errors import LrqError, SettingsError

VOCABULARY = 16
TEXT = "the server reads this text " * 4
# lm-eval 0.4.13: a task of 4 questions, asked of a served checkpoint; shortened.
RESULTS = {
    "results": {
        "mine": {"alias": "mine", "name": "mine", "sample_len": 4, "acc,none": 0.75, "acc_stderr,none": 0.25},
        "gsm": {"exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": "N/A"},
    }
}
_LM_EVAL = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1], "tiny")
folder.mkdir()
(folder / "results_2026-01-02.json").write_text(sys.argv[2])
"""


class _Server(ThreadingHTTPServer):
    """A bigram model over 16 letters: log_p [VOCABULARY, VOCABULARY] of the next token by the last."""

    log_p: Tensor
    first_token = 0
    refuses = False
    plain = False  # an OpenAI server that is not vLLM's
    hung: threading.Event | None = None  # it answers no prompt before
    sends = signal.SIGINT  # to this process, when it is asked then

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "tiny", "root": "/nowhere", "max_model_len": 32}], "version": "0"})

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = [self.server.first_token, *(ord(letter) % VOCABULARY for letter in given["prompt"])]
            self._answer({"tokens": tokens}, 404 if self.server.plain else 200)
        elif self.server.hung is not None:
            os.kill(os.getpid(), self.server.sends)
            self.server.hung.wait()
        elif self.server.refuses:
            self._answer({"error": {"message": "Requested prompt logprobs of 5"}}, 400)
        else:
            window = given["prompt"]
            places = [self._place(*pair, given["prompt_logprobs"]) for pair in pairwise(window)]
            self._answer({"choices": [{"prompt_logprobs": [None, *places]}]})

    def _place(self, last: int, token: int, top: int) -> dict[str, Any]:
        row = self.server.log_p[last]
        said = dict.fromkeys([token, *row.topk(min(top, VOCABULARY)).indices.tolist()])
        return {str(one): {"logprob": row[one].item(), "rank": 1, "decoded_token": "x"} for one in said}

    def _answer(self, body: Any, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture
def servers() -> Iterator[tuple[_Server, _Server]]:
    """A model and its baseline, which is the same but for noise."""
    log_p = torch.randn(VOCABULARY, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    both = (_Server(("127.0.0.1", 0), _Handler), _Server(("127.0.0.1", 0), _Handler))
    both[0].log_p, both[1].log_p = (log_p + 0.2 * torch.randn_like(log_p)).log_softmax(-1), log_p
    for server in both:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(servers: tuple[_Server, _Server], tmp_path: Path) -> Any:
    """``run(*options)``: evaluate the first against the second, into tmp_path/out."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": TEXT + ending}) + "\n" for ending in ("one", "two", "three")))
    urls = [f"http://127.0.0.1:{server.server_port}" for server in servers]
    given = ["eval", "--url", urls[0], "--baseline", urls[1], "--texts", str(texts), "--seq-len", "16"]
    return lambda *options: main([*given, "--out", str(tmp_path / "out"), *options])


def test_the_numbers_are_those_of_the_whole_distributions(
    servers: tuple[_Server, _Server], run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--top-logprobs", "16") == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    ids = [token for ending in ("one", "two", "three") for token in (0, *(ord(x) % VOCABULARY for x in TEXT + ending))]
    starts = torch.linspace(0, len(ids) - 16, len(ids) // 16).long()
    windows = torch.stack([torch.tensor(ids[start : start + 16]) for start in starts.tolist()])
    model, baseline = (server.log_p[windows[:, :-1]] for server in servers)
    of_text = [log_p.gather(-1, windows[:, 1:, None]).mean().item() for log_p in (model, baseline)]
    assert (found["windows"], found["tokens"]) == (len(windows), windows[:, 1:].numel())
    assert found["model"]["perplexity"]["value"] == pytest.approx(math.exp(-of_text[0]))
    assert found["baseline"]["perplexity"]["value"] == pytest.approx(math.exp(-of_text[1]))
    assert found["comparison"]["recovery"]["value"] == pytest.approx(math.exp(of_text[0] - of_text[1]))
    divergence = (baseline.exp() * (baseline - model)).sum(-1).mean().item()
    assert found["comparison"]["kl_at_least"]["value"] == pytest.approx(divergence, abs=1e-4)
    same = (baseline.argmax(-1) == model.argmax(-1)).double().mean().item()
    assert found["comparison"]["top1"]["value"] == pytest.approx(same)
    printed = capsys.readouterr().out
    assert "recovery" in printed and f"{found['comparison']['recovery']['value']:.4f}" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval.json"}


def test_the_gate_is_exit_code_1_and_everything_is_written(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    recovery = json.loads((tmp_path / "out" / "eval.json").read_text())["comparison"]["recovery"]["value"]
    assert run("--overwrite", "--min-recovery", str(recovery - 1e-6)) == 0
    capsys.readouterr()
    assert run("--overwrite", "--min-recovery", str(recovery + 1e-6)) == 1
    said = capsys.readouterr().err
    assert f"recovery {recovery:.4f} (95% interval" in said and "is below --min-recovery" in said
    assert (tmp_path / "out" / "eval.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_it_while_a_server_hangs(
    number: signal.Signals, run: Any, servers: tuple[_Server, _Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].hung, servers[0].sends = threading.Event(), number
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    try:
        assert run("--concurrency", "1") == 130
    finally:
        signal.signal(signal.SIGINT, before)
        servers[0].hung.set()
    assert capsys.readouterr().err == "lrq-server: interrupted.\n" and not list(tmp_path.rglob("*.json"))


def test_fewer_tokens_reported_say_less(run: Any, tmp_path: Path) -> None:
    least = []
    for top in ("1", "4", "16"):
        assert run("--overwrite", "--top-logprobs", top) == 0
        least.append(json.loads((tmp_path / "out" / "eval.json").read_text())["comparison"]["kl_at_least"]["value"])
    assert 0 < least[0] < least[1] < least[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refuses": True}, "refused a request (HTTP 400)"),
        ({"refuses": True}, "Requested prompt logprobs of 5"),
        ({"plain": True}, "needs a server of vLLM's"),
        ({"first_token": 3}, "makes other tokens of the text"),
    ],
)
def test_a_server_that_cannot_be_compared_is_one_paragraph_and_nothing_is_written(
    change: dict[str, Any],
    said: str,
    servers: tuple[_Server, _Server],
    run: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in change.items():
        setattr(servers[1], name, value)
    assert run() == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("lrq-server: ") and error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_token_of_probability_0_has_no_perplexity(
    servers: tuple[_Server, _Server], run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].log_p[:, ord("r") % VOCABULARY] = -9999.0  # as vLLM writes it
    assert run() == 2
    assert "the probability 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--windows", "1"], "--windows 1 must be 2 or more"),
        (["--windows", "1000"], "1000 are needed"),
        (["--seq-len", "1"], "--seq-len 1 must be 2 or more"),
        (["--seq-len", "32"], "33 tokens of prompt and answer do not fit into the 32"),
        (["--top-logprobs", "0"], "--top-logprobs 0 must be 1 or more"),
        (["--min-recovery", "0"], "--min-recovery 0 is not a ratio"),
        (["--fewshot", "3"], "--fewshot is for tasks"),
        (["--texts", "none.jsonl"], "none.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_one_paragraph(
    options: list[str], said: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://a"], "Nothing to evaluate on"),
        (["--url", "http://a", "--texts", "t.jsonl", "--min-recovery", "0.9"], "--min-recovery needs a baseline"),
        (["--url", "http://a", "--tasks", "arc_easy"], "pip install '.[eval]'"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_asked(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_tasks_are_asked_of_both_servers(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def command(endpoint: Endpoint, tokenizer: str, settings: TaskSettings, output: Path) -> list[str]:
        asked.append((endpoint.url, tokenizer, settings.names))
        return [sys.executable, "-c", _LM_EVAL, str(output), json.dumps(RESULTS)]

    monkeypatch.setattr(eval_command, "check_installed", lambda: None)
    monkeypatch.setattr(lm_eval_tasks, "tasks_command", command)
    assert run("--tasks", "mine", "gsm", "--tokenizer", "some/tokenizer") == 0
    assert len({url for url, _, _ in asked}) == 2
    assert {entry[1:] for entry in asked} == {("some/tokenizer", ("mine", "gsm"))}
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (
        found["model"]["tasks"]
        == found["baseline"]["tasks"]
        == [
            {"task": "mine", "metric": "acc", "value": 0.75, "stderr": 0.25},
            {"task": "gsm", "metric": "exact_match (strict-match)", "value": 0.5, "stderr": None},
        ]
    )
    assert "0.7500 ± 0.2500" in capsys.readouterr().out


def test_a_failing_lm_eval_is_quoted(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(eval_command, "check_installed", lambda: None)
    monkeypatch.setattr(lm_eval_tasks, "tasks_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such task')"])
    assert run("--tasks", "mine", "--tokenizer", "some/tokenizer") == 2
    assert "no such task" in capsys.readouterr().err


def test_the_command_line_of_lm_eval(tmp_path: Path) -> None:
    endpoint = Endpoint("http://a", "m/tiny", None, 512, None)
    settings = TaskSettings(("one", "two"), Path("mine"), 10, 5, 8)
    command = tasks_command(endpoint, "tok", settings, tmp_path)
    assert command[1:] == [
        "-m", "lm_eval", "--model", "local-completions", "--model_args",
        "model=m/tiny,base_url=http://a/v1/completions,tokenizer_backend=huggingface,tokenizer=tok,num_concurrent=8,"
        "max_length=512",
        "--tasks", "one,two", "--output_path", str(tmp_path), "--include_path", "mine", "--limit", "10", "--num_fewshot", "5",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="separates its options with commas"):
        tasks_command(endpoint, "a,b", settings, tmp_path)


def test_results_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results_1.json"
    path.write_text(json.dumps({"results": {"mine": {"acc,none": 1.0}}}))
    assert read_scores(path) == (TaskScore("mine", "acc", 1.0, None),)
    path.write_text("[]")
    with pytest.raises(LrqError, match="is not what lrq knows of lm-eval's results"):
        read_scores(path)
