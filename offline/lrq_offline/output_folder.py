"""The folder of a result: written beside its final place and moved there whole, or not at all."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lrq_offline.progress import has_progress
from lrq_vllm.checkpoint.store import is_weight_file, read_manifest
from lrq_vllm.errors import LrqError, ModelFolderError, SettingsError

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
def new_folder(output: Path, *, restart: bool = False) -> Iterator[Path]:
    """A working folder beside ``output`` that takes its place when the block ends well.

    When it does not, a working folder with finished blocks stays, and is yielded again the next time unless ``restart``;
    one without is removed, and so is that of a model that turned out to be damaged. Raises SettingsError if the folder
    cannot be made.
    """
    output = output.resolve()
    partial, replaced = (output.with_name(f".{output.name}.{suffix}") for suffix in ("partial", "replaced"))
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
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
    except ModelFolderError:
        # The model is damaged. Another one has another fingerprint, so nobody could go on from here.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if not has_progress(partial):
            shutil.rmtree(partial, ignore_errors=True)
        if not output.exists() and replaced.exists():
            replaced.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)


def carry_over(source: Path, target: Path, *, without: Collection[str] = ()) -> None:
    """Copy everything of a model folder that is not a weight and is not there yet: tokenizer, templates, licence, cards."""
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
        if path.is_dir():
            shutil.copytree(path, destination, ignore=lambda folder, names: [n for n in names if is_weight_file(Path(n))])
        else:
            shutil.copyfile(path, destination)
