"""Folders of safetensors: read by name without loading the rest, and written shard by shard.

Only safetensors are read; a pickle is never opened. A reader keeps no tensor, a writer keeps one shard.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrq_vllm.checkpoint.correction import LOW_RANK_SUFFIXES
from lrq_vllm.checkpoint.schema import Manifest, TensorSpec
from lrq_vllm.errors import CheckpointError, ModelFolderError, one_paragraph

__all__ = [
    "COMPUTED_ANYWAY",
    "ShardWriter",
    "TensorFolder",
    "check_folder",
    "check_tensors",
    "is_weight_file",
    "read_config",
    "read_manifest",
    "read_object",
    "replace_durably",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
COMPUTED_ANYWAY = ".inv_freq"
"""The end of the names of rotary tables, which old folders keep and every program computes."""
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".ckpt",
    ".tflite",
    ".safetensors.index.json",
    ".bin.index.json",
)
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def is_weight_file(path: Path) -> bool:
    """Whether a file holds weights or their index, in any format (such files are not carried over to an output)."""
    return path.name.endswith(_WEIGHT_SUFFIXES)


def check_folder(folder: Path) -> None:
    """Raises ModelFolderError if there is no such folder."""
    if not folder.is_dir():
        raise ModelFolderError(
            f"{folder} is not a folder. Give the folder of a downloaded or quantized model (config.json and weights)."
        )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises ModelFolderError if the folder or the file is missing or is no JSON object."""
    path = folder / CONFIG_NAME
    check_folder(folder)
    if not path.is_file():
        raise ModelFolderError(f"{folder} has no {CONFIG_NAME}. Give the folder of a Hugging Face model, downloaded whole.")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file as a dictionary. Raises ModelFolderError if it is no JSON object."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} is not valid JSON ({error}). Download the model again.") from error
    if not isinstance(config, dict):
        raise ModelFolderError(f"{path} is not a JSON object. Download the model again.")
    return config


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an LRQ checkpoint. Raises CheckpointError if the folder's model is not quantized by lrq."""
    config = read_config(folder).get("quantization_config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder} is not quantized (no quantization_config). Run `lrq-offline quantize {folder}` first.")
    return Manifest.from_dict(config)


class TensorFolder:
    """The safetensors files of one folder as a read-only mapping from tensor name to tensor, opened lazily: those that the
    index names, if there is one (a model may lie there a second time, as consolidated.safetensors), else all.

    Raises ModelFolderError when there are no safetensors (a pickle-only folder is said so), when a file is truncated
    or when the index names a file or a tensor that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._specs: dict[str, TensorSpec] = {}
        index = self._index()
        for path in self._files(index):
            self._read_header(path)
        self._check_index(index)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor, from the header."""
        return self._specs[name]

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._file_of[name]

    def get(self, name: str) -> Tensor:
        """Read one tensor. Raises ModelFolderError if the folder has none of that name."""
        if name not in self._file_of:
            raise ModelFolderError(
                f"{self.folder} has no tensor {name}. The folder is incomplete: download or quantize it again."
            )
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def some_rows(self, name: str, count: int) -> Tensor:
        """At most ``count`` rows of a tensor, evenly spread from its first on; no others are read."""
        shape = self.spec(name).shape
        if not shape or not shape[0]:
            return self.get(name)
        with safe_open(self._file_of[name], framework="pt") as file:
            rows = file.get_slice(name)
            return torch.cat([rows[row : row + 1] for row in range(0, shape[0], -(-shape[0] // count))])

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name; empty if there is no index."""
        path = self.folder / INDEX_NAME
        if not path.is_file():
            return {}
        try:
            weight_map: dict[str, str] = dict(json.loads(path.read_text())["weight_map"])
            if not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("weight_map names something other than files")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelFolderError(f"{path} is damaged ({error!r}). Download the model again.") from error
        return weight_map

    def _files(self, index: Mapping[str, str]) -> list[Path]:
        check_folder(self.folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            named = set(index.values())
            return [path for path in files if path.name in named] if named else files
        pickles = sorted(path.name for path in self.folder.iterdir() if path.name.endswith((".bin", ".pt", ".pth")))
        if pickles:
            raise ModelFolderError(
                f"{self.folder} has its weights only as pickle ({', '.join(pickles[:3])}), which can run code when opened. "
                "Convert the model to safetensors first (transformers: model.save_pretrained(folder))."
            )
        raise ModelFolderError(f"{self.folder} has no *.safetensors files. Download the model's weights too.")

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in self._file_of:
                        raise ModelFolderError(
                            f"{self.folder} holds tensor {name} twice, in {self._file_of[name].name} and {path.name}. "
                            "Remove the file that does not belong to the model."
                        )
                    view = file.get_slice(name)
                    dtype = _DTYPES.get(view.get_dtype())
                    if dtype is None:
                        raise ModelFolderError(
                            f"{path} holds {name} as {view.get_dtype()}, which lrq does not read. "
                            "Give the model in bfloat16, float16 or float32."
                        )
                    self._file_of[name] = path
                    self._specs[name] = TensorSpec(dtype, tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(
                f"{path} is not a complete safetensors file ({error}). Download or copy it again; it may be truncated."
            ) from error

    def _check_index(self, index: Mapping[str, str]) -> None:
        missing = [name for name in index if name not in self._specs]
        if missing:
            absent = sorted({index[name] for name in missing if not (self.folder / index[name]).is_file()})
            detail = f"file {absent[0]} is missing" if absent else f"tensor {missing[0]} is in no file"
            raise ModelFolderError(f"{self.folder} is incomplete: {detail}, but {INDEX_NAME} names it. Download it again.")


def check_tensors(folder: TensorFolder, manifest: Manifest) -> None:
    """Compare the headers with the manifest: every tensor there, with its dtype and shape, and no correction beside them.

    Raises CheckpointError naming each tensor that is wrong.
    """
    problems, known = [], set()
    for module in manifest.quantized:
        for suffix, expected in manifest.tensors_of(module).items():
            name = f"{module}.{suffix}"
            known.add(name)
            if name not in folder:
                problems.append(f"tensor {name} is missing")
            elif folder.spec(name) != expected:
                problems.append(f"tensor {name} is {_show(folder.spec(name))}, expected {_show(expected)}")
        if f"{module}.weight" in folder:
            problems.append(f"{module}.weight stands beside the quantized tensors of the same module")
    problems += [
        f"tensor {name} belongs to a low-rank correction that config.json does not list"
        for name in folder
        if name.endswith(LOW_RANK_SUFFIXES) and name not in known
    ]
    if problems:
        cure = "Quantize the model again, or copy the folder again if it was moved."
        raise CheckpointError(f"{folder.folder} cannot be loaded: " + one_paragraph(problems, cure))


def _show(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


class ShardWriter:
    """Writes the tensors of a checkpoint to ``folder`` as ``count`` safetensors shards, each durable when its call returns.

    The folder reads as a model only once it has a config.json, which is not written here.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count

    def path(self, number: int) -> Path:
        """The file of shard ``number``, 1 .. count."""
        return self._folder / f"model-{number:05d}-of-{self._count:05d}.safetensors"

    def write_shard(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write shard ``number`` whole or not at all. ``tensors`` maps full names to tensors; it may be empty."""
        path = self.path(number)
        partial = path.with_suffix(".partial")
        on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(on_host, partial, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be written ({error}). Is the disk full? Choose another with -o.") from error
        # safetensors writes through a private temporary file; a server may run as another user.
        partial.chmod(0o666 & ~_umask())
        replace_durably(partial, path)

    def finish(self) -> int:
        """Write the index of all shards; return the bytes of their tensors. Reads headers only."""
        tensors = TensorFolder(self._folder)
        total_bytes = sum(tensors.spec(name).nbytes for name in tensors)
        weight_map = {name: tensors.file_of(name).name for name in sorted(tensors)}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        return total_bytes


def replace_durably(written: Path, final: Path) -> None:
    """Rename ``written`` to ``final`` such that after a crash ``final`` is either absent, old, or whole."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
