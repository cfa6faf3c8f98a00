"""What can go wrong in a way that the user can put right. One base class, four children, one paragraph each."""

from collections.abc import Sequence

__all__ = ["CalibrationDataError", "CheckpointError", "LrqError", "ModelFolderError", "SettingsError", "one_paragraph"]


class LrqError(Exception):
    """A problem that the user can fix. Its text says what failed, where, and what to do; the command line exits with 2.

    It is deliberately no ValueError: vLLM's pydantic models would wrap a ValueError in a validation report.
    """


class SettingsError(LrqError):
    """An option or a combination of options that cannot work."""


class ModelFolderError(LrqError):
    """The float model's folder is missing something, or holds a model that this tool does not know."""


class CalibrationDataError(LrqError):
    """The calibration or evaluation text cannot be used."""


class CheckpointError(LrqError):
    """An LRQ checkpoint is incomplete, inconsistent, or of a version that this code does not read."""


def one_paragraph(problems: Sequence[str], cure: str) -> str:
    """All problems and the way out, as one paragraph: ``a; b. cure``."""
    shown = list(problems[:8])
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return f"{'; '.join(shown)}. {cure}"
