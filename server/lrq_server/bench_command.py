"""lrq-server bench: throughput of one or two servers, measured with ``vllm bench serve``."""

import argparse
import platform
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lrq_server.bench_folder import check_folder, new_folder, write_results
from lrq_server.bench_prompts import read_prompts
from lrq_server.bench_result import BenchResult, Measured
from lrq_server.bench_servers import check_model, check_options, served
from lrq_server.bench_settings import RANDOM, SHARED_PREFIX, BenchSettings, parse_floor
from lrq_server.bench_sweep import sweep
from lrq_server.endpoint import find_endpoint
from lrq_server.vllm_process import vllm_program
from lrq_vllm.errors import SettingsError

__all__ = ["add_to"]

_ABOUT = """Measure the throughput of one or two OpenAI-compatible servers with vLLM's own load generator, `vllm bench serve`.
Each concurrency is warmed up and has prompts of its own, the same for both servers. Every request must be answered."""

_EXAMPLES = """examples:
  lrq-server bench --url http://127.0.0.1:8000
  lrq-server bench --url http://127.0.0.1:8000 --baseline http://127.0.0.1:8001 --concurrency 1 16 64 --floor 1.3x
  lrq-server bench --url http://127.0.0.1:8000 --prompts questions.jsonl --output-tokens 256
  lrq-server bench --auto ./Llama-3-8B-lrq-w8a8 ./Llama-3-8B -- --max-model-len 4096

Exit code 1: slower than --floor. Exit code 2: something to put right, as a request that failed.
"""
_MODEL, _BASELINE = "model", "baseline"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench",
        help="measure the throughput of one or two servers",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = bench.add_mutually_exclusive_group(required=True)
    which.add_argument("--url", help="a server that is running")
    which.add_argument(
        "--auto", nargs=2, metavar=("MODEL", "BASELINE"),
        help="start a server of each here, one after the other, and stop them; options after -- are handed to both",
    )  # fmt: skip
    bench.add_argument("--baseline", metavar="URL", help="a running server to compare with")
    bench.add_argument("--model", metavar="NAME", help="the model to ask, if the server at --url has several")
    bench.add_argument("--baseline-model", metavar="NAME", help="the same at --baseline")
    bench.add_argument("--tokenizer", metavar="DIR", help="makes the prompts (default: that of the model)")
    default = BenchSettings()
    bench.add_argument(
        "--concurrency", type=int, nargs="+", metavar="N", default=default.concurrency,
        help=f"requests at a time, ascending (default: {' '.join(map(str, default.concurrency))})",
    )  # fmt: skip
    bench.add_argument(
        "--input-tokens", type=int, metavar="N", help=f"in each prompt that is made (default: {default.input_tokens})"
    )
    bench.add_argument(
        "--output-tokens", type=int, metavar="N", default=default.output_tokens, help="in each answer (default: %(default)s)"
    )
    bench.add_argument(
        "--requests-per-level", type=int, metavar="N", help="at each concurrency (default: 8 times as many, at least 32)"
    )
    bench.add_argument(
        "--prompts", metavar=f"{RANDOM}|{SHARED_PREFIX}|FILE.jsonl", default=RANDOM,
        help="random tokens; the same with the first three quarters in common; or the prompt (or text) of each line of a file",
    )  # fmt: skip
    bench.add_argument(
        "--seed", type=int, metavar="N",
        help="of the random prompts (default: another one each time, so that no server has them in its prefix cache)",
    )  # fmt: skip
    bench.add_argument("--out", type=Path, metavar="DIR", default=Path("lrq-bench"), help="default: ./%(default)s")
    bench.add_argument("--overwrite", action="store_true", help="replace an earlier bench in DIR")
    bench.add_argument(
        "--floor", metavar="1.3x", help="exit with 1 if the model makes fewer tokens/s than so many times the baseline's"
    )
    bench.set_defaults(run=_run, hands_on_unknown=False)


def _run(parsed: argparse.Namespace, vllm_options: list[str]) -> int:
    settings = _settings(parsed)
    prompts = _prompts_of_file(settings.prompts) if isinstance(settings.prompts, Path) else None
    floor = None if parsed.floor is None else parse_floor(parsed.floor)
    _check_combinations(parsed, vllm_options)
    vllm_program()
    check_folder(parsed.out, overwrite=parsed.overwrite)
    # Into a file or a pipe the table goes without broken lines.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    measured = (_measure_own if parsed.auto else _measure_running)(parsed, settings, prompts, vllm_options, console)
    result = BenchResult(
        settings=settings,
        about=_about(parsed, vllm_options),
        model=measured[_MODEL],
        baseline=measured.get(_BASELINE),
        notes=_notes(measured, settings, prompts),
    )
    files = write_results(result, parsed.out)
    _show(result, console)
    console.print(f"written: {', '.join(map(str, files))}")
    below = {} if floor is None else result.below(floor)
    if below:
        where = ", ".join(f"{ratio:.2f}x at concurrency {concurrency}" for concurrency, ratio in below.items())
        print(f"lrq-server: below the floor of {floor:g}x: {where}.", file=sys.stderr)
    return 1 if below else 0


def _settings(parsed: argparse.Namespace) -> BenchSettings:
    from_file = parsed.prompts not in (RANDOM, SHARED_PREFIX)
    if from_file and parsed.input_tokens is not None:
        raise SettingsError("--input-tokens is for prompts that are made. Those of a file are sent as they are: leave it out.")
    lengths = {} if parsed.input_tokens is None else {"input_tokens": parsed.input_tokens}
    return BenchSettings(
        concurrency=tuple(parsed.concurrency),
        output_tokens=parsed.output_tokens,
        requests_per_level=parsed.requests_per_level,
        prompts=Path(parsed.prompts) if from_file else parsed.prompts,
        seed=secrets.randbelow(2**31) if parsed.seed is None else parsed.seed,
        **lengths,
    )


def _prompts_of_file(path: Path) -> list[str]:
    if find_spec("pandas") is None:
        raise SettingsError("vLLM's load generator reads files of prompts with pandas, which is not here: pip install pandas.")
    return read_prompts(path)


def _check_combinations(parsed: argparse.Namespace, vllm_options: Sequence[str]) -> None:
    if parsed.auto:
        for option in ("baseline", "model", "baseline_model"):
            if getattr(parsed, option) is not None:
                name = option.replace("_", "-")
                raise SettingsError(f"--{name} is for servers that are running. --auto starts its own: leave --{name} out.")
        for model in parsed.auto:
            check_model(model)
        check_options(vllm_options)
        return
    if vllm_options:
        raise SettingsError(f"{vllm_options[0]} after -- is for servers that --auto starts. The one at --url is running.")
    for option in ("floor", "baseline_model"):
        if getattr(parsed, option) is not None and parsed.baseline is None:
            name = option.replace("_", "-")
            raise SettingsError(f"--{name} needs a baseline. Give one with --baseline URL, or use --auto MODEL BASELINE.")


def _measure_running(
    parsed: argparse.Namespace,
    settings: BenchSettings,
    prompts: Sequence[str] | None,
    vllm_options: Sequence[str],
    console: Console,
) -> dict[str, Measured]:
    endpoints = {_MODEL: find_endpoint(parsed.url, parsed.model)}
    if parsed.baseline is not None:
        endpoints[_BASELINE] = find_endpoint(parsed.baseline, parsed.baseline_model, "--baseline-model")
    tokenizer = parsed.tokenizer or endpoints[_MODEL].tokenizer()
    for endpoint in endpoints.values():
        endpoint.check_fits(settings.most_tokens)
    if endpoints.get(_BASELINE) == endpoints[_MODEL]:
        raise SettingsError(
            f"The baseline {endpoints[_MODEL].url} is the server to be measured: the second time it would have the prompts in "
            "its prefix cache. Give the URL of another one."
        )
    new_folder(parsed.out)
    return sweep(endpoints, tokenizer, settings, prompts, parsed.out, console.print)


def _measure_own(
    parsed: argparse.Namespace,
    settings: BenchSettings,
    prompts: Sequence[str] | None,
    vllm_options: Sequence[str],
    console: Console,
) -> dict[str, Measured]:
    new_folder(parsed.out)
    measured: dict[str, Measured] = {}
    tokenizer = parsed.tokenizer
    for role, model in zip((_MODEL, _BASELINE), parsed.auto, strict=True):
        log = parsed.out / f"server-{role}.log"
        console.print(f"starting a server of {model} (log: {log})")
        with served(model, log, vllm_options) as endpoint:
            tokenizer = tokenizer or endpoint.tokenizer()
            endpoint.check_fits(settings.most_tokens)
            measured |= sweep({role: endpoint}, tokenizer, settings, prompts, parsed.out, console.print)
    return measured


def _about(parsed: argparse.Namespace, vllm_options: Sequence[str]) -> dict[str, str]:
    """How the numbers were made, beside the settings. The machine is known only where the servers run here."""
    about = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "lrq": version("lrq")}
    try:
        about["load_generator"] = f"vllm bench serve, vLLM {version('vllm')}"
    except PackageNotFoundError:  # the vllm command on PATH is of another environment
        about["load_generator"] = f"vllm bench serve at {vllm_program()}"
    about["python"] = platform.python_version()
    if parsed.auto:
        # The servers have ended, so that this takes no memory from them.
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        about["machine"] = ", ".join(gpus) or str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
        about["server_options"] = " ".join(vllm_options) or "none"
    return about


def _notes(measured: Mapping[str, Measured], settings: BenchSettings, prompts: Sequence[str] | None) -> tuple[str, ...]:
    """What a reader should know before comparing numbers."""
    notes = []
    total = sum(settings.requests(level) for level in settings.concurrency)
    if prompts is not None and len(prompts) < total:
        notes.append(
            f"{settings.prompts} has {len(prompts)} prompts for {total} requests: some are asked again, and a server that "
            "caches prefixes does not read them again."
        )
    for role, one in measured.items():
        short = [point for point in one.points if point.output_tokens < point.requests * settings.output_tokens]
        if short:
            levels = ", ".join(str(point.concurrency) for point in short)
            notes.append(
                f"The {role} ended answers before {settings.output_tokens} tokens (concurrency {levels}), although told to go "
                "on: its tokens/s are of shorter answers."
            )
    return tuple(notes)


def _show(result: BenchResult, console: Console) -> None:
    table = Table("concurrency", "server", box=None)
    for heading in ("output tokens/s", "ratio", "TTFT p50 ms", "p99", "ITL p50 ms", "p99"):
        table.add_column(heading, justify="right")
    ratios = result.ratios()
    for index, concurrency in enumerate(result.settings.concurrency):
        for one in result.measured():
            point = one.points[index]
            ratio = f"{ratios[concurrency]:.2f}x" if ratios and one is result.model else ""
            latencies = [f"{point.latency_ms[name][percentile]:,.1f}" for name in ("ttft", "itl") for percentile in (50, 99)]
            table.add_row(str(concurrency), result.label(one), f"{point.output_tokens_per_s:,.1f}", ratio, *latencies)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}")
