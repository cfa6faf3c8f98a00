"""Whether a checkpoint is whole, is loaded by vLLM as it stands, and answers as the reference path does."""

import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from lrq_offline.source_model import load_tokenizer
from lrq_vllm import layer_self_test
from lrq_vllm.checkpoint.golden import read_golden
from lrq_vllm.checkpoint.seal import check_seal
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_manifest
from lrq_vllm.errors import CheckpointError, LrqError, SettingsError
from lrq_vllm.golden_replay import Replayed, replay
from lrq_vllm.load_proof import Loaded, prove_loading
from lrq_vllm.vllm_environment import serving_environment

__all__ = ["check_files", "check_loading", "check_serving"]

Result = TypeVar("Result")

# In the process itself: no worker of vLLM's own hides what happens. Functions are sent to the model, which is in it too.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    layer_self_test.VARIABLE: "1",
}  # fmt: skip


_RAISED = re.compile(r"(?P<module>[\w.]+\.)?\w+(Error|Exception): (?P<said>.+)")
_SECONDARY = ("WorkerProc initialization failed", "Engine core initialization failed", "EngineCore")


def check_files(folder: Path) -> int:
    """Compare a checkpoint's files with its manifest and its seal; returns the number of tensors.

    Raises CheckpointError or ModelFolderError naming everything that is wrong.
    """
    manifest, tensors = read_manifest(folder), TensorFolder(folder)
    problems = []
    for check in (lambda: check_seal(tensors), lambda: check_tensors(tensors, manifest), lambda: read_golden(folder)):
        try:
            check()
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(" ".join(problems))
    load_tokenizer(folder)
    return len(tensors)


def check_loading(folder: Path) -> Loaded:
    """As load_proof.prove_loading, in a process of its own. Raises SettingsError without vLLM."""
    return _in_process(prove_loading, folder)


def check_serving(folder: Path, ranks: int = 1, *, expert_parallel: bool = False, compiled: bool = False) -> Replayed:
    """As golden_replay.replay, in a process of its own. Raises SettingsError without vLLM."""
    return _in_process(partial(replay, ranks=ranks, expert_parallel=expert_parallel, compiled=compiled), folder, ranks)


def _in_process(work: Callable[[Path], Result], folder: Path, ranks: int = 1) -> Result:
    if find_spec("vllm") is None:
        raise SettingsError(
            "vLLM is not installed here, so nobody can say whether it loads the checkpoint. Install it beside lrq "
            "(in a clone of lrq: pip install '.[cuda]', or '.[cpu]' without a GPU), or check the files alone: --files-only."
        )
    with tempfile.NamedTemporaryFile(prefix="lrq-verify-", suffix=".log") as log:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, initializer=partial(_prepare, log.name, ranks)) as pool:
            try:
                return pool.submit(_tried, work, folder).result()
            except BrokenProcessPool as error:
                said = " ".join(Path(log.name).read_text(errors="replace").split())[-600:]
                raise CheckpointError(f"{folder}: vLLM ended while it was tried. It said last: {said or 'nothing'}") from error
            except CheckpointError as error:
                cause = _cause(Path(log.name).read_text(errors="replace")) if ranks > 1 else None
                if cause is None:
                    raise
                raise CheckpointError(f"{folder} on {ranks} ranks: {cause}") from error


def _cause(log: str) -> str | None:
    """Why a rank failed, which vLLM tells in the rank's own process alone: what lrq says of it, else the last exception."""
    found = [match for match in _RAISED.finditer(log) if not match["said"].startswith(_SECONDARY)]
    ours = [match for match in found if match["module"] == "lrq_vllm.errors."]
    return (ours or found)[-1]["said"].strip()[:600] if found else None


def _prepare(log: str, ranks: int) -> None:
    """What vLLM prints goes to a file: the command has a result of its own."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ |= serving_environment(ranks) | _ENVIRONMENT
    sys.stdout.flush()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _tried(work: Callable[[Path], Result], folder: Path) -> Result:
    try:
        return work(folder)
    except LrqError:
        raise
    except Exception as error:  # vLLM raises what it likes, not all of which can travel between processes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        raise CheckpointError(f"vLLM does not load {folder}: {reason}") from None
