"""Logs as one JSON object per line: vLLM's, uvicorn's and ours, in all of vLLM's processes.

vLLM's processes configure their logging from the file that VLLM_LOGGING_CONFIG_PATH names; it is written here.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lrq_vllm.errors import SettingsError

__all__ = ["JsonLineHandler", "json_logs", "logging_config"]

_VARIABLE = "VLLM_LOGGING_CONFIG_PATH"


class JsonLineHandler(logging.Handler):
    """Writes to standard output past sys.stdout, whose lines some versions of vLLM begin with a process's name.

    A record's ``fields`` (logging's ``extra``) become keys beside time, level, logger, process and message.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps(line, default=str)

    def emit(self, record: logging.LogRecord) -> None:
        """In one call of the system, so that lines of several processes do not mix."""
        try:
            os.write(1, f"{self.format(record)}\n".encode())
        except Exception:
            self.handleError(record)


def logging_config(level: str) -> dict[str, Any]:
    """For logging.config.dictConfig. level: of vLLM and of us; uvicorn tells INFO, everybody else warnings."""
    handled = {"handlers": ["lrq_json"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"lrq_json": {"class": f"{__name__}.{JsonLineHandler.__name__}"}},
        "loggers": {"vllm": {**handled, "level": level}, "uvicorn": {**handled, "level": "INFO"}},
        "root": {"handlers": ["lrq_json"], "level": "WARNING"},
    }


@contextmanager
def json_logs() -> Iterator[None]:
    """Before vLLM is imported: for as long as the block lasts its processes log like this.

    Raises SettingsError if the environment configures logging otherwise.
    """
    if os.environ.get(_VARIABLE):
        raise SettingsError(
            f"{_VARIABLE} configures logging, and so does --log-format json. Unset it, or leave the option out."
        )
    with tempfile.TemporaryDirectory(prefix="lrq-logs-") as folder:
        path = Path(folder, "logging.json")
        path.write_text(json.dumps(logging_config(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())))
        os.environ[_VARIABLE] = str(path)
        try:
            yield
        finally:
            del os.environ[_VARIABLE]
