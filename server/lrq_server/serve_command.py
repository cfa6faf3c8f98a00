"""lrq-server serve: what can go wrong is found first, then vLLM serves from this process (engine.py)."""

import argparse
import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch

from lrq_server import preflight
from lrq_server.json_logs import json_logs
from lrq_server.serve_settings import LOG_FORMATS, ServeSettings
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.seal import HASH_VARIABLE, hashing_wanted
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.kv_cache import CACHE_OPTION, cache_dtype
from lrq_vllm.layer_self_test import VARIABLE as SELF_TEST
from lrq_vllm.layer_self_test import wanted as self_test_wanted
from lrq_vllm.saturation import VARIABLE as COUNT_CLIPPED
from lrq_vllm.saturation import check_countable
from lrq_vllm.served_rank import VARIABLE as SERVED_RANK
from lrq_vllm.served_rank import check_rank, served_rank
from lrq_vllm.tensor_parallel import RANKS_OPTIONS
from lrq_vllm.vllm_environment import serving_environment

__all__ = ["add_to"]

_ABOUT = """Check an LRQ checkpoint and this machine, then serve it over vLLM's OpenAI API, with /lrq/live, /lrq/ready,
/lrq/info and more metrics. Other options are vLLM's, as they are: see `vllm serve --help`. A checkpoint made with --kv-bits 8
is served with 8-bit keys and values unless --kv-cache-dtype says otherwise.

With LRQ_SELFTEST=1 in the environment each layer's kernel is compared with the reference while the server loads, and the texts
in the checkpoint are read before it answers anyone: it does not serve what differs.
"""

_EXAMPLES = """examples:
  lrq-server serve ./Llama-3-8B-lrq-w4a16
  lrq-server serve ./Llama-3-8B-lrq-w8a8 --port 8080 --tensor-parallel-size 2 --max-model-len 8192
  lrq-server serve ./Llama-3-8B-lrq-w8a8 --max-concurrent-requests 256 --log-format json --drain-seconds 120
  lrq-server serve ./Llama-3-8B-lrq-w8a8 --count-clipped
  LRQ_SELFTEST=1 lrq-server serve ./Llama-3-8B-lrq-w8a8 --api-key "$KEY"

Exit code 0: told to stop (SIGTERM), and requests had their time to end. 1: vLLM's engine did not start, or died. 2: something
to put right, found before anything was loaded or by the self-test. 130: told to stop while it was loading.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    serve = commands.add_parser(
        "serve",
        help="check a checkpoint's files, then serve it",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # of vLLM's options, one may begin as one of ours
    )
    serve.add_argument("model", type=Path, help="LRQ checkpoint folder")
    serve.add_argument(
        *RANKS_OPTIONS, "--tensor_parallel_size", type=int, metavar="N", help="GPUs to cut the model for (default: 1)"
    )
    default = ServeSettings()
    serve.add_argument(
        "--max-request-mb", type=float, metavar="MB", default=default.max_request_mb,
        help="a larger request gets 413 (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--max-concurrent-requests", type=int, metavar="N", default=default.max_concurrent_requests,
        help="with so many inside, running or waiting, another one gets 429 (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--drain-seconds", type=float, metavar="S", default=default.drain_seconds,
        help="that requests have to end after SIGTERM (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--log-format", choices=LOG_FORMATS, default=default.log_format,
        help="json: one object per line, from vLLM's processes too (default: %(default)s)",
    )  # fmt: skip
    serve.add_argument(
        "--skip-hash", action="store_true", help="do not read the whole checkpoint to compare it with its seal before loading"
    )
    serve.add_argument(
        "--count-clipped", action="store_true",
        help="w8a8: show in /metrics the share of activations outside the calibrated range; a small kernel a layer",
    )  # fmt: skip
    serve.add_argument(
        "--correction-rank", metavar="{all,N}", help="columns of a low-rank correction to serve, 0 for none (default: all)"
    )
    serve.set_defaults(run=_run, hands_on_unknown=True)


def _run(parsed: argparse.Namespace, vllm_options: list[str]) -> int:
    settings = ServeSettings(
        max_request_mb=parsed.max_request_mb,
        max_concurrent_requests=parsed.max_concurrent_requests,
        drain_seconds=parsed.drain_seconds,
        log_format=parsed.log_format,
        hash_files=hashing_wanted() and not parsed.skip_hash,
    )
    manifest = read_manifest(parsed.model)
    if parsed.count_clipped:
        check_countable(manifest)
        os.environ[COUNT_CLIPPED] = "1"
    if parsed.correction_rank is not None:
        os.environ[SERVED_RANK] = parsed.correction_rank
    _check_rank(manifest)
    ranks = parsed.tensor_parallel_size
    os.environ |= serving_environment(1 if ranks is None else ranks)
    arguments = [str(parsed.model), "--quantization", "lrq", *vllm_options]
    if ranks is not None:
        arguments += [RANKS_OPTIONS[0], str(ranks)]
    with json_logs() if settings.log_format == "json" else nullcontext():
        return _checked_and_served(parsed.model, manifest, settings, arguments)


def _check_rank(manifest: Manifest) -> None:
    check_rank(manifest)
    if served_rank() is not None and self_test_wanted():
        raise SettingsError(
            f"The self-test ({SELF_TEST}=1) compares with texts that were read with the whole correction. Leave out "
            f"--correction-rank and {SERVED_RANK}, or the self-test."
        )


def _checked_and_served(folder: Path, manifest: Manifest, settings: ServeSettings, arguments: list[str]) -> int:
    problems = [
        *preflight.environment_problems(),
        *preflight.file_problems(folder, manifest, hash_files=settings.hash_files),
    ]
    if find_spec("vllm") is None:
        preflight.raise_all(folder, problems)
    from lrq_server import engine

    options = engine.parsed_options(arguments)
    says_cache = any(argument.split("=")[0].replace("_", "-") == CACHE_OPTION for argument in arguments)
    if manifest.kv_bits is not None and options.kv_cache_dtype == "auto" and not says_cache:
        options.kv_cache_dtype = cache_dtype(on_cpu=not torch.cuda.is_available())
    problems += [*engine.refused_options(options), *preflight.start_problems(folder, manifest, options)]
    preflight.raise_all(folder, problems)
    os.environ[HASH_VARIABLE] = "0"  # vLLM's side need not do again what was done, or was not wanted
    sys.stdout.flush()
    return engine.serve(options, manifest, settings)
