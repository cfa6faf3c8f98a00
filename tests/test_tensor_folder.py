"""A folder of tensors: read and written, or refused with what is wrong with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lrq_vllm.checkpoint import store
from lrq_vllm.checkpoint.schema import TensorSpec
from lrq_vllm.checkpoint.store import ShardWriter, TensorFolder, read_config, read_manifest
from lrq_vllm.errors import CheckpointError, ModelFolderError
from tests.small_checkpoint import (
    INDEX,
    golden_tensors,
    write_model,
)

# --- reading a folder ---


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    tensors = TensorFolder(write_model(tmp_path, golden_tensors()))
    assert sorted(tensors) == sorted(golden_tensors())
    for name, expected in golden_tensors().items():
        assert tensors.spec(name) == TensorSpec(expected.dtype, tuple(expected.shape))
        assert torch.equal(tensors.get(name), expected)


def test_some_rows_are_spread_over_a_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(20).view(10, 2), "b": torch.tensor(3.0), "c": torch.zeros(0, 4), "d": torch.arange(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    assert torch.equal(folder.some_rows("a", 4), tensors["a"][[0, 3, 6, 9]])
    for name in "bcd":
        assert torch.equal(folder.some_rows(name, 4), tensors[name])


def test_a_model_that_lies_there_twice_is_read_by_its_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path, golden_tensors())
    assert (folder / INDEX).is_file()
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    assert sorted(TensorFolder(folder)) == sorted(golden_tensors())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")


def test_a_missing_folder_of_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere"):
        TensorFolder(tmp_path / "nowhere")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not valid JSON"), pytest.param("[" * 100_000, "is not valid JSON", id="deep"), ("[]", "is not a JSON object")],
)
def test_a_damaged_config_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFolderError, match=rf"config\.json {words}"):
        read_config(tmp_path)


def test_a_float_model_is_said_to_be_not_quantized(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is not quantized"):
        read_manifest(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no \*\.safetensors files"):
        TensorFolder(tmp_path)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFolderError, match=r"only as pickle \(pytorch_model\.bin\)"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    write_model(tmp_path, golden_tensors())
    path = tmp_path / "model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFolderError, match=r"model-00001-of-00001\.safetensors is not a complete safetensors file"):
        TensorFolder(tmp_path)


def test_a_dtype_that_is_not_read_is_named(tmp_path: Path) -> None:
    save_file({"scales": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelFolderError, match="scales as F8_E4M3"):
        TensorFolder(tmp_path)


def test_asking_for_a_tensor_that_is_not_there_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"no tensor lm_head\.weight"):
        TensorFolder(write_model(tmp_path, golden_tensors())).get("lm_head.weight")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ModelFolderError, match=r"file model-00002-of-00002\.safetensors is missing"):
        TensorFolder(tmp_path)


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(ModelFolderError, match="tensor b is in no file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "index",
    [b"{", b"[]", b"{}", b'{"weight_map": 1}', b'{"weight_map": ["b"]}', b'{"weight_map": {"b": 3}}', b"\xff\xfe"],
)
def test_a_damaged_index_is_named(tmp_path: Path, index: bytes) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(ModelFolderError, match=r"model\.safetensors\.index\.json is damaged"):
        TensorFolder(tmp_path)


# --- writing ---


def test_a_folder_that_is_not_finished_does_not_read_as_a_model(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 2).write_shard(1, {"a": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        read_manifest(tmp_path)


def test_shards_are_numbered_and_indexed_in_whatever_order_they_were_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 3)
    writer.write_shard(3, {"a": torch.ones(2, dtype=torch.int8)})
    writer.write_shard(1, {"b": torch.zeros(3)})
    writer.write_shard(2, {})
    assert writer.finish() == 14
    first, second, third = (f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first, second, third, INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 14}, "weight_map": {"a": third, "b": first}}
    assert sorted(TensorFolder(tmp_path)) == ["a", "b"]


def test_a_run_that_goes_on_may_write_the_rest_of_the_shards_and_write_one_again(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 2).write_shard(1, {"a": torch.zeros(3)})
    writer = ShardWriter(tmp_path, 2)
    writer.write_shard(1, {"a": torch.ones(3)})
    writer.write_shard(2, {"b": torch.zeros(1)})
    assert writer.finish() == 16
    assert TensorFolder(tmp_path).get("a").tolist() == [1, 1, 1]


def test_a_shard_that_could_not_be_written_whole_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(tensors: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(store, "save_file", fill_the_disk)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors cannot be written .*No space left"):
        write_model(tmp_path, {"a": torch.zeros(3)})
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_tensor_that_is_a_view_is_written_whole(tmp_path: Path) -> None:
    view = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(TensorFolder(write_model(tmp_path, {"a": view})).get("a"), view)


def test_shards_may_be_read_by_whoever_may_read_the_index(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": torch.zeros(1)})
    shard = tmp_path / "model-00001-of-00001.safetensors"
    assert oct(shard.stat().st_mode) == oct((tmp_path / INDEX).stat().st_mode)
