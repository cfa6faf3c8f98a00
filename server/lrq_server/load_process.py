"""A process that runs vLLM's load generator for one measurement after the other: to import it takes longer than most of them.

Each line of its input is JSON: the arguments of ``vllm bench serve``, and the file that takes all output. The answer to each
is a line with an exit code.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

_OUTPUTS = (1, 2)  # of the process and of whatever it calls


def main() -> None:
    """Until the input ends."""
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
