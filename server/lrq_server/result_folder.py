"""The output folder of a measurement: never one that holds something else, and results in it whole or not at all."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lrq_vllm.checkpoint.store import replace_durably
from lrq_vllm.errors import SettingsError

__all__ = ["ResultFolder"]


@dataclass(frozen=True)
class ResultFolder:
    """what: the measurement, as "a bench". files: its results. work: a subfolder for what other programs write."""

    path: Path
    what: str
    files: tuple[str, ...]
    work: str

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds something. Raises SettingsError.

        With ``overwrite`` the results and logs of an earlier measurement may be in it, and nothing else.
        """
        folder = self.path
        if folder.exists() and not folder.is_dir():
            raise SettingsError(f"The output {folder} exists and is a file. Choose another folder with --out.")
        strangers = [path.name for path in folder.iterdir() if not self._is_ours(path)] if folder.exists() else []
        if strangers:
            raise SettingsError(
                f"The output {folder} holds something other than {self.what}: {sorted(strangers)[0]}. Choose another folder "
                "with --out."
            )
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise SettingsError(
                f"The output {folder} exists and is not empty. Choose another folder with --out, or pass --overwrite."
            )

    def begin(self) -> None:
        """Make the folder, without what other programs have left in it. Results stay until :meth:`write` has new ones.

        Only after :meth:`check`.
        """
        for path in self.path.iterdir() if self.path.exists() else ():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.files:
                path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, writers: Mapping[str, Callable[[Path], None]]) -> list[Path]:
        """The results, which are complete before the first of them is there. writers: by file name."""
        partial = {name: self.path / _partial(name) for name in writers}
        try:
            for name, write in writers.items():
                write(partial[name])
            for name, path in partial.items():
                replace_durably(path, self.path / name)
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)
        return [self.path / name for name in writers]

    def _is_ours(self, path: Path) -> bool:
        names = (self.work, *self.files, *map(_partial, self.files))
        return path.name in names or path.match("server-*.log")


def _partial(name: str) -> str:
    """What a result is called until it is complete."""
    return f".{name}.partial"
