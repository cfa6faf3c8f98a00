"""What a logger was told, whatever its parents do: vLLM sets handlers of its own names when it is imported."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def records_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """Of INFO and above, as they come."""
    logger, kept = logging.getLogger(name), _Kept()
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    try:
        yield kept.records
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
