"""The folder of a result: written beside its final place and moved there whole, or not at all."""

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lrq_offline.progress import clear_notes, has_progress
from lrq_vllm.checkpoint.seal import SEAL_NAME
from lrq_vllm.checkpoint.store import is_weight_file, read_manifest
from lrq_vllm.errors import LrqError, ModelFolderError, SettingsError

__all__ = ["carry_over", "check_output", "new_folder"]


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something. Raises SettingsError.

    An existing folder must be empty, or be an LRQ checkpoint that ``overwrite`` allows to replace.
    """
    if output.resolve() == source.resolve() or source.resolve().is_relative_to(output.resolve()):
        raise SettingsError(f"The output {output} is or contains the model {source} itself. Choose another folder with -o.")
    if output.is_mount():
        raise SettingsError(f"The output {output} is where a disk is mounted. Choose a folder on that disk with -o.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise SettingsError(f"The output {output} exists and is a file. Choose another folder with -o.")
    if not overwrite:
        raise SettingsError(
            f"The output {output} exists and is not empty. Choose another folder with -o, or give quantize --overwrite."
        )
    try:
        read_manifest(output)
    except LrqError as error:
        raise SettingsError(
            f"The output {output} holds something other than an LRQ checkpoint, which --overwrite does not replace. "
            "Choose another folder with -o, or remove this one yourself."
        ) from error


@contextmanager
def new_folder(output: Path, *, restart: bool = False, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A working folder beside ``output`` that takes its place when the block ends well, without notes of finished blocks.

    When it does not, a working folder with finished blocks stays, and is yielded again the next time unless ``restart``;
    one without is removed, and so is that of a model that turned out to be damaged. check: raises SettingsError if ``output``
    may not be replaced, asked when everything is done: hours may have passed. Raises SettingsError if the folder cannot be
    made, or another process makes it.
    """
    output = output.resolve()
    with _alone(output):
        yield from _new_folder(output, restart, check)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """For as long as the block lasts, no other process gets here with this output. Raises SettingsError if one has."""
    path = output.with_name(f".{output.name}.lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise SettingsError(
            f"Another run is writing {output} at this moment. Wait until it has ended, or choose another folder with -o."
        ) from error
    except OSError as error:
        raise SettingsError(f"{output} cannot be written ({error}). Choose another folder with -o.") from error
    except NotImplementedError:  # a file system without locks
        pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _new_folder(output: Path, restart: bool, check: Callable[[], None]) -> Iterator[Path]:
    partial, replaced = (output.with_name(f".{output.name}.{suffix}") for suffix in ("partial", "replaced"))
    whole = False
    # What a killed run left behind while it replaced a folder.
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
    if restart or not has_progress(partial):
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{output} cannot be written ({error}). Choose another folder with -o.") from error
    try:
        yield partial
        check()
        whole = True
        # Only renames away from being a result: nothing else that can fail comes after the notes of blocks are gone.
        clear_notes(partial)
        try:
            if output.exists():
                output.rename(replaced)
            partial.rename(output)
        except OSError as error:
            raise SettingsError(
                f"The result cannot be moved to {output} ({error}). It is whole in {partial}: move it."
            ) from error
    except ModelFolderError:
        # The model is damaged. Another one has another fingerprint, so nobody could go on from here.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if not whole and not has_progress(partial):
            shutil.rmtree(partial, ignore_errors=True)
        if not output.exists() and replaced.exists():
            replaced.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)


def carry_over(source: Path, target: Path, *, without: Collection[str] = ()) -> None:
    """Copy everything of a model folder that is not a weight and is not there yet: tokenizer, templates, licence, cards.

    Checkpoints of lrq's that lie in it stay where they are, as do links to nothing.
    """
    for path in sorted(source.iterdir()):
        destination = target / path.name
        if (
            path.name in without
            or destination.exists()
            or is_weight_file(path)
            or path.name.startswith(".")
            or not path.exists()
        ):
            continue
        if path.is_file():
            shutil.copyfile(path, destination)
        elif not _is_checkpoint(path):
            shutil.copytree(path, destination, ignore=_left_out, ignore_dangling_symlinks=True)


def _left_out(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if is_weight_file(Path(name)) or _is_checkpoint(Path(folder, name))]


def _is_checkpoint(path: Path) -> bool:
    return (path / SEAL_NAME).is_file()
