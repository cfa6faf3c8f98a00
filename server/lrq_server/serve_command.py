"""lrq-server serve: check the checkpoint, then become ``vllm serve``, or with LRQ_SELFTEST=1 checked_server.py."""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from lrq_server.vllm_process import vllm_command
from lrq_vllm.checkpoint import TensorFolder, check_tensors, read_manifest
from lrq_vllm.kv_cache import CACHE_OPTION, cache_dtype
from lrq_vllm.layer_self_test import VARIABLE as SELF_TEST
from lrq_vllm.tensor_parallel import RANKS_OPTIONS, check_ranks
from lrq_vllm.vllm_environment import serving_environment

__all__ = ["add_to"]

_ABOUT = """Options after MODEL are handed to vLLM as they are: see `vllm serve --help`. A checkpoint made with --kv-bits 8 is
served with 8-bit keys and values unless --kv-cache-dtype says otherwise.

With LRQ_SELFTEST=1 in the environment each layer's kernel is compared with the reference while the server loads, and the texts
in the checkpoint are read before it answers anyone: it does not serve what differs.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    serve = commands.add_parser(
        "serve",
        help="check a checkpoint's files, then serve it",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("model", type=Path, help="LRQ checkpoint folder")
    serve.add_argument(
        *RANKS_OPTIONS, type=int, default=1, metavar="N", help="GPUs to cut the model for (default: %(default)s)"
    )
    serve.set_defaults(run=_run, hands_on_unknown=True)


def _run(parsed: argparse.Namespace, vllm_options: list[str]) -> NoReturn:
    manifest = read_manifest(parsed.model)
    check_tensors(TensorFolder(parsed.model), manifest)
    check_ranks(manifest, parsed.tensor_parallel_size)
    options = ["--quantization", "lrq", *vllm_options]
    if parsed.tensor_parallel_size > 1:
        options += [RANKS_OPTIONS[0], str(parsed.tensor_parallel_size)]
    if manifest.kv_bits is not None and not any(option.split("=")[0] == CACHE_OPTION for option in vllm_options):
        options += [CACHE_OPTION, cache_dtype(on_cpu=not torch.cuda.is_available())]
    command = vllm_command(parsed.model, *options)
    if os.environ.get(SELF_TEST) == "1":
        command = [sys.executable, "-m", "lrq_server.checked_server", str(parsed.model), *options]
    sys.stdout.flush()
    os.execvpe(command[0], command, serving_environment())
