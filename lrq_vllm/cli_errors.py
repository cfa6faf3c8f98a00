"""Under vLLM's own command line an LrqError is one paragraph and exit code 2, as under ours, and not a traceback."""

import sys
from pathlib import Path
from types import TracebackType

from lrq_vllm.errors import LrqError

__all__ = ["show_lrq_errors_plainly"]

_installed = False


def show_lrq_errors_plainly() -> None:
    """In the ``vllm`` command's main process, hand uncaught LrqErrors to the user. Elsewhere this does nothing."""
    global _installed
    if _installed or Path(sys.argv[0]).name != "vllm":
        return
    _installed = True
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, LrqError):
            previous(kind, error, traceback)
            return
        print(f"vllm: {error}", file=sys.stderr)
        raise SystemExit(2)  # the interpreter takes the exit code from here

    sys.excepthook = hook
