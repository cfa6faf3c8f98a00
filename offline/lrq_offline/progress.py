"""What an unfinished run has done so far, kept in its working folder so that the same command can go on from there."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import lrq_offline
import lrq_vllm
from lrq_offline.config import QuantizeSettings
from lrq_vllm.checkpoint.seal import digest
from lrq_vllm.checkpoint.store import TensorFolder, replace_durably
from lrq_vllm.errors import SettingsError

__all__ = ["Progress", "clear_notes", "fingerprint", "has_progress"]

_FINGERPRINT = "run.json"
_HASHED_ROWS = 8
"""Of each tensor of the model."""


def fingerprint(
    tensors: TensorFolder, config: dict[str, Any], windows: Tensor, settings: QuantizeSettings, device: str
) -> dict[str, Any]:
    """Everything that decides a run's bytes: model, text, settings, code and type of machine, each as a short value."""
    model = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        # No training leaves these as they were, and 100 GB take no minutes.
        model.update(f"{name} {tensors.spec(name)} {digest(tensors.some_rows(name, _HASHED_ROWS))} ".encode())
    code = hashlib.sha256()
    for package in (lrq_offline, lrq_vllm):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            code.update(path.read_bytes())
    return {
        "model": model.hexdigest(),
        "text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "code": f"{code.hexdigest()}, lrq {version('lrq')}, torch {version('torch')}",
        "device": device,
        **asdict(settings),
    }


def has_progress(folder: Path) -> bool:
    """Whether a working folder holds at least one finished block."""
    return _report(folder, 1).is_file()


def clear_notes(folder: Path) -> None:
    """Remove the notes of a run whose result is whole. The first block's goes last but one: without it nothing else counts."""
    for path in sorted(folder.glob("block-*.json"), reverse=True):
        path.unlink()
    (folder / _FINGERPRINT).unlink(missing_ok=True)


class Progress:
    """The finished blocks of a run in ``folder``, block 1 first; each is on the disk for good once :meth:`record` returns."""

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        """Go on in a folder, or start there. Raises SettingsError naming what differs from the run that began it."""
        self._folder = folder
        self.finished: list[dict[str, Any]] = []
        path = folder / _FINGERPRINT
        if not has_progress(folder):
            _write(path, run)
            return
        before = json.loads(path.read_text())
        changed = [
            f"{key} (was {_short(before.get(key))}, now {_short(run[key])})" for key in run if before.get(key) != run[key]
        ]
        if changed:
            raise SettingsError(
                f"An unfinished run is in {folder}, and this one differs from it in {', '.join(changed)}. Give the same "
                "settings to go on with it, or pass --restart to throw its work away."
            )
        while _report(folder, len(self.finished) + 1).is_file():
            self.finished.append(json.loads(_report(folder, len(self.finished) + 1).read_text()))

    def record(self, report: dict[str, Any]) -> None:
        """Note that the next block is finished; its shard must be on the disk."""
        self.finished.append(report)
        _write(_report(self._folder, len(self.finished)), report)

    def keep_only(self, shards: Iterable[Path]) -> None:
        """Remove from the folder what is neither a note nor one of these: what a run that was killed left half-written."""
        notes = [_report(self._folder, number + 1) for number in range(len(self.finished))]
        kept = {self._folder / _FINGERPRINT, *notes, *shards}
        for path in self._folder.iterdir():
            if path in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _report(folder: Path, number: int) -> Path:
    return folder / f"block-{number:05d}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    written = path.with_suffix(".new")
    written.write_text(json.dumps(content))
    replace_durably(written, path)


def _short(value: Any) -> str:
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}", r"\1", str(value))  # hashes
