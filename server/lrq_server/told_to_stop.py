"""Commands that end as after Ctrl-C when the system tells them to, so that what they started ends with them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupted_when_told"]


@contextmanager
def interrupted_when_told() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, but for one that is ignored (by nohup, for example)."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
