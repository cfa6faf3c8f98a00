"""lrq-server serve: check the checkpoint, then become ``vllm serve``, or with LRQ_SELFTEST=1 checked_server.py."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from lrq_server.vllm_process import vllm_command
from lrq_vllm.checkpoint import TensorFolder, check_tensors, read_manifest
from lrq_vllm.errors import LrqError
from lrq_vllm.kv_cache import CACHE_OPTION, cache_dtype
from lrq_vllm.layer_self_test import VARIABLE as SELF_TEST
from lrq_vllm.tensor_parallel import RANKS_OPTIONS, check_ranks
from lrq_vllm.vllm_environment import serving_environment

__all__ = ["main"]

_EXAMPLES = """examples:
  lrq-server serve ./Llama-3-8B-lrq-w4a16
  lrq-server serve ./Llama-3-8B-lrq-w8a8 --port 8080 --tensor-parallel-size 2

Options after MODEL are handed to vLLM as they are: see `vllm serve --help`. A checkpoint made with --kv-bits 8 is served with
8-bit keys and values unless --kv-cache-dtype says otherwise.

With LRQ_SELFTEST=1 in the environment each layer's kernel is compared with the reference while the server loads, and the texts
in the checkpoint are read before it answers anyone: it does not serve what differs.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 2 for a problem that the message tells how to fix; a good ``serve`` does not return."""
    parser = argparse.ArgumentParser(
        prog="lrq-server",
        description="Serve LRQ checkpoints with vLLM's OpenAI server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("lrq"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="check a checkpoint's files, then serve it")
    serve.add_argument("model", type=Path, help="LRQ checkpoint folder")
    serve.add_argument(
        *RANKS_OPTIONS, type=int, default=1, metavar="N", help="GPUs to cut the model for (default: %(default)s)"
    )
    # parse_known_args keeps what it does not know in order: everything else is vLLM's.
    parsed, vllm_options = parser.parse_known_args(arguments)
    try:
        manifest = read_manifest(parsed.model)
        check_tensors(TensorFolder(parsed.model), manifest)
        check_ranks(manifest, parsed.tensor_parallel_size)
        if parsed.tensor_parallel_size > 1:
            vllm_options += [RANKS_OPTIONS[0], str(parsed.tensor_parallel_size)]
        if manifest.kv_bits is not None and not any(option.split("=")[0] == CACHE_OPTION for option in vllm_options):
            vllm_options += [CACHE_OPTION, cache_dtype(on_cpu=not torch.cuda.is_available())]
        options = ["--quantization", "lrq", *vllm_options]
        command = vllm_command(parsed.model, *options)
        if os.environ.get(SELF_TEST) == "1":
            command = [sys.executable, "-m", "lrq_server.checked_server", str(parsed.model), *options]
    except LrqError as error:
        print(f"lrq-server: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    os.execvpe(command[0], command, serving_environment())
