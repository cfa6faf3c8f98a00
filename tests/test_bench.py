"""lrq-server bench, part by part: settings, prompts, servers' answers, the load generator's command line and results, files."""

import csv
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lrq_server.bench_folder import bench_folder, write_results
from lrq_server.bench_prompts import prompts_of_level, write_prompts
from lrq_server.bench_servers import check_model, check_options, command_for
from lrq_server.bench_settings import BenchSettings, parse_floor
from lrq_server.endpoint import Endpoint, find_endpoint
from lrq_server.jsonl_texts import read_texts
from lrq_server.load_generator import load_arguments, read_point
from lrq_vllm.errors import LrqError, SettingsError
from tests.benches import CONCURRENCY, RECORDED, RECORDED_FAILURE, REQUESTS, a_result, recorded_point
from tests.checkpoints import TINY


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"concurrency": (0, 4)}, "--concurrency must be 1 or more"),
        ({"concurrency": (4, 1)}, "--concurrency 4 1 must ascend"),
        ({"concurrency": (4, 4)}, "must ascend and name each number once"),
        ({"output_tokens": 1}, "--output-tokens 1 must be 2 or more"),
        ({"input_tokens": 0}, "--input-tokens 0 must be 2 or more"),
        ({"requests_per_level": 63}, "63 requests are not enough for 64 at a time"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
    ],
)
def test_a_load_that_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        BenchSettings(**change)


def test_every_level_has_requests_in_turn_and_a_seed_of_its_own() -> None:
    settings = BenchSettings((1, 16), seed=5)
    assert [settings.requests(level) for level in (1, 16)] == [32, 128]
    assert [settings.level_seed(level) for level in (1, 16)] == [5, 6]


def test_a_floor_is_a_ratio() -> None:
    assert [parse_floor(text) for text in ("1.3x", "1.3", "2x")] == [1.3, 1.3, 2.0]
    for text in ("fast", "0x", "-1", "1.3xx", ""):
        with pytest.raises(SettingsError, match=r"Write it like 1\.3x"):
            parse_floor(text)


def test_prompts_are_read_from_either_key(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "text": "not this"}\n\n{"text": "two\\u2028"}\n')
    assert read_texts(path, "prompts", "Or none.") == ["one", "two\u2028"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "are empty"),
        ("\n \n", "are empty"),
        ('{"prompt": "a"}\n{"question": "b"}\n', "line 2: no prompt"),
        ('{"prompt": " "}\n', "line 1: no prompt"),
        ('{"prompt": 3}\n', "line 1: no prompt"),
        ('["a"]\n', "line 1: no prompt"),
        ("plain text\n", "line 1: not a JSON object"),
        ("[" * 100_000 + "\n", "line 1: not a JSON object"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_by_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(SettingsError, match=said):
        read_texts(path, "prompts", "Or none.")


def test_a_missing_file_of_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_texts(tmp_path / "none.jsonl", "prompts", "Or none.")


def test_levels_share_no_prompt_while_the_file_lasts(tmp_path: Path) -> None:
    settings = BenchSettings((1, 2), requests_per_level=3)
    prompts = [f"prompt {index}" for index in range(5)]
    dealt = [prompts_of_level(prompts, settings, level) for level in (1, 2)]
    assert dealt == [prompts[:3], [*prompts[3:], prompts[0]]]
    write_prompts(dealt[1], tmp_path / "level.jsonl")
    assert read_texts(tmp_path / "level.jsonl", "prompts", "Or none.") == dealt[1]


def answer_with(monkeypatch: pytest.MonkeyPatch, models: Any, version: Any = None, status: int = 200) -> None:
    """Every server answers these models and this version; version None: it has no such address."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(status, json=models)
        return httpx.Response(404) if version is None else httpx.Response(200, json={"version": version})

    monkeypatch.setattr(httpx, "get", httpx.Client(transport=httpx.MockTransport(handle)).get)


def test_a_server_is_asked_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, {"data": [{"id": "tiny", "root": str(TINY), "max_model_len": 512}]}, version="0.32.0")
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert find_endpoint(url, None) == Endpoint("http://a:1", "tiny", str(TINY), 512, "vLLM 0.32.0")
    assert find_endpoint("http://a:1", "tiny").tokenizer() == str(TINY)


def test_a_server_that_is_not_vllm_needs_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, {"data": [{"id": "gpt"}]})
    endpoint = find_endpoint("http://a:1", None)
    assert endpoint == Endpoint("http://a:1", "gpt", None, None, None)
    with pytest.raises(SettingsError, match="--tokenizer"):
        endpoint.tokenizer()
    with pytest.raises(SettingsError, match="/elsewhere/tiny, which is not on this machine"):
        Endpoint("http://a:1", "tiny", "/elsewhere/tiny", None, None).tokenizer()


@pytest.mark.parametrize(
    ("models", "status", "model", "said"),
    [
        ({"data": [{"id": "a"}, {"id": "b"}]}, 200, None, "serves 2 models: a, b. Choose one of them with --model"),
        ({"data": [{"id": "a"}]}, 200, "b", "does not serve b, but a"),
        ({"data": []}, 200, None, "serves no model"),
        ({"detail": "Not Found"}, 404, None, "does not answer as an OpenAI-compatible server"),
        ({"models": []}, 200, None, "does not answer as an OpenAI-compatible server"),
        ({"data": [3]}, 200, None, "does not answer as an OpenAI-compatible server"),
        ({"error": "Unauthorized"}, 401, None, "Set OPENAI_API_KEY"),
    ],
)
def test_a_server_that_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, models: Any, status: int, model: str | None, said: str
) -> None:
    answer_with(monkeypatch, models, status=status)
    with pytest.raises(LrqError, match=said):
        find_endpoint("http://a:1", model)


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={"data": [{"id": "a"}], "version": "1"})

    monkeypatch.setattr(httpx, "get", httpx.Client(transport=httpx.MockTransport(handle)).get)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    find_endpoint("http://a:1", None)
    assert seen == ["Bearer secret"] * 2


@pytest.mark.parametrize("key", ["secret\n", "a secret", "schlüssel"])
def test_a_key_that_no_request_can_carry_is_refused_and_not_repeated(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SettingsError, match="Set it to the key alone") as refused:
        find_endpoint("http://127.0.0.1:9", None)
    assert key.strip() not in str(refused.value)


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(SettingsError, match="Write it like http"):
        find_endpoint("127.0.0.1:8000", None)
    with pytest.raises(LrqError, match="correct the URL"):
        find_endpoint("http://a..b", None)


def test_a_load_longer_than_the_server_takes_is_refused_before_it_is_sent() -> None:
    endpoint = Endpoint("http://a", "tiny", None, 512, None)
    endpoint.check_fits(512, "--input-tokens")
    with pytest.raises(SettingsError, match="513 tokens of prompt and answer do not fit into the 512"):
        endpoint.check_fits(513, "--input-tokens")


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_every_kind_of_prompts_has_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    endpoint = Endpoint("http://a:1", "served", None, None, None)

    def command(settings: BenchSettings, file: Path | None = None) -> list[str]:
        return load_arguments(endpoint, "tokenizer", settings, 4, file, tmp_path / "result.json")

    made = command(BenchSettings(input_tokens=50, output_tokens=9))
    assert (option(made, "--dataset-name"), option(made, "--random-input-len")) == ("random", "50")
    assert option(made, "--random-output-len") == "9"
    shared = command(BenchSettings(input_tokens=50, output_tokens=9, prompts="shared-prefix"))
    lengths = [int(option(shared, f"--prefix-repetition-{part}-len")) for part in ("prefix", "suffix")]
    assert lengths == [38, 12] and option(shared, "--prefix-repetition-output-len") == "9"
    custom = command(BenchSettings(output_tokens=9, prompts=tmp_path / "mine.jsonl"), tmp_path / "dealt.jsonl")
    assert option(custom, "--dataset-path") == str(tmp_path / "dealt.jsonl")
    assert option(custom, "--custom-output-len") == "9" and "--disable-shuffle" in custom
    for given in (made, shared, custom):
        assert (option(given, "--base-url"), option(given, "--model"), option(given, "--tokenizer")) == (
            "http://a:1", "served", "tokenizer",
        )  # fmt: skip
        assert (option(given, "--max-concurrency"), option(given, "--num-prompts")) == ("4", "32")
        assert "--ignore-eos" in given and option(given, "--num-warmups") == "4"


def test_every_place_is_warmed_up(tmp_path: Path) -> None:
    endpoint, settings = Endpoint("http://a:1", "served", None, None, None), BenchSettings((1, 16))
    for concurrency, warm_ups in ((1, "4"), (16, "16")):
        command = load_arguments(endpoint, "tokenizer", settings, concurrency, None, tmp_path / "result.json")
        assert option(command, "--num-warmups") == warm_ups


@pytest.mark.vllm
@pytest.mark.parametrize("prompts", ["random", "shared-prefix", Path("mine.jsonl")])
def test_the_load_generator_knows_every_option(prompts: str | Path, tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    settings = BenchSettings(prompts=prompts)
    endpoint = Endpoint("http://a:1", "served", None, None, None)
    arguments = load_arguments(endpoint, "tokenizer", settings, 4, Path("dealt.jsonl"), tmp_path / "result.json")
    parsed = parser.parse_args(arguments)
    assert (parsed.num_prompts, parsed.max_concurrency, parsed.num_warmups) == (32, 4, 4)
    assert parsed.percentile_metrics == "ttft,itl,tpot,e2el" and parsed.metric_percentiles == "50,95,99"
    assert parsed.result_dir == str(tmp_path) and parsed.save_result


def test_a_point_is_what_its_requests_say() -> None:
    """Against the times of the single requests in the same file, which nothing in lrq reads."""
    found, point = json.loads(RECORDED.read_text()), recorded_point()
    assert (point.concurrency, point.requests) == (CONCURRENCY, REQUESTS)
    assert (point.input_tokens, point.output_tokens) == (sum(found["input_lens"]), sum(found["output_lens"]))
    assert point.output_tokens_per_s == pytest.approx(sum(found["output_lens"]) / found["duration"])
    assert point.requests_per_s == pytest.approx(REQUESTS / point.duration_s)
    times = {"ttft": found["ttfts"], "itl": [gap for gaps in found["itls"] for gap in gaps], "e2e": found["latencies"]}
    times["tpot"] = [
        (latency - first) / (tokens - 1)
        for latency, first, tokens in zip(found["latencies"], found["ttfts"], found["output_lens"], strict=True)
    ]
    assert set(times) == set(point.latency_ms)
    for name, seconds in times.items():
        expected = {percentile: 1000 * float(np.percentile(seconds, percentile)) for percentile in (50, 95, 99)}
        assert point.latency_ms[name] == pytest.approx(expected)


def test_failed_requests_are_counted_and_the_first_error_is_named() -> None:
    with pytest.raises(LrqError, match=r"4 of 4 requests to http://a failed at concurrency 2: Bad Request\."):
        read_point(RECORDED_FAILURE, "http://a", REQUESTS, CONCURRENCY, None)


def test_one_failed_request_is_enough(tmp_path: Path) -> None:
    found = json.loads(RECORDED.read_text()) | {"completed": 3, "failed": 1}
    found["errors"][2] = "Traceback (most recent call last):\n  File\nConnectionResetError: gone\n"
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.raises(LrqError, match=r"1 of 4 requests .*: ConnectionResetError: gone\."):
        read_point(tmp_path / "result.json", "http://a", REQUESTS, CONCURRENCY, None)


def test_an_answer_that_broke_off_is_no_answer(tmp_path: Path) -> None:
    found = json.loads(RECORDED.read_text())
    whole = max(found["output_lens"])
    assert found["output_lens"] == [whole] * REQUESTS
    read_point(RECORDED, "http://a", REQUESTS, CONCURRENCY, whole)
    for tokens, least in ((2, whole), (0, None)):
        found["output_lens"][1] = tokens
        (tmp_path / "result.json").write_text(json.dumps(found))
        with pytest.raises(LrqError, match=f"1 of 4 answers of http://a broke off at concurrency 2, after {tokens} tokens"):
            read_point(tmp_path / "result.json", "http://a", REQUESTS, CONCURRENCY, least)


def test_a_result_of_another_form_is_refused(tmp_path: Path) -> None:
    found = json.loads(RECORDED.read_text())
    del found["p95_ttft_ms"]
    for content in (json.dumps(found), "[]", "{"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(LrqError, match=r"Use vLLM 0\.25 to 0\.33"):
            read_point(tmp_path / "result.json", "http://a", REQUESTS, CONCURRENCY, None)


def test_ratios_are_the_models_tokens_by_the_baselines() -> None:
    assert a_result((1, 4), faster=1.5).ratios() == pytest.approx({1: 1.5, 4: 1.5})
    assert a_result((1, 4), faster=1.5).below(1.6) == pytest.approx({1: 1.5, 4: 1.5})
    assert a_result((1, 4), faster=1.5).below(1.4) == {}
    assert a_result((1, 4), faster=None).ratios() == {}


def test_files_hold_every_number_as_it_was_measured(tmp_path: Path) -> None:
    result = a_result((1, 4))
    write_results(result, tmp_path)
    point = result.model.points[1]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["model"]["points"][1]["output_tokens_per_s"] == point.output_tokens_per_s
    assert found["model"]["points"][1]["latency_ms"]["ttft"]["99"] == point.latency_ms["ttft"][99]
    assert found["ratio_of_output_tokens_per_s"] == {"1": pytest.approx(1.5), "4": pytest.approx(1.5)}
    assert found["settings"]["requests"] == {"1": 4, "4": 4}
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["role"], row["concurrency"]) for row in rows] == [
        ("model", "1"), ("model", "4"), ("baseline", "1"), ("baseline", "4"),
    ]  # fmt: skip
    assert float(rows[1]["itl_p99_ms"]) == point.latency_ms["itl"][99]
    assert float(rows[1]["ratio_to_baseline"]) == pytest.approx(1.5) and rows[3]["ratio_to_baseline"] == ""


def test_results_appear_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(json, "dumps", full_disk)  # bench.json is written last
    with pytest.raises(OSError, match="no space"):
        write_results(a_result(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    bench_folder(tmp_path / "new").check(overwrite=False)
    bench_folder(tmp_path / "new").begin()
    (tmp_path / "new" / "bench.json").write_text("{}")
    with pytest.raises(SettingsError, match="pass --overwrite"):
        bench_folder(tmp_path / "new").check(overwrite=False)
    (tmp_path / "new" / "server-model.log").write_text("")
    (tmp_path / "new" / ".bench.csv.partial").write_text("")  # of a bench that was killed
    bench_folder(tmp_path / "new").check(overwrite=True)
    bench_folder(tmp_path / "new").begin()
    # Results are replaced by results, and not before.
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.json"]
    (tmp_path / "new" / "thesis.tex").write_text("")
    with pytest.raises(SettingsError, match=r"something other than a bench: thesis\.tex"):
        bench_folder(tmp_path / "new").check(overwrite=True)
    with pytest.raises(SettingsError, match="is a file"):
        bench_folder(tmp_path / "new" / "thesis.tex").check(overwrite=True)


def test_an_lrq_checkpoint_is_served_by_lrq_and_other_models_by_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "lrq"}}))
    assert command_for(str(tmp_path), ["--x"])[1:] == ["-m", "lrq_server", "serve", str(tmp_path), "--x"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    for model in (str(tmp_path), str(TINY), "org/name"):
        program, *rest = command_for(model, ["--x"])
        assert Path(program).name == "vllm" and rest == ["serve", model, "--x"]


def test_models_and_options_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    check_model("org/name")
    check_model(str(TINY))
    for model in (str(tmp_path / "none"), "./none", "org/name/more"):
        with pytest.raises(SettingsError, match="does not exist"):
            check_model(model)
    check_options(["--max-model-len", "512"])
    for given in ("--port", "--port=80", "--host"):
        with pytest.raises(SettingsError, match="does not go with --auto"):
            check_options(["--enforce-eager", given, "80"])
