"""The whole of ``lrq-server bench`` with stand-ins for vLLM: exit codes, outputs, servers that are stopped in every case."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lrq_server import bench_command, bench_servers, measured_servers
from lrq_server.cli import main
from lrq_server.endpoint import Endpoint
from lrq_server.told_to_stop import interrupted_when_told
from lrq_server.vllm_process import start_server
from lrq_vllm.errors import LrqError
from tests.benches import RECORDED, RECORDED_FAILURE
from tests.checkpoints import TINY

# Writes a recorded result where the real one would; at the baseline's address with half of the tokens/s.
_GENERATOR = """
import json, os, pathlib, sys
def add_cli_args(parser):
    pass
def main(arguments):
    given = dict(zip(arguments, arguments[1:]))
    found = json.loads(pathlib.Path({recorded!r}).read_text())
    found["output_throughput"] *= 0.5 if given["--base-url"].endswith(":2") else 1
    print("the generator's last words")
    {ending}
    pathlib.Path(given["--result-dir"], given["--result-filename"]).write_text(json.dumps(found))
"""
_PARSER = """
class FlexibleArgumentParser:
    def __init__(self, prog):
        pass
    def parse_args(self, arguments):
        return arguments
"""
# A server of one model that answers like vLLM, as far as a bench asks it.
_SERVER = """
import http.server, json, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        body = {"data": [{"id": "tiny", "root": sys.argv[1], "max_model_len": 512}], "version": "0"}
        self.wfile.write(json.dumps(body).encode())
pathlib.Path(sys.argv[2]).write_text(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
QUICKLY = ("--concurrency", "1", "2", "--requests-per-level", "4", "--input-tokens", "32", "--output-tokens", "8")
SERVERS = ("--url", "http://127.0.0.1:1", "--baseline", "http://127.0.0.1:2")


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in for vllm in place: ``generator(recorded, ending)``."""

    def put(recorded: Path = RECORDED, ending: str = "") -> None:
        made = {
            "__init__.py": "",
            "benchmarks/serve.py": _GENERATOR.format(recorded=str(recorded), ending=ending),
            "utils/argparse_utils.py": _PARSER,
        }
        for name, text in made.items():
            file = tmp_path / "stand-in" / "vllm" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand-in"))

    return put


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers of tiny that answer at SERVERS."""
    monkeypatch.setattr(
        measured_servers, "find_endpoint", lambda url, *_: Endpoint(url, "models/tiny", str(TINY), 512, "vLLM 0")
    )


def test_two_servers_are_measured_and_everything_is_written(
    generator: Any, running: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator()
    assert main(["bench", *SERVERS, *QUICKLY, "--out", str(tmp_path / "out"), "--floor", "1.9x"]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["ratio_of_output_tokens_per_s"] == {"1": 2.0, "2": 2.0}
    assert found["settings"]["concurrency"] == [1, 2] and found["baseline"]["endpoint"]["url"] == "http://127.0.0.1:2"
    printed = capsys.readouterr().out
    assert printed.count("2.00x") == 2 and "tiny (baseline)" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.csv", "bench.html", "bench.json", "load-generator"}


def test_below_the_floor_is_exit_code_1_and_says_where(
    generator: Any, running: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator()
    assert main(["bench", *SERVERS, *QUICKLY, "--out", str(tmp_path / "out"), "--floor", "2.1x"]) == 1
    assert "below the floor of 2.1x: 2.00x at concurrency 1, 2.00x at concurrency 2." in capsys.readouterr().err
    assert (tmp_path / "out" / "bench.json").exists()


def test_without_a_seed_no_run_repeats_the_prompts_of_another(generator: Any, running: None, tmp_path: Path) -> None:
    generator()
    seeds = []
    for name in ("one", "two"):
        assert main(["bench", *SERVERS[:2], *QUICKLY, "--out", str(tmp_path / name)]) == 0
        seeds.append(json.loads((tmp_path / name / "bench.json").read_text())["settings"]["seed"])
    assert seeds[0] != seeds[1]


def test_a_failed_request_fails_the_run_and_writes_no_number(
    generator: Any, running: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator(RECORDED_FAILURE)
    assert main(["bench", *SERVERS, *QUICKLY, "--out", str(tmp_path / "out")]) == 2
    assert "4 of 4 requests to http://127.0.0.1:1 failed at concurrency 1: Bad Request." in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"load-generator"}


def test_a_load_generator_that_fails_is_quoted(
    generator: Any, running: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator(ending="sys.exit(3)")
    assert main(["bench", *SERVERS, *QUICKLY, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "ended with code 3" in said and "the generator's last words" in said


def test_prompts_of_a_file_reach_the_generator_and_repeats_are_told(
    generator: Any, running: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_command, "find_spec", lambda name: object())  # the stand-in needs no pandas
    generator()
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": f"question {index}"}) + "\n" for index in range(5)))
    load = ("--concurrency", "1", "2", "--requests-per-level", "4", "--output-tokens", "8")
    out = tmp_path / "out"
    assert main(["bench", *SERVERS, *load, "--prompts", str(tmp_path / "mine.jsonl"), "--out", str(out)]) == 0
    dealt = [json.loads(line)["prompt"] for line in (out / "load-generator" / "prompts-2.jsonl").read_text().splitlines()]
    assert dealt == ["question 4", "question 0", "question 1", "question 2"]
    assert "5 prompts for 8 requests" in capsys.readouterr().out


@pytest.mark.parametrize(("server", "code"), [(None, 0), ("vLLM 0", 2)], ids=["another server", "vLLM"])
def test_shorter_answers_than_asked_for_are_told(
    server: str | None, code: int, generator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = Endpoint("http://127.0.0.1:1", "models/tiny", str(TINY), 512, server)
    monkeypatch.setattr(measured_servers, "find_endpoint", lambda *_: asked)
    generator()
    load = (*QUICKLY[:-1], "9")
    assert main(["bench", *SERVERS[:2], *load, "--out", str(tmp_path / "out")]) == code
    printed = capsys.readouterr()
    if server is None:
        assert "The model ended answers before 9 tokens (concurrency 1, 2)" in printed.out
    else:  # which ends no answer early that it was told to go on with
        assert "broke off at concurrency 1, after 8 tokens of 9" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://a", "--floor", "1.3x"], "--floor needs a baseline"),
        (["--url", "http://a", "--baseline-model", "b"], "--baseline-model needs a baseline"),
        (["--url", "http://a", "--", "--enforce-eager"], "--enforce-eager after -- is for servers that --auto starts"),
        (["--url", "http://a", "--concurrency", "0"], "--concurrency must be 1 or more"),
        (["--url", "http://a", "--prompts", "none.jsonl"], "none.jsonl cannot be read"),
        (
            ["--url", "http://a", "--prompts", "none.jsonl", "--input-tokens", "3"],
            "--input-tokens is for prompts that are made",
        ),
        (["--url", "http://a", "--floor", "fast"], "Write it like 1.3x"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["--auto", "./none", str(TINY)], "The model folder ./none does not exist"),
        (["--auto", str(TINY), str(TINY.parent)], "has no config.json"),
        (["--auto", str(TINY), str(TINY), "--baseline", "http://a"], "--baseline is for servers that are running"),
        (["--auto", str(TINY), str(TINY), "--", "--port", "80"], "--port does not go with --auto"),
    ],
)
def test_what_cannot_be_measured_is_one_paragraph(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_command, "find_spec", lambda name: object())
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("lrq-server: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bench_that_fails_leaves_the_results_of_the_one_before(
    generator: Any, running: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", *SERVERS, *QUICKLY, "--out", str(tmp_path / "out"), "--overwrite"]
    generator()
    assert main(arguments) == 0
    before = (tmp_path / "out" / "bench.json").read_bytes()
    generator(RECORDED_FAILURE)
    assert main(arguments) == 2
    assert (tmp_path / "out" / "bench.json").read_bytes() == before


def test_a_server_is_not_compared_with_itself(
    running: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = "http://127.0.0.1:1"
    assert main(["bench", "--url", address, "--baseline", address, *QUICKLY, "--out", str(tmp_path / "out")]) == 2
    assert "is the server to be measured" in capsys.readouterr().err


def test_an_unknown_option_is_not_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--url", "http://a", "--max-model-len", "512"])
    assert ended.value.code == 2 and "Options for vLLM stand after --" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [RECORDED, RECORDED_FAILURE])
def test_auto_starts_one_server_after_the_other_and_stops_each(
    recorded: Path, generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str]]] = []

    def command(model: str, options: list[str]) -> list[str]:
        for before in range(len(started)):
            assert not alive(tmp_path / f"pid-{before}")
        started.append((model, options))
        return [sys.executable, "-c", _SERVER, str(TINY), str(tmp_path / f"pid-{len(started) - 1}")]

    monkeypatch.setattr(bench_servers, "command_for", command)
    generator(recorded)
    arguments = ["--auto", str(TINY), str(TINY), *QUICKLY, "--out", str(tmp_path / "out"), "--", "--enforce-eager"]
    assert main(["bench", *arguments]) == (0 if recorded == RECORDED else 2)
    count = 2 if recorded == RECORDED else 1  # the first failure ends the run
    assert started == [(str(TINY), ["--enforce-eager"])] * count
    assert not any(alive(tmp_path / f"pid-{index}") for index in range(count))
    assert (tmp_path / "out" / "server-model.log").exists()


def test_a_server_ends_with_a_bench_that_is_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", _SERVER, str(TINY), str(tmp_path / "pid")]
    monkeypatch.setattr(bench_servers, "command_for", lambda *_: command)
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when_told(),
        bench_servers.served(str(TINY), tmp_path / "server.log", []),
    ):
        assert alive(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGTERM)
    assert not alive(tmp_path / "pid")


def test_a_bench_that_nohup_started_goes_on_after_a_hangup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_when_told():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_a_second_ctrl_c_leaves_no_server_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", _SERVER, str(TINY), str(tmp_path / "pid")]
    with pytest.raises(KeyboardInterrupt), start_server(command, tmp_path / "server.log") as server:
        server.wait_until_ready()
        wait = server.process.wait

        def interrupted(timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return wait()

        monkeypatch.setattr(server.process, "wait", interrupted)
    assert not alive(tmp_path / "pid")


def test_a_server_of_our_own_is_reached_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    command = [sys.executable, "-c", _SERVER, str(TINY), str(tmp_path / "pid")]
    monkeypatch.setattr(bench_servers, "command_for", lambda *_: command)
    with bench_servers.served(str(TINY), tmp_path / "server.log", []) as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:")
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1"


def test_a_server_that_dies_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_servers, "command_for", lambda *_: [sys.executable, "-c", "raise SystemExit('no memory')"])
    with pytest.raises(LrqError, match="no memory"), bench_servers.served(str(TINY), tmp_path / "server.log", []):
        pass
