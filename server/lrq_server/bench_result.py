"""The numbers of a bench, and the files that keep them: bench.json and bench.csv."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrq_server.bench_settings import BenchSettings
from lrq_server.endpoint import Endpoint
from lrq_server.load_generator import METRICS, PERCENTILES, Point

__all__ = ["BenchResult", "Measured", "write_csv", "write_json"]


@dataclass(frozen=True)
class Measured:
    """One server: what it said of itself, and a point for each concurrency, ascending."""

    endpoint: Endpoint
    points: tuple[Point, ...]


@dataclass(frozen=True)
class BenchResult:
    """A whole bench. about: date, versions, machine and whatever else a reader wants to know of how it was made."""

    settings: BenchSettings
    about: Mapping[str, str]
    model: Measured
    baseline: Measured | None
    notes: tuple[str, ...]

    def label(self, measured: Measured) -> str:
        """A name for tables and pictures that is not the other's."""
        name = measured.endpoint.short_name
        return f"{name} (baseline)" if measured is self.baseline else name

    def measured(self) -> tuple[Measured, ...]:
        """The model, then the baseline if there is one."""
        return (self.model,) if self.baseline is None else (self.model, self.baseline)

    def ratios(self) -> dict[int, float]:
        """By concurrency, output tokens/s of the model by those of the baseline; empty without a baseline."""
        if self.baseline is None:
            return {}
        return {
            ours.concurrency: ours.output_tokens_per_s / theirs.output_tokens_per_s
            for ours, theirs in zip(self.model.points, self.baseline.points, strict=True)
        }

    def below(self, floor: float) -> dict[int, float]:
        """The ratios that are smaller than the floor, by concurrency."""
        return {concurrency: ratio for concurrency, ratio in self.ratios().items() if ratio < floor}


def write_json(result: BenchResult, path: Path) -> None:
    """Everything, numbers as they were measured."""
    settings = asdict(result.settings) | {"prompts": str(result.settings.prompts)}
    settings["requests"] = {level: result.settings.requests(level) for level in result.settings.concurrency}
    content: dict[str, Any] = {
        "about": dict(result.about),
        "settings": settings,
        "model": asdict(result.model),
        "baseline": None if result.baseline is None else asdict(result.baseline),
        "ratio_of_output_tokens_per_s": result.ratios(),
        "notes": result.notes,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(result: BenchResult, path: Path) -> None:
    """A row for each server and concurrency; times in milliseconds."""
    table = io.StringIO()
    writer = csv.writer(table)
    latencies = [(name, percentile) for name in METRICS for percentile in PERCENTILES]
    writer.writerow(
        ["role", "model", "url", "concurrency", "requests", "duration_s", "input_tokens", "output_tokens"]
        + ["output_tokens_per_s", "ratio_to_baseline", "requests_per_s"]
        + [f"{name}_p{percentile}_ms" for name, percentile in latencies]
    )
    ratios = result.ratios()
    for measured in result.measured():
        is_model = measured is result.model
        for point in measured.points:
            writer.writerow(
                ["model" if is_model else "baseline", measured.endpoint.model, measured.endpoint.url]
                + [point.concurrency, point.requests, point.duration_s, point.input_tokens, point.output_tokens]
                + [point.output_tokens_per_s, ratios.get(point.concurrency, "") if is_model else "", point.requests_per_s]
                + [point.latency_ms[name][percentile] for name, percentile in latencies]
            )
    path.write_text(table.getvalue(), encoding="utf-8", newline="")
