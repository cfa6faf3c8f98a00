"""lrq-server serve | bench | eval. A problem the user can fix is one paragraph on stderr and exit code 2."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from lrq_server import bench_command, eval_command, serve_command
from lrq_vllm.cli_errors import exit_code_of

__all__ = ["main"]

_EXAMPLES = """examples:
  lrq-server serve ./Llama-3-8B-lrq-w4a16
  lrq-server serve ./Llama-3-8B-lrq-w8a8 --port 8080 --tensor-parallel-size 2
  lrq-server bench --url http://127.0.0.1:8000
  lrq-server bench --auto ./Llama-3-8B-lrq-w8a8 ./Llama-3-8B --floor 1.3x -- --max-model-len 4096
  lrq-server eval --auto ./Llama-3-8B-lrq-w8a8 ./Llama-3-8B --texts heldout.jsonl --min-recovery 0.99
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 for a problem that the message tells how to fix."""
    parser = argparse.ArgumentParser(
        prog="lrq-server",
        description="Serve LRQ checkpoints with vLLM's OpenAI server, and measure servers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("lrq"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve_command.add_to(commands)
    bench_command.add_to(commands)
    eval_command.add_to(commands)
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    # parse_known_args keeps what it does not know in order: for `serve` that is vLLM's too.
    parsed, unknown = parser.parse_known_args(given[:at])
    if unknown and not parsed.hands_on_unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. Options for vLLM stand after --")
    return exit_code_of(lambda: int(parsed.run(parsed, [*unknown, *given[at + 1 :]])), "lrq-server")
