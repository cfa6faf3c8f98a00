"""The tiny model, its held-out text, and its quantized forms, each made once per session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model

TINY = Path(__file__).parent / "models" / "tiny"
HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"
SCHEMES = ("w8a8", "w4a8", "w4a16", "w3a16")

# Enough for a checkpoint whose quality does not matter: seconds instead of a minute.
QUICK = {"iters": 2, "samples": 2, "seq_len": 32}

# Enough to beat round-to-nearest by far; at the defaults bench/quality.py measures. No test claims anything of w8a8's learning.
LEARNED = {"samples": 32}
ITERS = {"w8a8": 20}

Checkpoints = Callable[[str, str], Path]


def checkpoint_maker(folder: Path) -> Checkpoints:
    """(scheme, method) -> checkpoint."""

    @cache
    def make(scheme: str, method: str) -> Path:
        output = folder / f"{scheme}-{method}"
        quantize_model(TINY, output, QuantizeSettings(scheme, method, iters=ITERS.get(scheme, 50), **LEARNED))
        return output

    return make
