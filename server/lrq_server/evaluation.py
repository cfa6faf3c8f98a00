"""An evaluation of one server or two: the same windows of text and the same tasks for each, then all numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from lrq_server.endpoint import Endpoint
from lrq_server.eval_result import EvalResult, Evaluated
from lrq_server.lm_eval_tasks import TaskScore, TaskSettings, run_tasks
from lrq_server.measured_servers import BASELINE, MODEL
from lrq_server.prompt_scores import ScoreSettings, score, tokenize
from lrq_server.served_quality import Reported, compare, perplexity
from lrq_vllm.errors import SettingsError
from lrq_vllm.token_windows import spread_windows

__all__ = ["Answers", "Evaluation"]


@dataclass(frozen=True)
class Answers:
    """What one server answered: to the text, if there is one, and to the tasks."""

    endpoint: Endpoint
    reported: Reported | None
    scores: tuple[TaskScore, ...]


class Evaluation:
    """One text and the same tasks for all servers: the first that is measured makes the tokens, the others must agree."""

    def __init__(
        self,
        texts: Sequence[str] | None,
        settings: ScoreSettings,
        tasks: TaskSettings | None,
        tokenizer: str | None,
        task_folder: Path,
        console: Console,
    ) -> None:
        self._texts, self._settings, self._tasks = texts, settings, tasks
        self._tokenizer, self._task_folder, self._console = tokenizer, task_folder, console
        self._ids: list[int] | None = None
        self._windows: Tensor | None = None

    def measure(self, role: str, endpoint: Endpoint) -> Answers:
        """Everything that is asked of one server. Raises LrqError's children."""
        if self._tasks is not None:
            self._tokenizer = self._tokenizer or endpoint.tokenizer()  # before anything that takes long
        reported = None if self._texts is None else self._read(role, endpoint, self._texts)
        scores: tuple[TaskScore, ...] = ()
        if self._tasks is not None and self._tokenizer is not None:
            folder = self._task_folder / role
            self._console.print(f"lm-eval asks the {role} {endpoint.short_name} (log: {folder / 'lm-eval.log'})")
            scores = run_tasks(endpoint, self._tokenizer, self._tasks, folder)
        return Answers(endpoint, reported, scores)

    def _read(self, role: str, endpoint: Endpoint, texts: Sequence[str]) -> Reported:
        endpoint.check_fits(self._settings.seq_len + 1, "--seq-len")
        ids = tokenize(endpoint, texts)
        if self._ids is None or self._windows is None:
            self._ids = ids
            self._windows = spread_windows(ids, self._settings.windows, self._settings.seq_len)
            if len(self._windows) < 2:
                raise SettingsError(
                    f"The text is one window of {self._settings.seq_len} tokens, which has no interval. Give a longer text, or "
                    "shorter windows with --seq-len."
                )
        elif ids != self._ids:
            raise SettingsError(
                f"{endpoint.url} makes other tokens of the text than the first server: perplexities over different tokens "
                "cannot be compared. Compare models with the same tokenizer."
            )
        with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task(f"{role} {endpoint.short_name}", total=len(self._windows))
            reported = score(endpoint, self._windows, self._settings, lambda: progress.advance(bar))
        self._console.print(
            f"{role} {endpoint.short_name}: {len(self._windows)} windows of {self._settings.seq_len} tokens read"
        )
        return reported

    def result(
        self,
        found: Mapping[str, Answers],
        about: Mapping[str, str],
        settings: Mapping[str, Any],
    ) -> EvalResult:
        """Of what was measured of one or both servers."""
        evaluated = {
            role: Evaluated(one.endpoint, None if one.reported is None else perplexity(one.reported), one.scores)
            for role, one in found.items()
        }
        reports = {role: one.reported for role, one in found.items() if one.reported is not None}
        comparison = compare(reports[MODEL], reports[BASELINE]) if len(reports) == 2 else None
        notes = []
        if comparison is not None:
            notes.append(
                f"The KL divergence is not smaller than that, and how much larger is unknown: {comparison.kl_covers:.1%} of "
                "the baseline's probability is on tokens that both servers reported."
            )
        count = 0 if self._windows is None else len(self._windows)
        return EvalResult(
            about, settings, count, count * (self._settings.seq_len - 1), evaluated[MODEL], evaluated.get(BASELINE),
            comparison, notes,
        )  # fmt: skip
