"""What tests of ``lrq-server bench`` share: a recorded run of the load generator, and results made up from it."""

from dataclasses import replace
from pathlib import Path

from lrq_server.bench_result import BenchResult, Measured
from lrq_server.bench_settings import BenchSettings
from lrq_server.endpoint import Endpoint
from lrq_server.load_generator import Point, read_point

# `vllm bench serve` 0.32.0+cpu: 4 requests of 32 + 8 tokens, 2 at a time, to a w8a8 checkpoint of the tiny model.
RECORDED = Path(__file__).parent / "data" / "vllm-bench-good.json"
# The same with prompts of 600 tokens to a server that takes 512.
RECORDED_FAILURE = Path(__file__).parent / "data" / "vllm-bench-failed.json"
REQUESTS, CONCURRENCY = 4, 2


def recorded_point() -> Point:
    return read_point(RECORDED, "http://a", REQUESTS, CONCURRENCY, None)


def a_result(levels: tuple[int, ...] = (1, 4, 16), faster: float | None = 1.5, name: str = "tiny-w8a8") -> BenchResult:
    """The recorded point at each level, the baseline's tokens/s divided by ``faster``; None for no baseline."""
    points = tuple(
        replace(recorded_point(), concurrency=level, output_tokens_per_s=100.0 * level) for level in levels
    )  # fmt: skip
    slower = tuple(replace(point, output_tokens_per_s=point.output_tokens_per_s / (faster or 1)) for point in points)
    settings = BenchSettings(levels, input_tokens=32, output_tokens=8, requests_per_level=max(levels))
    return BenchResult(
        settings,
        about={"date": "2026-01-02T03:04:05+00:00", "lrq": "0.1.0"},
        model=Measured(Endpoint("http://a", f"models/{name}", None, 512, "vLLM 0.32.0"), points),
        baseline=None if faster is None else Measured(Endpoint("http://b", "models/tiny", None, 512, None), slower),
        notes=(),
    )
