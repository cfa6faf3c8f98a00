"""Every concurrency of every server, one measurement at a time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lrq_server.bench_folder import RAW
from lrq_server.bench_prompts import prompts_of_level, write_prompts
from lrq_server.bench_result import Measured
from lrq_server.bench_settings import BenchSettings
from lrq_server.endpoint import Endpoint
from lrq_server.load_generator import Point, measure
from lrq_server.load_process import load_generator

__all__ = ["sweep"]


def sweep(
    endpoints: Mapping[str, Endpoint],
    tokenizer: str,
    settings: BenchSettings,
    prompts: Sequence[str] | None,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Measured]:
    """By role, what each server did. Servers take turns, so that a machine that slows down slows all.

    tokenizer: one for all, so that they get the same prompts. prompts: of a file, else None. folder: of the bench.
    Raises LrqError as soon as a measurement fails.
    """
    (folder / RAW).mkdir(exist_ok=True)
    points: dict[str, list[Point]] = {role: [] for role in endpoints}
    with load_generator() as generator:
        for concurrency in settings.concurrency:
            file = None
            if prompts is not None:
                file = folder / RAW / f"prompts-{concurrency}.jsonl"
                write_prompts(prompts_of_level(prompts, settings, concurrency), file)
            for role, endpoint in endpoints.items():
                result = folder / RAW / f"{role}-{concurrency}.json"
                point = measure(generator, endpoint, tokenizer, settings, concurrency, file, result)
                points[role].append(point)
                say(
                    f"{role} {endpoint.short_name}, {concurrency} at a time: {point.output_tokens_per_s:,.1f} output tokens/s "
                    f"({point.requests} requests, {point.duration_s:.1f} s)"
                )
    return {role: Measured(endpoint, tuple(points[role])) for role, endpoint in endpoints.items()}
