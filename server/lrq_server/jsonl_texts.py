"""A .jsonl file of texts: prompts to be answered, or text to be read."""

import json
from pathlib import Path

from lrq_vllm.errors import SettingsError

__all__ = ["read_texts"]

_RECORD = 'Give each line a JSON object with "prompt" (or "text"), a string that is not blank.'


def read_texts(path: Path, what: str, instead: str) -> list[str]:
    """The ``prompt``, else the ``text``, of every line. what, instead: what the texts are, and what may be given, for messages.

    Raises SettingsError, naming the line, if the file cannot be read, holds no text or a line without one.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The {what} {path} cannot be read ({error}). {instead}") from error
    # Not splitlines: JSON allows other line separators inside a string.
    numbered = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise SettingsError(f"The {what} {path} are empty. {_RECORD}")
    return [_text(line, f"{path}, line {number}") for number, line in numbered]


def _text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where}: not a JSON object ({error}). {_RECORD}") from error
    text = record.get("prompt", record.get("text")) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise SettingsError(f"{where}: no prompt. {_RECORD}")
    return text
