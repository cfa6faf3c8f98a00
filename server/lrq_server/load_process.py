"""A process that runs vLLM's load generator for one measurement after the other: to import it takes longer than most of them.

Each line of its input is JSON: the arguments of ``vllm bench serve``, and the file that takes all output. The answer to each
is a line with an exit code.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrq_server.vllm_process import NO_VLLM
from lrq_vllm.errors import SettingsError
from lrq_vllm.vllm_environment import serving_environment

__all__ = ["LoadGenerator", "check_load_generator", "load_generator"]

_OUTPUTS = (1, 2)  # of the process and of whatever it calls


def check_load_generator() -> None:
    """Raises SettingsError if there is none in this Python environment."""
    if find_spec("vllm") is None:
        raise SettingsError(NO_VLLM)


class LoadGenerator:
    """The process, seen from the one that started it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, arguments: Sequence[str], log: Path) -> int:
        """``vllm bench serve`` with these arguments, its output in ``log``. Returns its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"arguments": arguments, "log": str(log)}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return self._process.wait()
        answer = self._process.stdout.readline()
        return int(answer) if answer else self._process.wait()


@contextmanager
def load_generator() -> Iterator[LoadGenerator]:
    """The process, which imports vLLM with its first measurement and ends with the block."""
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(command, text=True, env=serving_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield LoadGenerator(process)
    finally:
        process.terminate()
        process.communicate()


def main() -> None:
    """What the process does, until its input ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            job = json.loads(line)
            with Path(job["log"]).open("wb") as log:
                for output in _OUTPUTS:
                    os.dup2(log.fileno(), output)
            print(_exit_code(job["arguments"]), file=answers, flush=True)


def _exit_code(arguments: list[str]) -> int:
    try:
        _run(arguments)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _run(arguments: list[str]) -> None:
    # Here, so that what goes wrong in them is in the log.
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
