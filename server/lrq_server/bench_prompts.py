"""Prompts from a file, dealt out to the concurrency levels."""

import json
from collections.abc import Sequence
from pathlib import Path

from lrq_server.bench_settings import BenchSettings

__all__ = ["prompts_of_level", "write_prompts"]


def prompts_of_level(prompts: Sequence[str], settings: BenchSettings, concurrency: int) -> list[str]:
    """As many as the level has requests, from where the level before ended, and from the beginning again after the last."""
    before = sum(settings.requests(level) for level in settings.concurrency if level < concurrency)
    return [prompts[(before + index) % len(prompts)] for index in range(settings.requests(concurrency))]


def write_prompts(prompts: Sequence[str], path: Path) -> None:
    """In the form that vLLM's load generator reads."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
