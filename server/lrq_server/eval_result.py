"""The result of ``lrq-server eval``: on the screen and as eval.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lrq_server.endpoint import Endpoint
from lrq_server.lm_eval_tasks import TaskScore
from lrq_server.measured_servers import BASELINE, MODEL
from lrq_server.served_quality import Comparison, Estimate

__all__ = ["EvalResult", "Evaluated", "show", "write_json"]


@dataclass(frozen=True)
class Evaluated:
    """One server: what it said of itself, its perplexity if a text was read, its scores if tasks were run."""

    endpoint: Endpoint
    perplexity: Estimate | None
    tasks: tuple[TaskScore, ...] = ()


@dataclass(frozen=True)
class EvalResult:
    """about, settings: how it was made. tokens: that were predicted, in how many windows; 0 without a text."""

    about: Mapping[str, str]
    settings: Mapping[str, Any]
    windows: int
    tokens: int
    model: Evaluated
    baseline: Evaluated | None = None
    comparison: Comparison | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def write_json(result: EvalResult, path: Path) -> None:
    """Everything, numbers as they were computed; intervals are of 95%."""
    path.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def show(result: EvalResult, console: Console) -> None:
    """A table for the text, one for the tasks, and the notes."""
    if result.model.perplexity is not None:
        console.print(_of_text(result))
    if result.model.tasks:
        console.print(_of_tasks(result))
    for note in result.notes:
        console.print(f"note: {note}")


def _of_text(result: EvalResult) -> Table:
    table = Table(f"on {result.tokens:,} tokens", box=None)
    for heading in ("value", "95% interval"):
        table.add_column(heading, justify="right")

    def add(name: str, estimate: Estimate, form: str) -> None:
        table.add_row(name, form.format(estimate.value), f"{form.format(estimate.low)} to {form.format(estimate.high)}")

    for role, one in ((MODEL, result.model), (BASELINE, result.baseline)):
        if one is not None and one.perplexity is not None:
            add(f"perplexity of the {role} {one.endpoint.short_name}", one.perplexity, "{:.3f}")
    if result.comparison is not None:
        add("recovery (perplexity of the baseline / of the model)", result.comparison.recovery, "{:.4f}")
        add("KL(baseline || model) at least, nats", result.comparison.kl_at_least, "{:.4f}")
        add("same most likely token", result.comparison.top1, "{:.2%}")
    return table


def _of_tasks(result: EvalResult) -> Table:
    table = Table("task", "metric", box=None)
    for heading in (MODEL, *((BASELINE,) if result.baseline is not None else ())):
        table.add_column(heading, justify="right")
    theirs = {} if result.baseline is None else {(score.task, score.metric): score for score in result.baseline.tasks}
    for score in result.model.tasks:
        row = [_in_words(score)]
        if result.baseline is not None:
            row.append(_in_words(theirs[score.task, score.metric]))
        table.add_row(score.task, score.metric, *row)
    return table


def _in_words(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
