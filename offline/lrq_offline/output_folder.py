"""The folder of a result: written beside its final place and moved there whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lrq_vllm.checkpoint.store import is_weight_file, read_manifest
from lrq_vllm.errors import LrqError, SettingsError

__all__ = ["carry_over", "check_output", "new_folder"]


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something. Raises SettingsError.

    An existing folder must be empty, or be an LRQ checkpoint that ``overwrite`` allows to replace.
    """
    if output.resolve() == source.resolve() or source.resolve().is_relative_to(output.resolve()):
        raise SettingsError(f"The output {output} is or contains the model {source} itself. Choose another folder with -o.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise SettingsError(f"The output {output} exists and is a file. Choose another folder with -o.")
    if not overwrite:
        raise SettingsError(f"The output {output} exists and is not empty. Choose another folder with -o, or pass --overwrite.")
    try:
        read_manifest(output)
    except LrqError as error:
        raise SettingsError(
            f"The output {output} holds something other than an LRQ checkpoint, which --overwrite does not replace. "
            "Choose another folder with -o, or remove this one yourself."
        ) from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A working folder beside ``output`` that takes its place when the block ends well and is removed when it does not."""
    partial = output.with_name(f".{output.name}.partial")
    if partial.exists():  # left behind by a run that was killed
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise SettingsError(f"{output} cannot be written ({error}). Choose a folder on a disk with space with -o.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def carry_over(source: Path, target: Path) -> None:
    """Copy everything of a model folder that is not a weight and is not there yet: tokenizer, templates, licence, cards."""
    for path in sorted(source.iterdir()):
        destination = target / path.name
        if destination.exists() or is_weight_file(path) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, destination, ignore=lambda folder, names: [n for n in names if is_weight_file(Path(n))])
        else:
            shutil.copyfile(path, destination)
