"""How many columns of a low-rank correction are served. They stand in the order of what they correct: the first are best."""

import os

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError

__all__ = ["VARIABLE", "check_rank", "served_rank"]

VARIABLE = "LRQ_CORRECTION_RANK"
_ALL = "all"


def served_rank() -> int | None:
    """At most so many columns of each module, 0 for none; None for all that the checkpoint has.

    Raises SettingsError for a value of the variable that is neither a number nor "all".
    """
    given = os.environ.get(VARIABLE) or _ALL
    if given == _ALL:
        return None
    if not given.isdecimal():
        raise SettingsError(f"{VARIABLE} is {given!r}: give a whole number of columns (0 for no correction), or {_ALL!r}.")
    return int(given)


def check_rank(manifest: Manifest) -> None:
    """Raises SettingsError if the variable asks for columns of a checkpoint that has none, or is no number."""
    if served_rank() is not None and manifest.correction is None:
        raise SettingsError(
            f"{VARIABLE} is {os.environ[VARIABLE]}, but this checkpoint has no low-rank correction: unset it, or quantize with "
            "--correction-rank."
        )
