"""lrq_golden.json: a few short texts and what the reference path says of them, to compare a server with.

Rounding noise makes a right server differ by some hundredths of a nat on average (README.md has the numbers); a wrong shard, a
lost zero-point or another model's config by several.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lrq_vllm.errors import CheckpointError

__all__ = ["GOLDEN_NAME", "TOLERANCE", "GoldenText", "mean_difference", "read_golden", "write_golden"]

GOLDEN_NAME = "lrq_golden.json"
TOLERANCE = 0.4
"""Nats that log-probabilities may differ on average."""


@dataclass(frozen=True)
class GoldenText:
    """Token ids, and the natural logarithm of each one's probability but the first's, given those before it."""

    tokens: list[int]
    log_probabilities: list[float]


def write_golden(folder: Path, texts: Sequence[GoldenText]) -> None:
    """Write them beside a checkpoint's tensors."""
    (folder / GOLDEN_NAME).write_text(json.dumps({"texts": [asdict(text) for text in texts]}) + "\n")


def read_golden(folder: Path) -> list[GoldenText]:
    """Raises CheckpointError if the file is missing or damaged."""
    path = folder / GOLDEN_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {GOLDEN_NAME}, which says how it answers. Copy or quantize the model again.")
    try:
        texts = [
            GoldenText(list(text["tokens"]), list(text["log_probabilities"])) for text in json.loads(path.read_text())["texts"]
        ]
        if not texts or any(len(text.tokens) != len(text.log_probabilities) + 1 for text in texts):
            raise ValueError("no texts, or not a number for each token")
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Copy or quantize the model again.") from error
    return texts


def mean_difference(texts: Sequence[GoldenText], served: Sequence[Sequence[float]]) -> float:
    """Absolute difference in nats, on average over all tokens; ``served`` as ``log_probabilities``. NaN if a number is."""
    differences = [
        abs(number - wanted)
        for text, numbers in zip(texts, served, strict=True)
        for number, wanted in zip(numbers, text.log_probabilities, strict=True)
    ]
    return sum(differences) / len(differences)
