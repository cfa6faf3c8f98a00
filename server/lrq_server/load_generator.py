"""One measurement by ``vllm bench serve``, vLLM's own load generator: what it is told, and what it wrote.

Its options here are those that vLLM 0.25 to 0.33 have in common.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrq_server.bench_settings import RANDOM, SHARED_PREFIX, BenchSettings
from lrq_server.endpoint import Endpoint
from lrq_server.load_process import LoadGenerator
from lrq_server.vllm_process import log_end
from lrq_vllm.errors import LrqError

__all__ = ["METRICS", "PERCENTILES", "Point", "load_arguments", "measure", "read_point"]

# By our name, the load generator's, and in words.
METRICS: Mapping[str, tuple[str, str]] = {
    "ttft": ("ttft", "time to first token"),
    "itl": ("itl", "time between tokens"),
    "tpot": ("tpot", "time per output token after the first"),
    "e2e": ("e2el", "time of a whole request"),
}
PERCENTILES = (50, 95, 99)
_LEAST_WARM_UPS = 4  # a new server compiles something in more than one of its first requests


@dataclass(frozen=True)
class Point:
    """What one server did at one concurrency. latency_ms: by name of METRICS and percentile."""

    concurrency: int
    requests: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    latency_ms: Mapping[str, Mapping[int, float]]


def load_arguments(
    endpoint: Endpoint, tokenizer: str, settings: BenchSettings, concurrency: int, prompts: Path | None, result: Path
) -> list[str]:
    """What comes after ``vllm bench serve``. prompts: of this level, in the generator's form, if they come from a file.

    The warm-up sends the first prompt once for each concurrent place.
    """
    if settings.prompts == RANDOM:
        data = [
            "--dataset-name", "random", "--random-input-len", str(settings.input_tokens),
            "--random-output-len", str(settings.output_tokens), "--random-range-ratio", "0",
        ]  # fmt: skip
    elif settings.prompts == SHARED_PREFIX:
        own = max(1, settings.input_tokens // 4)
        data = [
            "--dataset-name", "prefix_repetition", "--prefix-repetition-num-prefixes", "1",
            "--prefix-repetition-prefix-len", str(settings.input_tokens - own),
            "--prefix-repetition-suffix-len", str(own), "--prefix-repetition-output-len", str(settings.output_tokens),
        ]  # fmt: skip
    else:
        data = [
            "--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-shuffle", "--skip-chat-template",
            "--custom-output-len", str(settings.output_tokens),
        ]  # fmt: skip
    return [
        "--backend", "openai", "--base-url", endpoint.url, "--endpoint", "/v1/completions",
        "--model", endpoint.model, "--tokenizer", tokenizer, *data,
        "--num-prompts", str(settings.requests(concurrency)), "--max-concurrency", str(concurrency),
        "--num-warmups", str(max(_LEAST_WARM_UPS, concurrency)), "--ready-check-timeout-sec", "0",
        "--ignore-eos", "--temperature", "0", "--seed", str(settings.level_seed(concurrency)),
        "--percentile-metrics", ",".join(theirs for theirs, _ in METRICS.values()),
        "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        "--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name,
        "--disable-tqdm",
    ]  # fmt: skip


def measure(
    generator: LoadGenerator,
    endpoint: Endpoint,
    tokenizer: str,
    settings: BenchSettings,
    concurrency: int,
    prompts: Path | None,
    result: Path,
) -> Point:
    """Run the load generator and read what it wrote to ``result``; its output goes to a .log beside it.

    Raises LrqError if it fails, with its last lines, or if a request failed.
    """
    log = result.with_suffix(".log")
    log.touch()
    code = generator.run(load_arguments(endpoint, tokenizer, settings, concurrency, prompts, result), log)
    if code != 0 or not result.exists():
        raise LrqError(f"`vllm bench serve` ended with code {code} and no result. {log} ends:\n{log_end(log)}")
    whole = settings.output_tokens if endpoint.server is not None else None
    return read_point(result, endpoint.url, settings.requests(concurrency), concurrency, whole)


def read_point(result: Path, url: str, requests: int, concurrency: int, whole: int | None) -> Point:
    """A file that ``vllm bench serve --save-result --save-detailed`` wrote. url: for messages. whole: tokens of an answer that
    did not break off; None for a server that may end it earlier.

    Raises LrqError if not each of the requests was answered, with the first error, or if the file is of another form.
    """
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
        completed = int(found["completed"])
        if completed != requests:
            raise LrqError(
                f"{requests - completed} of {requests} requests to {url} failed at concurrency {concurrency}: "
                f"{_first_error(found)}. A number without them would be wrong, so nothing is written. See the server's log "
                f"and {result.with_suffix('.log')}."
            )
        lengths = [int(tokens) for tokens in found["output_lens"]]
        broken_off = sum(tokens < (whole or 1) for tokens in lengths)
        if broken_off:
            raise LrqError(
                f"{broken_off} of {requests} answers of {url} broke off at concurrency {concurrency}, after {min(lengths)} "
                f"tokens of {whole or 'at least 1'}. A number with them would be wrong, so nothing is written. See the "
                "server's log."
            )
        return Point(
            concurrency=concurrency,
            requests=completed,
            duration_s=float(found["duration"]),
            input_tokens=int(found["total_input_tokens"]),
            output_tokens=int(found["total_output_tokens"]),
            output_tokens_per_s=float(found["output_throughput"]),
            requests_per_s=float(found["request_throughput"]),
            latency_ms={
                name: {percentile: float(found[f"p{percentile}_{theirs}_ms"]) for percentile in PERCENTILES}
                for name, (theirs, _) in METRICS.items()
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LrqError(
            f"{result} is not what lrq knows of `vllm bench serve` ({error!r}). Use vLLM 0.25 to 0.33 for the measurement."
        ) from error


def _first_error(found: Mapping[str, Any]) -> str:
    """The last line of the first error, which may be a traceback."""
    errors = [str(error).strip() for error in found.get("errors", []) if error]
    return errors[0].splitlines()[-1] if errors else "no reason given"
