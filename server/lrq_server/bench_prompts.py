"""Prompts from a file: read, and dealt out to the concurrency levels."""

import json
from collections.abc import Sequence
from pathlib import Path

from lrq_server.bench_settings import BenchSettings
from lrq_vllm.errors import SettingsError

__all__ = ["prompts_of_level", "read_prompts", "write_prompts"]

_RECORD = 'Give each line a JSON object with "prompt" (or "text"), a string that is not blank.'


def read_prompts(path: Path) -> list[str]:
    """The ``prompt``, else the ``text``, of every line of a .jsonl file.

    Raises SettingsError, naming the line, if the file cannot be read, holds no prompt or a line without one.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The prompts {path} cannot be read ({error}). --prompts takes random, shared-prefix or a .jsonl file."
        ) from error
    # Not splitlines: JSON allows other line separators inside a string.
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise SettingsError(f"The prompts {path} are empty. {_RECORD}")
    return [_prompt(line, f"{path}, line {number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{where}: not a JSON object ({error}). {_RECORD}") from error
    prompt = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise SettingsError(f"{where}: no prompt. {_RECORD}")
    return prompt


def prompts_of_level(prompts: Sequence[str], settings: BenchSettings, concurrency: int) -> list[str]:
    """As many as the level has requests, from where the level before ended, and from the beginning again after the last."""
    before = sum(settings.requests(level) for level in settings.concurrency if level < concurrency)
    return [prompts[(before + index) % len(prompts)] for index in range(settings.requests(concurrency))]


def write_prompts(prompts: Sequence[str], path: Path) -> None:
    """In the form that vLLM's load generator reads."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
