"""What goes wrong is one paragraph on stderr and an exit code, not a traceback: under our command lines and under vLLM's."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from lrq_vllm.errors import LrqError

__all__ = ["exit_code_of", "show_lrq_errors_plainly"]

_NO_ROOM_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

_installed = False


def exit_code_of(work: Callable[[], int], program: str, interrupted: str = "interrupted.") -> int:
    """What ``work`` returns; 2 for a problem that the user can put right, 130 if interrupted, said in ``program``'s name."""
    try:
        return work()
    except LrqError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        cure = " Check the disk's free space and the folder's permissions." if error.errno in _NO_ROOM_OR_RIGHT else ""
        print(f"{program}: {error}.{cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: {interrupted}", file=sys.stderr)
        return 130


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
