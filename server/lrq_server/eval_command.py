"""lrq-server eval: what quantization cost, as a client sees it: through the servers that will serve."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from lrq_server.eval_result import show, write_json
from lrq_server.evaluation import Evaluation
from lrq_server.jsonl_texts import read_texts
from lrq_server.lm_eval_tasks import TaskSettings, check_installed
from lrq_server.measured_servers import (
    add_options,
    check_combinations,
    measure_own,
    needs_baseline,
    running_endpoints,
)
from lrq_server.prompt_scores import ScoreSettings
from lrq_server.result_folder import ResultFolder
from lrq_server.told_to_stop import interrupted_when_told
from lrq_vllm.errors import SettingsError

__all__ = ["add_to"]

_ABOUT = """Quality through the served path: the servers read held-out text (vLLM's prompt_logprobs, over HTTP), and with
--tasks lm-eval asks them. With a baseline: how much of its quality is left."""

_EXAMPLES = """examples:
  lrq-server eval --url http://127.0.0.1:8000 --texts heldout.jsonl
  lrq-server eval --url http://127.0.0.1:8000 --baseline http://127.0.0.1:8001 --texts heldout.jsonl --min-recovery 0.99
  lrq-server eval --auto ./Llama-3-8B-lrq-w4a16 ./Llama-3-8B --texts heldout.jsonl --tasks arc_easy hellaswag

recovery is the baseline's perplexity divided by the model's, on the same windows of the same tokens.
Exit code 1: recovery below --min-recovery. Exit code 2: something to put right, as a request that failed.
"""
_JSON, _TASKS = "eval.json", "lm-eval"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    command = commands.add_parser(
        "eval",
        help="measure the quality of one or two servers",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(command)
    default = ScoreSettings()
    command.add_argument("--texts", type=Path, metavar="FILE.jsonl", help="held-out text: the text of each line is read")
    command.add_argument("--windows", type=int, metavar="N", help="windows to take, spread over the text (default: all)")
    command.add_argument(
        "--seq-len", type=int, metavar="N", default=default.seq_len, help="tokens per window (default: %(default)s)"
    )
    command.add_argument(
        "--top-logprobs", type=int, metavar="N", default=default.top_logprobs,
        help="most likely tokens to compare at each place, up to the server's --max-logprobs (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--concurrency", type=int, metavar="N", default=default.concurrency, help="requests at a time (default: %(default)s)"
    )
    command.add_argument(
        "--min-recovery", type=float, metavar="0.99", help="exit with 1 if the recovery (see below) is smaller"
    )
    command.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of lm-eval, which must be installed (extra eval)")
    command.add_argument("--tasks-folder", type=Path, metavar="DIR", help="with tasks of your own, in lm-eval's YAML")
    command.add_argument("--tasks-limit", type=int, metavar="N", help="documents of each task (default: all)")
    command.add_argument("--fewshot", type=int, metavar="N", help="examples in each prompt (default: as the task says)")
    command.add_argument("--tokenizer", metavar="DIR", help="what lm-eval counts tokens with (default: that of the model)")
    command.add_argument("--out", type=Path, metavar="DIR", default=Path("lrq-eval"), help="default: ./%(default)s")
    command.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in DIR")
    command.set_defaults(run=_run, hands_on_unknown=False)


@interrupted_when_told()
def _run(parsed: argparse.Namespace, vllm_options: list[str]) -> int:
    settings = ScoreSettings(parsed.seq_len, parsed.windows, parsed.top_logprobs, parsed.concurrency)
    tasks = _task_settings(parsed)
    _check(parsed, vllm_options)
    texts = None if parsed.texts is None else read_texts(parsed.texts, "texts", "--texts takes a .jsonl file.")
    folder = ResultFolder(parsed.out, "an evaluation", (_JSON,), _TASKS)
    folder.check(overwrite=parsed.overwrite)
    # Into a file or a pipe the table goes without broken lines.
    console = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 120)
    evaluation = Evaluation(texts, settings, tasks, parsed.tokenizer, folder.path / _TASKS, console)
    if parsed.auto:
        folder.begin()
        found = measure_own(parsed, vllm_options, parsed.out, evaluation.measure, console.print)
    else:
        endpoints = running_endpoints(parsed)
        folder.begin()
        found = {role: evaluation.measure(role, endpoint) for role, endpoint in endpoints.items()}
    about = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "lrq": version("lrq")}
    if parsed.auto:
        about["server_options"] = " ".join(vllm_options) or "none"
    result = evaluation.result(found, about, _recorded(parsed))
    show(result, console)
    console.print(f"written: {', '.join(map(str, folder.write({_JSON: partial(write_json, result)})))}")
    recovery = None if result.comparison is None else result.comparison.recovery
    if recovery is not None and parsed.min_recovery is not None and not recovery.value >= parsed.min_recovery:
        print(
            f"lrq-server: recovery {recovery.value:.4f} (95% interval {recovery.low:.4f} to {recovery.high:.4f}) is below "
            f"--min-recovery {parsed.min_recovery:g}.", file=sys.stderr,
        )  # fmt: skip
        return 1
    return 0


def _task_settings(parsed: argparse.Namespace) -> TaskSettings | None:
    if parsed.tasks is None:
        for option in ("tasks_folder", "tasks_limit", "fewshot", "tokenizer"):
            if getattr(parsed, option) is not None:
                raise SettingsError(f"--{option.replace('_', '-')} is for tasks: name them with --tasks, or leave it out.")
        return None
    check_installed()
    return TaskSettings(tuple(parsed.tasks), parsed.tasks_folder, parsed.tasks_limit, parsed.fewshot, parsed.concurrency)


def _check(parsed: argparse.Namespace, vllm_options: Sequence[str]) -> None:
    if parsed.texts is None and parsed.tasks is None:
        raise SettingsError("Nothing to evaluate on: give held-out text with --texts FILE.jsonl, or --tasks, or both.")
    check_combinations(parsed, vllm_options)
    if parsed.min_recovery is not None:
        needs_baseline(parsed, "--min-recovery")
        if parsed.texts is None:
            raise SettingsError("--min-recovery is about perplexity, which needs held-out text: give --texts FILE.jsonl.")
        if not 0 < parsed.min_recovery < float("inf"):
            raise SettingsError(f"--min-recovery {parsed.min_recovery:g} is not a ratio of perplexities. Write it like 0.99.")


def _recorded(parsed: argparse.Namespace) -> dict[str, str | int | float | None]:
    """The options that decide about numbers, for eval.json."""
    settings: dict[str, str | int | float | None] = {"texts": None if parsed.texts is None else str(parsed.texts)}
    for option in ("seq_len", "windows", "top_logprobs", "min_recovery", "tasks_limit", "fewshot"):
        settings[option] = getattr(parsed, option)
    return settings | {"tasks": " ".join(parsed.tasks or ()) or None}
