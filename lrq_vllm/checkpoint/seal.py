"""lrq_seal.json: what a checkpoint's folder held when it was written, so that a later change is found and named.

The seal keeps config.json whole and a digest of every tensor's bytes. Dtypes and shapes cannot tell a transposed or exchanged
tensor from the right one, and nothing else would notice a config.json whose norm's epsilon belongs to another model.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq_vllm.checkpoint.store import TensorFolder, read_config
from lrq_vllm.errors import CheckpointError, one_paragraph

__all__ = ["HASH_VARIABLE", "SEAL_NAME", "check_seal", "digest", "hashing_wanted", "write_seal"]

SEAL_NAME = "lrq_seal.json"
HASH_VARIABLE = "LRQ_HASH"
"""Environment variable; 0 keeps servers from reading a checkpoint whole before they load it."""
_READERS = 8


def write_seal(folder: Path, config: Mapping[str, Any]) -> None:
    """Seal the tensors in ``folder`` and ``config``, which its config.json holds or will hold."""
    seal = {"config": config, "tensors": _digests(TensorFolder(folder))}
    (folder / SEAL_NAME).write_text(json.dumps(seal, indent=1) + "\n")


def hashing_wanted() -> bool:
    """Whether a server should compare the content of tensors too."""
    return os.environ.get(HASH_VARIABLE) != "0"


def check_seal(tensors: TensorFolder, *, content: bool = True, on_read: Callable[[int], None] = lambda _: None) -> None:
    """Read every tensor of a checkpoint (at the disk's speed) and compare all with the seal.

    content: False compares config.json and the names of tensors alone, and reads none. on_read: is told the bytes of each
    tensor once it is read.

    Raises CheckpointError naming each key of config.json and each tensor that was changed, removed or added, and
    ModelFolderError if a file cannot be read.
    """
    folder = tensors.folder
    seal = _read_seal(folder)
    config, digests = read_config(folder), _digests(tensors, on_read) if content else dict.fromkeys(tensors, "")
    problems = [
        f"{key} in config.json {_difference(seal['config'], config, key)}"
        for key in sorted({*seal["config"], *config})
        if seal["config"].get(key, _ABSENT) != config.get(key, _ABSENT)
    ]
    for name in sorted({*seal["tensors"], *digests}):
        if name not in digests:
            problems.append(f"tensor {name} is missing")
        elif name not in seal["tensors"]:
            problems.append(f"tensor {name} is new")
        elif content and digests[name] != seal["tensors"][name]:
            problems.append(f"tensor {name} has other content")
    if problems:
        raise CheckpointError(
            f"{folder} is not what lrq-offline wrote: "
            + one_paragraph(
                problems,
                "Copy or quantize the model again. To serve with other settings leave config.json alone and pass them to vLLM "
                "(--hf-overrides).",
            )
        )


_ABSENT = object()


def _difference(was: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    if key not in now:
        return f"is missing (it was {_short(was[key])})"
    if key not in was:
        return f"is new ({_short(now[key])})"
    return f"is {_short(now[key])} and was {_short(was[key])}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_seal(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / SEAL_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {SEAL_NAME}, which says what it should hold. Copy or quantize the model again.")
    try:
        seal = json.loads(path.read_text())
        return {"config": dict(seal["config"]), "tensors": dict(seal["tensors"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Copy or quantize the model again.") from error


def _digests(tensors: TensorFolder, on_read: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Name -> SHA-256 of dtype, shape and bytes. Threads, because hashing lets go of the interpreter."""
    names, digests = sorted(tensors), {}
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        for name, found in zip(names, pool.map(lambda name: digest(tensors.get(name)), names), strict=True):
            digests[name] = found
            on_read(tensors.spec(name).nbytes)
    return digests


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
