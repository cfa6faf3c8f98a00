"""Tasks of EleutherAI's lm-evaluation-harness, asked of a running server: ``lm_eval --model local-completions``, a child."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrq_server.endpoint import Endpoint
from lrq_server.vllm_process import log_end
from lrq_vllm.errors import LrqError, SettingsError

__all__ = ["TaskScore", "TaskSettings", "check_installed", "read_scores", "run_tasks", "tasks_command"]

_STDERR = "_stderr"


@dataclass(frozen=True)
class TaskSettings:
    """names: of tasks or groups. folder: more tasks of your own (lm-eval's --include_path). limit: documents of each, or all.

    fewshot: examples in each prompt, or as the task says. concurrency: requests at a time.
    """

    names: tuple[str, ...]
    folder: Path | None
    limit: int | None
    fewshot: int | None
    concurrency: int


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, with the standard error that lm-eval gives it, if any."""

    task: str
    metric: str
    value: float
    stderr: float | None


def check_installed() -> None:
    """Raises SettingsError if there is no lm-eval."""
    if find_spec("lm_eval") is None:
        raise SettingsError(
            "--tasks are run by lm-eval, which is not installed here. In a clone of lrq: pip install '.[eval]'."
        )


def tasks_command(endpoint: Endpoint, tokenizer: str, settings: TaskSettings, output: Path) -> list[str]:
    """The child's command line. Raises SettingsError for names that lm-eval's options cannot hold."""
    arguments = {
        "model": endpoint.model,
        "base_url": f"{endpoint.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": tokenizer,
        "num_concurrent": settings.concurrency,
        **({} if endpoint.max_model_len is None else {"max_length": endpoint.max_model_len}),
    }
    for name in ("model", "tokenizer"):
        if "," in str(arguments[name]):
            raise SettingsError(
                f"lm-eval separates its options with commas: the {name} {arguments[name]} cannot be told to it. Rename it."
            )
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--tasks", ",".join(settings.names), "--output_path", str(output),
    ]  # fmt: skip
    if settings.folder is not None:
        command += ["--include_path", str(settings.folder)]
    if settings.limit is not None:
        command += ["--limit", str(settings.limit)]
    if settings.fewshot is not None:
        command += ["--num_fewshot", str(settings.fewshot)]
    return command


def run_tasks(endpoint: Endpoint, tokenizer: str, settings: TaskSettings, output: Path) -> tuple[TaskScore, ...]:
    """Run the tasks; what lm-eval wrote and said goes into the folder ``output``. Raises LrqError with its last lines."""
    output.mkdir(parents=True)
    log = output / "lm-eval.log"
    command = tasks_command(endpoint, tokenizer, settings, output)
    with log.open("wb") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    written = sorted(output.rglob("results_*.json"))
    if code != 0 or not written:
        raise LrqError(f"lm-eval ended with code {code} and no result. {log} ends:\n{log_end(log)}")
    return read_scores(written[-1])


def read_scores(path: Path) -> tuple[TaskScore, ...]:
    """The metrics in a results_*.json of lm-eval's, as ``acc,none`` under ``results``. Raises LrqError for another form."""
    try:
        results: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
        return tuple(
            TaskScore(task, f"{metric} ({filtered})" if filtered != "none" else metric, float(value), stderr)
            for task, found in results.items()
            for (metric, _, filtered), value, stderr in (
                (key.partition(","), value, _number(found.get(key.replace(",", f"{_STDERR},", 1))))
                for key, value in found.items()
            )
            if filtered and not metric.endswith(_STDERR)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LrqError(f"{path} is not what lrq knows of lm-eval's results ({error!r}). Use lm-eval 0.4.9 or later.") from error


def _number(value: Any) -> float | None:
    """lm-eval writes N/A where a metric has no standard error."""
    return float(value) if isinstance(value, int | float) else None
