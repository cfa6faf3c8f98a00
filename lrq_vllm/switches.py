"""Environment variables that switch something on."""

import os

from lrq_vllm.errors import SettingsError

__all__ = ["is_on"]


def is_on(variable: str, purpose: str) -> bool:
    """Whether it is 1. purpose: what 1 is for, for the message. Raises SettingsError for a value that is neither 0 nor 1."""
    given = os.environ.get(variable) or "0"
    if given not in ("0", "1"):
        raise SettingsError(f"{variable} is {given!r}: give 1 {purpose}, or unset it.")
    return given == "1"
