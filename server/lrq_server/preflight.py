"""Whether a server can start, found out before vLLM loads anything: all problems at once."""

import logging
import multiprocessing
import socket
import ssl
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lrq_server.serving_memory import MemoryNeed, available_host_bytes, cpu_kv_space_bytes, in_gib, memory_need
from lrq_vllm import layer_self_test
from lrq_vllm.checkpoint.golden import read_golden
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.checkpoint.seal import check_seal
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_config
from lrq_vllm.diagnosis import kernel_candidates, quiet, vllm_findings
from lrq_vllm.errors import LrqError, SettingsError
from lrq_vllm.kernel_choice import first_that_can
from lrq_vllm.kv_cache import check_cache_dtype
from lrq_vllm.tensor_parallel import check_ranks
from lrq_vllm.tp_invariance import invariant

__all__ = [
    "Gpu", "Progress", "cpu_memory_problems", "environment_problems", "file_problems", "gpu_memory_problems", "raise_all",
    "start_problems",
]  # fmt: skip

logger = logging.getLogger(f"vllm.{__name__}")

_TELL_EVERY_S = 5


def file_problems(folder: Path, manifest: Manifest, *, hash_files: bool) -> list[str]:
    """What is wrong with a checkpoint's files. hash_files: read all of them, and say how far it is."""
    try:
        tensors = TensorFolder(folder)
    except LrqError as error:  # nothing else can be looked at
        return [str(error)]
    total = sum(tensors.spec(name).nbytes for name in tensors)
    checks: list[Callable[[], object]] = [
        lambda: check_tensors(tensors, manifest),
        lambda: check_seal(tensors, content=hash_files, on_read=Progress(folder, total)),
        lambda: layer_self_test.wanted() and read_golden(folder),
    ]
    return _problems_of(checks)


def environment_problems() -> list[str]:
    """What keeps this environment's vLLM from serving any checkpoint. Imports vLLM."""
    with quiet():
        return [f"{finding.subject}: {finding.detail} ({finding.cure})." for finding in vllm_findings() if finding.cure]


def start_problems(folder: Path, manifest: Manifest, parsed: Namespace) -> list[str]:
    """What keeps vLLM from serving it with these options on this machine, now. What file_problems says is not said again."""
    checks: list[Callable[[], object]] = [
        lambda: check_ranks(manifest, parsed.tensor_parallel_size, expert_parallel=parsed.enable_expert_parallel),
        lambda: check_cache_dtype(parsed.kv_cache_dtype, manifest, on_cpu=not torch.cuda.is_available()),
        invariant,
    ]
    problems = [*_problems_of(checks), *_listening_problems(parsed), *_tls_problems(parsed)]
    if parsed.pipeline_parallel_size < 1:
        problems.append(f"--pipeline-parallel-size is {parsed.pipeline_parallel_size}: give 1 or more.")
    ranks = parsed.tensor_parallel_size * parsed.pipeline_parallel_size
    return problems + _device_problems(folder, manifest, parsed, ranks) if ranks > 0 else problems


def _device_problems(folder: Path, manifest: Manifest, parsed: Namespace, ranks: int) -> list[str]:
    if not torch.cuda.is_available():
        problems = _kernel_problems(manifest.scheme)
        need = _need(folder, manifest, parsed, ranks, on_cpu=True)
        return problems + (cpu_memory_problems(need, ranks) if need else [])
    # Another process looks at the GPUs: here it would leave a context in the memory of one of them.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        gpus, problems = pool.submit(_look_at_gpus, manifest.scheme).result()
    if len(gpus) < ranks and parsed.distributed_executor_backend != "ray" and parsed.nnodes == 1:
        problems.append(f"{ranks} GPUs are asked for, and this machine shows {len(gpus)}: use fewer, or let it see more.")
    need = _need(folder, manifest, parsed, ranks, on_cpu=False)
    return problems + (gpu_memory_problems(need, gpus[:ranks], parsed) if need else [])


def _need(folder: Path, manifest: Manifest, parsed: Namespace, ranks: int, *, on_cpu: bool) -> MemoryNeed | None:
    """None if the files cannot be read, or config.json lacks what it takes: their own checks say so."""
    kv_bits = 8 if "8" in parsed.kv_cache_dtype else 16
    tokens = parsed.max_model_len if (parsed.max_model_len or 0) > 0 else None
    try:
        return memory_need(TensorFolder(folder), manifest, read_config(folder), ranks, tokens, kv_bits, on_cpu=on_cpu)
    except (LrqError, KeyError, TypeError, ValueError):
        return None


def raise_all(folder: Path, problems: list[str]) -> None:
    """Raises SettingsError with all of them, if there are any."""
    if len(problems) == 1:
        raise SettingsError(problems[0])
    if problems:
        listed = " ".join(f"({place}) {problem}" for place, problem in enumerate(problems, 1))
        raise SettingsError(f"{folder} cannot be served, for {len(problems)} reasons: {listed}")


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory of one GPU."""

    free: int
    total: int


def cpu_memory_problems(need: MemoryNeed, ranks: int) -> list[str]:
    """Whether all ranks fit into this machine's memory."""
    problems, space = [], cpu_kv_space_bytes()
    if space is not None and need.kv_bytes > space:
        problems.append(
            f"Keys and values of one sequence of {need.tokens:,} tokens take {in_gib(need.kv_bytes)}, and "
            f"VLLM_CPU_KVCACHE_SPACE gives {in_gib(space)}: raise it, or lower --max-model-len."
        )
    wanted = ranks * (need.weight_bytes + (need.kv_bytes if space is None else space))
    available = available_host_bytes()
    if wanted > available:
        problems.append(
            f"Weights and KV cache take {in_gib(wanted)} of memory, and {in_gib(available)} are available: lower "
            "VLLM_CPU_KVCACHE_SPACE or --max-model-len, or use another machine."
        )
    return problems


def gpu_memory_problems(need: MemoryNeed, gpus: list[Gpu], parsed: Namespace) -> list[str]:
    """Whether each rank fits into its GPU, by the rules of vLLM."""
    problems = []
    for index, gpu in enumerate(gpus):
        share = int(gpu.total * parsed.gpu_memory_utilization)
        taken = f"--gpu-memory-utilization {parsed.gpu_memory_utilization:g}"
        if parsed.kv_cache_memory_bytes is None and gpu.free < share:
            problems.append(
                f"GPU {index} has {in_gib(gpu.free)} of {in_gib(gpu.total)} free, and {taken} takes {in_gib(share)}: stop what "
                "uses the GPU, or lower it."
            )
        elif need.weight_bytes + need.kv_bytes > min(share, gpu.free):
            problems.append(
                f"Weights take {in_gib(need.weight_bytes)} of GPU {index}, keys and values of one sequence of {need.tokens:,} "
                f"tokens {in_gib(need.kv_bytes)}, and there are {in_gib(min(share, gpu.free))}: lower --max-model-len, or use "
                "more GPUs (--tensor-parallel-size)."
            )
    return problems


def _listening_problems(parsed: Namespace) -> Iterator[str]:
    if parsed.uds:
        if Path(parsed.uds).exists():
            yield f"{parsed.uds} exists: remove it if no server uses it, or choose another --uds."
        return
    family = socket.AF_INET6 if ":" in (parsed.host or "") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((parsed.host or "", parsed.port))
        except OverflowError:
            yield f"There is no port {parsed.port}: choose a --port from 1 to 65535, or 0 for any that is free."
        except OSError as error:
            where = f"Port {parsed.port} of {parsed.host or 'this machine'}"
            yield f"{where} cannot be had ({error.strerror}): stop what uses it, or choose another --port."


def _tls_problems(parsed: Namespace) -> Iterator[str]:
    for option in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(parsed, option)
        if path and not Path(path).is_file():
            yield f"--{option.replace('_', '-')} {path} is no file: correct the path, or leave it out."
            return
    if parsed.ssl_keyfile and not parsed.ssl_certfile:
        yield "--ssl-keyfile is given without --ssl-certfile: give both, or neither."
    elif parsed.ssl_certfile:
        try:
            # A key with a password would ask for it at the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(parsed.ssl_certfile, parsed.ssl_keyfile, lambda: "")
        except (OSError, ValueError) as error:
            yield (
                f"--ssl-certfile {parsed.ssl_certfile} cannot be used ({error}): give a certificate and its own key in "
                "PEM format, without a password."
            )


def _kernel_problems(scheme: str) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _problems_of([lambda: first_that_can(kernel_candidates(scheme), device)])


def _look_at_gpus(scheme: str) -> tuple[list[Gpu], list[str]]:
    gpus = [Gpu(*torch.cuda.mem_get_info(index)) for index in range(torch.cuda.device_count())]
    return gpus, _kernel_problems(scheme)


def _problems_of(checks: list[Callable[[], object]]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except LrqError as error:
            problems.append(str(error))
    return problems


class Progress:
    """Says every few seconds how much of a checkpoint has been read."""

    def __init__(self, folder: Path, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._total, self._read, self._clock = folder, total, 0, clock
        self._told = clock()

    def __call__(self, read: int) -> None:
        self._read += read
        if self._clock() - self._told >= _TELL_EVERY_S:
            self._told = self._clock()
            logger.info(
                "Comparing %s with its seal: %s of %s read (--skip-hash leaves this out).",
                self._folder, in_gib(self._read), in_gib(self._total),
            )  # fmt: skip
