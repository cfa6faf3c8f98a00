"""The output folder of a bench: never one that holds something else, and results in it whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

from lrq_server.bench_page import write_html
from lrq_server.bench_result import BenchResult, write_csv, write_json
from lrq_vllm.checkpoint.store import replace_durably
from lrq_vllm.errors import SettingsError

__all__ = ["RAW", "check_folder", "new_folder", "write_results"]

RAW = "load-generator"  # what vllm bench serve wrote and said
_WRITERS: dict[str, Callable[[BenchResult, Path], None]] = {
    "bench.csv": write_csv,
    "bench.html": write_html,
    "bench.json": write_json,
}


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something. Raises SettingsError.

    With ``overwrite`` the results and logs of a bench may be in it, and nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"The output {folder} exists and is a file. Choose another folder with --out.")
    strangers = [path.name for path in folder.iterdir() if not _is_ours(path)] if folder.exists() else []
    if strangers:
        raise SettingsError(
            f"The output {folder} holds something other than a bench: {sorted(strangers)[0]}. Choose another folder with --out."
        )
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise SettingsError(
            f"The output {folder} exists and is not empty. Choose another folder with --out, or pass --overwrite."
        )


def new_folder(folder: Path) -> None:
    """Make the folder, without what a bench before left in it. Only after :func:`check_folder`."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / RAW).mkdir(parents=True, exist_ok=True)


def write_results(result: BenchResult, folder: Path) -> list[Path]:
    """bench.csv, bench.html and bench.json, which are complete before the first of them is there."""
    partial = {name: folder / f".{name}.partial" for name in _WRITERS}
    try:
        for name, write in _WRITERS.items():
            write(result, partial[name])
        for name, path in partial.items():
            replace_durably(path, folder / name)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return [folder / name for name in _WRITERS]


def _is_ours(path: Path) -> bool:
    return path.name in (RAW, *_WRITERS) or path.match("server-*.log")
