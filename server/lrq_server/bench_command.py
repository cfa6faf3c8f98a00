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

from lrq_server.bench_folder import bench_folder, write_results
from lrq_server.bench_result import BenchResult, Measured
from lrq_server.bench_settings import RANDOM, SHARED_PREFIX, BenchSettings, parse_floor
from lrq_server.bench_sweep import sweep
from lrq_server.endpoint import Endpoint
from lrq_server.jsonl_texts import read_texts
from lrq_server.load_process import check_load_generator
from lrq_server.measured_servers import (
    BASELINE,
    MODEL,
    add_options,
    check_combinations,
    measure_own,
    needs_baseline,
    running_endpoints,
)
from lrq_server.told_to_stop import interrupted_when_told
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
_LENGTHS = "--input-tokens or --output-tokens"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    bench = commands.add_parser(
        "bench",
        help="measure the throughput of one or two servers",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(bench)
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


@interrupted_when_told()
def _run(parsed: argparse.Namespace, vllm_options: list[str]) -> int:
    settings = _settings(parsed)
    prompts = _prompts_of_file(settings.prompts) if isinstance(settings.prompts, Path) else None
    floor = None if parsed.floor is None else parse_floor(parsed.floor)
    check_combinations(parsed, vllm_options)
    if parsed.floor is not None:
        needs_baseline(parsed, "--floor")
    check_load_generator()
    bench_folder(parsed.out).check(overwrite=parsed.overwrite)
    # Into a file or a pipe the table goes without broken lines.
    console = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 120)
    measured = (_measure_own if parsed.auto else _measure_running)(parsed, settings, prompts, vllm_options, console)
    result = BenchResult(
        settings=settings,
        about=_about(parsed, vllm_options),
        model=measured[MODEL],
        baseline=measured.get(BASELINE),
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
    return read_texts(path, "prompts", "--prompts takes random, shared-prefix or a .jsonl file.")


def _measure_running(
    parsed: argparse.Namespace,
    settings: BenchSettings,
    prompts: Sequence[str] | None,
    vllm_options: Sequence[str],
    console: Console,
) -> dict[str, Measured]:
    endpoints = running_endpoints(parsed)
    tokenizer = parsed.tokenizer or endpoints[MODEL].tokenizer()
    for endpoint in endpoints.values():
        endpoint.check_fits(settings.most_tokens, _LENGTHS)
    if endpoints.get(BASELINE) == endpoints[MODEL]:
        raise SettingsError(
            f"The baseline {endpoints[MODEL].url} is the server to be measured: the second time it would have the prompts in "
            "its prefix cache. Give the URL of another one."
        )
    bench_folder(parsed.out).begin()
    return sweep(endpoints, tokenizer, settings, prompts, parsed.out, console.print)


def _measure_own(
    parsed: argparse.Namespace,
    settings: BenchSettings,
    prompts: Sequence[str] | None,
    vllm_options: Sequence[str],
    console: Console,
) -> dict[str, Measured]:
    bench_folder(parsed.out).begin()
    tokenizer = parsed.tokenizer

    def measure(role: str, endpoint: Endpoint) -> Measured:
        nonlocal tokenizer
        tokenizer = tokenizer or endpoint.tokenizer()
        endpoint.check_fits(settings.most_tokens, _LENGTHS)
        return sweep({role: endpoint}, tokenizer, settings, prompts, parsed.out, console.print)[role]

    return measure_own(parsed, vllm_options, parsed.out, measure, console.print)


def _about(parsed: argparse.Namespace, vllm_options: Sequence[str]) -> dict[str, str]:
    """How the numbers were made, beside the settings. The machine is known only where the servers run here."""
    about = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "lrq": version("lrq")}
    try:
        about["load_generator"] = f"vllm bench serve, vLLM {version('vllm')}"
    except PackageNotFoundError:  # a build that does not call itself vllm
        about["load_generator"] = "vllm bench serve"
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
