"""lrq_golden.json: a few short texts and what the reference path says of them, to compare a server with.

Rounding makes a right server differ: by hundredths of a nat on average where weights alone are quantized, by twenty times as
much where activations have 4 bits. A wrong shard, a lost zero-point or another model's config makes it several nats. What
rounding does is measured when a checkpoint is written, as what the reference path's own 16-bit roundings do: servers on a GPU
have been 0.96 to 1.24 times as far from the reference path as that is from itself without (served-agreement-two-h200.json).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lrq_vllm.errors import CheckpointError

__all__ = ["GOLDEN_NAME", "GoldenText", "GoldenTexts", "mean_difference", "read_golden", "write_golden"]

GOLDEN_NAME = "lrq_golden.json"
# Of rounding, that a server may be away from the reference path; and nats that it may be whatever rounding does.
_TIMES_ROUNDING = 3
_LEAST = 0.02
_EIGHT_BIT_CACHE = 0.3  # nats on top of that: fp8 keys and values have added up to 0.14


@dataclass(frozen=True)
class GoldenText:
    """Token ids, and the natural logarithm of each one's probability but the first's, given those before it."""

    tokens: list[int]
    log_probabilities: list[float]


@dataclass(frozen=True)
class GoldenTexts:
    """rounding: by how many nats the log-probabilities change, on average, where the reference path leaves the roundings of a
    bfloat16 server out.
    """

    texts: list[GoldenText]
    rounding: float

    def tolerance(self, *, eight_bit_cache: bool = False) -> float:
        """Nats by which a right server's log-probabilities may differ on average. eight_bit_cache: of keys and values."""
        return _LEAST + _TIMES_ROUNDING * self.rounding + (_EIGHT_BIT_CACHE if eight_bit_cache else 0)


def write_golden(folder: Path, golden: GoldenTexts) -> None:
    """Write them beside a checkpoint's tensors."""
    (folder / GOLDEN_NAME).write_text(json.dumps(asdict(golden)) + "\n")


def read_golden(folder: Path) -> GoldenTexts:
    """Raises CheckpointError if the file is missing or damaged."""
    path = folder / GOLDEN_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {GOLDEN_NAME}, which says how it answers. Copy or quantize the model again.")
    try:
        content = json.loads(path.read_text())
        texts = [
            GoldenText(list(map(int, text["tokens"])), list(map(float, text["log_probabilities"]))) for text in content["texts"]
        ]
        rounding = float(content["rounding"])
        if not 0 <= rounding < float("inf"):
            raise ValueError(f"rounding is {rounding}")
        if not texts or any(not 1 <= len(text.log_probabilities) == len(text.tokens) - 1 for text in texts):
            raise ValueError("no texts, or not a number for each token")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Copy or quantize the model again.") from error
    return GoldenTexts(texts, rounding)


def mean_difference(texts: Sequence[GoldenText], served: Sequence[Sequence[float]]) -> float:
    """Absolute difference in nats, on average over all tokens; ``served`` as ``log_probabilities``. NaN if a number is."""
    differences = [
        abs(number - wanted)
        for text, numbers in zip(texts, served, strict=True)
        for number, wanted in zip(numbers, text.log_probabilities, strict=True)
    ]
    return sum(differences) / len(differences)
