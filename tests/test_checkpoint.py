"""The checkpoint format, held to literal bytes; docs/checkpoint-format.md shows the same bytes."""

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lrq_vllm.checkpoint import store
from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.packing import STORED_BITS, pack, packed_width, storage_dtype, unpack, values_per_group
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest, TensorSpec, WeightFormat, config_without_quantization
from lrq_vllm.checkpoint.store import ShardWriter, TensorFolder, check_tensors, read_config, read_manifest
from lrq_vllm.errors import CheckpointError, ModelFolderError

SPECIFICATION = Path(__file__).parents[1] / "docs" / "checkpoint-format.md"
INDEX = "model.safetensors.index.json"
MODULE = "model.layers.0.mlp.down_proj"

# The worked examples of the specification: bits, one row of integers, the bytes on disk.
GOLDEN_ROWS = [
    (8, [0, 1, 127, 128, 255], "80 81 ff 00 7f"),
    (4, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "21 43 65 87 a9 00 00 00"),
    (2, [0, 1, 2, 3, 3, 2, 1, 0, 1], "e4 1b 01 00"),
    (
        3,
        [0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 6],
        "e4 e4 1b 1b 55 55 00 80 f0 0f 00 ff",
    ),
]

# The whole of a small checkpoint, as in the specification.
GOLDEN_MANIFEST = """\
{
  "quant_method": "lrq",
  "format_version": 1,
  "tool_version": "0.1.0",
  "scheme": "w8a8",
  "weight": {
    "bits": 8,
    "granularity": "channel",
    "group_size": null,
    "symmetric": false,
    "packed_along": "input"
  },
  "activation": {
    "bits": 8,
    "granularity": "tensor",
    "mode": "static",
    "symmetric": false
  },
  "kv_cache": null,
  "tensor_parallel_sizes": [
    1
  ],
  "correction": null,
  "online_hadamard": null,
  "quantized": {
    "model.layers.0.mlp.down_proj": [
      2,
      3
    ]
  },
  "skipped": [
    "lm_head"
  ]
}
"""
GOLDEN_HEADER = """\
{
  "__metadata__": {"format": "pt"},
  "model.layers.0.mlp.down_proj.input_step": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
  "model.layers.0.mlp.down_proj.weight_step": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]},
  "model.layers.0.input_layernorm.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [12, 18]},
  "model.layers.0.mlp.down_proj.qweight": {"dtype": "I8", "shape": [2, 3], "data_offsets": [18, 24]},
  "model.layers.0.mlp.down_proj.input_zero_point": {"dtype": "U8", "shape": [1], "data_offsets": [24, 25]},
  "model.layers.0.mlp.down_proj.weight_zero_point": {"dtype": "U8", "shape": [2, 1], "data_offsets": [25, 27]}
}
"""
GOLDEN_DATA = "0000803d 0000003f 0000803e 803f 0040 c0bf 80007f 81ff00 80 6480"
GOLDEN_INDEX = """\
{
  "metadata": {
    "total_size": 27
  },
  "weight_map": {
    "model.layers.0.input_layernorm.weight": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.input_step": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.input_zero_point": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.qweight": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.weight_step": "model-00001-of-00001.safetensors",
    "model.layers.0.mlp.down_proj.weight_zero_point": "model-00001-of-00001.safetensors"
  }
}
"""


def stored_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def random_integers(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


def manifest_of(scheme: str, shape: tuple[int, int] = (2, 64), **weight: Any) -> Manifest:
    return Manifest(scheme, WeightFormat(SCHEMES[scheme].weight_bits, **weight), {MODULE: shape}, ("lm_head",), "0.1.0")


def golden_tensors() -> dict[str, Tensor]:
    return {
        "model.layers.0.input_layernorm.weight": torch.tensor([1.0, 2.0, -1.5], dtype=torch.bfloat16),
        f"{MODULE}.qweight": pack(torch.tensor([[0, 128, 255], [1, 127, 128]]), 8),
        f"{MODULE}.weight_step": torch.tensor([[0.5], [0.25]]),
        f"{MODULE}.weight_zero_point": torch.tensor([[100], [128]], dtype=torch.uint8),
        f"{MODULE}.input_step": torch.tensor([0.0625]),
        f"{MODULE}.input_zero_point": torch.tensor([128], dtype=torch.uint8),
    }


def write_model(folder: Path, tensors: dict[str, Tensor]) -> Path:
    writer = ShardWriter(folder, 1)
    writer.write_shard(1, tensors)
    writer.finish()
    return folder


# --- packing ---


@given(bits=st.sampled_from(STORED_BITS), rows=st.integers(1, 4), columns=st.integers(1, 101), seed=st.integers(0, 999))
def test_packing_round_trips_every_width(bits: int, rows: int, columns: int, seed: int) -> None:
    q = random_integers(rows, columns, bits, seed)
    stored = pack(q, bits)
    assert (stored.dtype, tuple(stored.shape)) == (storage_dtype(bits), (rows, packed_width(columns, bits)))
    assert torch.equal(unpack(stored, bits, columns), q.to(torch.uint8))


@pytest.mark.parametrize("bits", STORED_BITS)
@pytest.mark.parametrize("value", [0, -1], ids=["lowest", "highest"])
def test_packing_round_trips_the_ends_of_the_grid(bits: int, value: int) -> None:
    q = torch.full((2, 67), value % 2**bits, dtype=torch.uint8)
    assert torch.equal(unpack(pack(q, bits), bits, 67), q)


@pytest.mark.parametrize(("bits", "row", "expected"), GOLDEN_ROWS)
def test_packed_rows_are_these_bytes(bits: int, row: list[int], expected: str) -> None:
    assert stored_bytes(pack(torch.tensor([row]), bits)) == bytes.fromhex(expected)


@pytest.mark.parametrize(("bits", "row", "expected"), GOLDEN_ROWS)
def test_these_bytes_unpack_to_the_rows(bits: int, row: list[int], expected: str) -> None:
    stored = torch.frombuffer(bytearray.fromhex(expected), dtype=storage_dtype(bits)).unsqueeze(0)
    assert unpack(stored, bits, len(row)).tolist() == [row]


@pytest.mark.parametrize(("bits", "width"), [(4, 1), (3, 3), (2, 1)])
def test_packing_pads_a_short_row_with_zero_bits(bits: int, width: int) -> None:
    stored = pack(torch.full((1, 1), 2**bits - 1), bits)
    ones = sum(bin(byte).count("1") for byte in stored_bytes(stored))
    assert (stored.shape[1], ones) == (width, bits)


@pytest.mark.parametrize("bits", STORED_BITS)
def test_a_packed_row_can_be_cut_at_every_whole_group(bits: int) -> None:
    group, columns = values_per_group(bits), 4 * values_per_group(bits)
    q = random_integers(3, columns, bits)
    stored = pack(q, bits)
    for cut in range(group, columns, group):
        at = packed_width(cut, bits)
        assert torch.equal(stored[:, :at], pack(q[:, :cut], bits))
        assert torch.equal(stored[:, at:], pack(q[:, cut:], bits))


# --- the files, literally ---


def test_a_small_checkpoint_is_these_bytes(tmp_path: Path) -> None:
    write_model(tmp_path, golden_tensors())
    shard = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    (header_size,) = struct.unpack("<Q", shard[:8])
    assert json.loads(shard[8 : 8 + header_size]) == json.loads(GOLDEN_HEADER)
    assert shard[8 + header_size :].hex(" ") == bytes.fromhex(GOLDEN_DATA).hex(" ")
    assert (tmp_path / INDEX).read_text() == GOLDEN_INDEX


def test_a_manifest_is_this_json() -> None:
    assert json.dumps(manifest_of("w8a8", (2, 3)).to_dict(), indent=2) + "\n" == GOLDEN_MANIFEST


SHOWN = [text for _, row, stored in GOLDEN_ROWS for text in (", ".join(map(str, row)), stored)]


@pytest.mark.parametrize("text", [*SHOWN, GOLDEN_MANIFEST, GOLDEN_HEADER, GOLDEN_DATA, GOLDEN_INDEX])
def test_the_specification_shows_the_bytes_that_are_tested_here(text: str) -> None:
    assert text in SPECIFICATION.read_text()


def test_the_golden_files_are_a_checkpoint_that_passes_the_checks(tmp_path: Path) -> None:
    write_model(tmp_path, golden_tensors())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": json.loads(GOLDEN_MANIFEST)}))
    check_tensors(TensorFolder(tmp_path), read_manifest(tmp_path))


# --- the manifest ---


MANIFESTS = {
    "w8a8": manifest_of("w8a8"),
    "w4a8 symmetric": manifest_of("w4a8", symmetric=True),
    "w4a16": manifest_of("w4a16", (5, 33)),
    "w3a16 in groups": manifest_of("w3a16", group_size=32),
    "w4a4, rotated and corrected": replace(
        manifest_of("w4a4", (5, 24)),
        correction=Correction(torch.float16, {MODULE: 3}),
        online_hadamard=OnlineHadamard((MODULE,), 24, 12),
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_survives_json(name: str) -> None:
    assert Manifest.from_dict(json.loads(json.dumps(MANIFESTS[name].to_dict()))) == MANIFESTS[name]


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_survives_pickling(name: str) -> None:
    read = Manifest.from_dict(MANIFESTS[name].to_dict())  # holds mapping proxies, which pickle refuses by themselves
    assert pickle.loads(pickle.dumps(read)) == read


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (
            manifest_of("w8a8", (5, 33)),
            {
                "qweight": TensorSpec(torch.int8, (5, 33)),
                "weight_step": TensorSpec(torch.float32, (5, 1)),
                "weight_zero_point": TensorSpec(torch.uint8, (5, 1)),
                "input_step": TensorSpec(torch.float32, (1,)),
                "input_zero_point": TensorSpec(torch.uint8, (1,)),
            },
        ),
        (
            manifest_of("w4a8", (5, 33)),
            {
                "qweight": TensorSpec(torch.int32, (5, 5)),
                "weight_step": TensorSpec(torch.float32, (5, 1)),
                "weight_zero_point": TensorSpec(torch.uint8, (5, 1)),
            },
        ),
        (
            manifest_of("w3a16", (5, 96), group_size=32),
            {
                "qweight": TensorSpec(torch.int32, (5, 9)),
                "weight_step": TensorSpec(torch.float32, (5, 3)),
                "weight_zero_point": TensorSpec(torch.uint8, (5, 3)),
            },
        ),
        (
            MANIFESTS["w4a4, rotated and corrected"],
            {
                "qweight": TensorSpec(torch.int32, (5, 3)),
                "weight_step": TensorSpec(torch.float32, (5, 1)),
                "weight_zero_point": TensorSpec(torch.uint8, (5, 1)),
                "input_clip": TensorSpec(torch.float32, (1,)),
                "low_rank_u": TensorSpec(torch.float16, (5, 3)),
                "low_rank_v": TensorSpec(torch.float16, (24, 3)),
            },
        ),
    ],
    ids=["w8a8", "w4a8", "w3a16 in groups", "w4a4, rotated and corrected"],
)
def test_a_manifest_implies_these_tensors(manifest: Manifest, expected: dict[str, TensorSpec]) -> None:
    assert manifest.tensors_of(MODULE) == expected


def test_a_manifest_can_be_taken_off_a_config() -> None:
    config = {"model_type": "llama", "quantization_config": json.loads(GOLDEN_MANIFEST)}
    assert config_without_quantization(config) == {"model_type": "llama"}


def grouped(size: Any) -> dict[str, Any]:
    return {"bits": 4, "granularity": "group", "group_size": size, "symmetric": False, "packed_along": "input"}


REFUSED_MANIFESTS = {
    "another method": ({"quant_method": "gptq"}, "quant_method 'gptq'"),
    "a later version": ({"format_version": 2}, "format_version 2"),
    "no version": ({"format_version": None}, "format_version None"),
    "an unknown key": ({"rotation": True}, "key 'rotation' is unknown"),
    "an unknown scheme": ({"scheme": "w5a16"}, "scheme 'w5a16' is none of w8a8, w4a8, w4a16, w3a16, w2a16, w4a4"),
    "a scheme that is no name": ({"scheme": ["w4a16"]}, "scheme"),
    "bits of another scheme": ({"weight": {**grouped(32), "bits": 3}}, "w4a16 has 4-bit weights, weight.bits says 3"),
    "activations of another scheme": (
        {"activation": {"bits": 8}},
        "activation is {'bits': 8} where scheme w4a16 means None",
    ),
    "sizes that fall": ({"tensor_parallel_sizes": [2, 1]}, "tensor_parallel_sizes is [2, 1]"),
    "no sizes": ({"tensor_parallel_sizes": []}, "tensor_parallel_sizes is []"),
    "sizes that are no list": ({"tensor_parallel_sizes": 2}, "wrong form"),
    "another cache": ({"kv_cache": {"bits": 8}}, "kv_cache is {'bits': 8} where this version knows null and {'bits': 8, 'gran"),
    "packing along the outputs": ({"weight": {**grouped(32), "packed_along": "output"}}, "'packed_along': 'output'"),
    "an unknown key of weight": ({"weight": {**grouped(32), "order": "gptq"}}, "'order': 'gptq'"),
    "a weight without symmetric": ({"weight": {"bits": 4, "group_size": None}}, "'symmetric'"),
    "a correction of no module": ({"correction": {"dtype": "bfloat16", "rank": {}}}, "correction lists no module"),
    "a correction in 32 bits": ({"correction": {"dtype": "float32", "rank": {MODULE: 1}}}, "wrong form"),
    "a correction of another module": (
        {"correction": {"dtype": "bfloat16", "rank": {"lm_head": 1}}},
        "correction lists lm_head, which is not quantized",
    ),
    "a rank above the layer's": (
        {"correction": {"dtype": "bfloat16", "rank": {MODULE: 3}}},
        f"rank 3 for {MODULE}, whose ranks are 1 to 2",
    ),
    "a rank that is no whole number": (
        {"correction": {"dtype": "bfloat16", "rank": {MODULE: 1.5}}},
        "where this version knows null and",
    ),
    "an unknown key of correction": (
        {"correction": {"dtype": "bfloat16", "rank": {MODULE: 1}, "bits": 8}},
        "where this version knows null and",
    ),
    "a rotation of no module": ({"online_hadamard": {"modules": [], "block": 64, "order": 1}}, "lists no module"),
    "a rotation of another module": (
        {"online_hadamard": {"modules": ["lm_head"], "block": 64, "order": 1}},
        "online_hadamard lists lm_head, which is not quantized",
    ),
    "a rotation that is no matrix": (
        {"online_hadamard": {"modules": [MODULE], "block": 48, "order": 3}},
        "no Hadamard matrix has block 48 and order 3",
    ),
    "a rotation that cuts": (
        {"online_hadamard": {"modules": [MODULE], "block": 48, "order": 12}},
        f"block 48 does not divide the 64 inputs of {MODULE}",
    ),
    "no quantized module": ({"quantized": {}}, "no module is listed as quantized"),
    "modules without shapes": ({"quantized": [MODULE]}, "wrong form"),
    "a shape that is text": ({"quantized": {MODULE: "264"}}, MODULE),
    "a shape of three numbers": ({"quantized": {MODULE: [2, 64, 1]}}, MODULE),
    "a negative shape": ({"quantized": {MODULE: [-2, 64]}}, MODULE),
    "skipped that is text": ({"skipped": "lm_head"}, "skipped"),
    "groups that do not divide": ({"weight": grouped(96)}, f"group_size 96 does not divide the 64 inputs of {MODULE}"),
    "groups of none": ({"weight": grouped(0)}, "group_size 0"),
    "groups that cut words": ({"weight": grouped(4)}, "group_size 4"),
    "groups too small for the kernels": ({"weight": grouped(8)}, "group_size 8"),
    "groups of 8-bit weights": (
        {"scheme": "w8a8", "activation": MANIFESTS["w8a8"].to_dict()["activation"], "weight": {**grouped(32), "bits": 8}},
        "8-bit weights have one step per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED_MANIFESTS)
def test_a_manifest_refuses(name: str) -> None:
    changes, words = REFUSED_MANIFESTS[name]
    with pytest.raises(CheckpointError) as error:
        Manifest.from_dict({**manifest_of("w4a16").to_dict(), **changes})
    assert words in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "tool_version",
        "scheme",
        "weight",
        "activation",
        "kv_cache",
        "tensor_parallel_sizes",
        "correction",
        "quantized",
        "skipped",
    ],
)
def test_a_manifest_without_a_key_is_refused_by_its_name(key: str) -> None:
    config = manifest_of("w4a16").to_dict()
    del config[key]
    with pytest.raises(CheckpointError, match=f"key '{key}' is missing"):
        Manifest.from_dict(config)


def test_a_manifest_follows_a_model_that_renames_its_modules() -> None:
    manifest = MANIFESTS["w4a4, rotated and corrected"].renamed(lambda name: f"language_model.{name}")
    assert manifest.correction is not None and manifest.online_hadamard is not None
    renamed = f"language_model.{MODULE}"
    assert list(manifest.quantized) == list(manifest.correction.rank) == list(manifest.online_hadamard.modules) == [renamed]
    assert manifest.skipped == ("language_model.lm_head",)


def test_a_manifest_keeps_the_bits_of_keys_and_values() -> None:
    manifest = replace(manifest_of("w8a8"), kv_bits=8)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_a_damaged_manifest_is_told_everything_that_is_wrong_with_it() -> None:
    config = {**manifest_of("w4a16").to_dict(), "kv_cache": 8, "quantized": {}}
    with pytest.raises(CheckpointError, match=r"kv_cache is 8.*no module is listed"):
        Manifest.from_dict(config)


# --- reading a folder ---


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    tensors = TensorFolder(write_model(tmp_path, golden_tensors()))
    assert sorted(tensors) == sorted(golden_tensors())
    for name, expected in golden_tensors().items():
        assert tensors.spec(name) == TensorSpec(expected.dtype, tuple(expected.shape))
        assert torch.equal(tensors.get(name), expected)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere is not a folder"):
        read_config(tmp_path / "nowhere")


def test_a_missing_folder_of_tensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere"):
        TensorFolder(tmp_path / "nowhere")


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[]", "is not a JSON object")])
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


# --- the tensors against the manifest ---

REFUSED_TENSORS: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": ("weight_step", None, f"tensor {MODULE}.weight_step is missing"),
    "wrong shape": (
        "qweight",
        torch.zeros(2, 4, dtype=torch.int8),
        f"tensor {MODULE}.qweight is int8 [2, 4], expected int8 [2, 3]",
    ),
    "wrong dtype": (
        "weight_zero_point",
        torch.zeros(2, 1),
        f"tensor {MODULE}.weight_zero_point is float32 [2, 1], expected uint8 [2, 1]",
    ),
    "low rank": ("low_rank_u", torch.zeros(2, 1), f"tensor {MODULE}.low_rank_u belongs to a low-rank correction"),
    "low rank, the other": (
        "low_rank_v",
        torch.zeros(3, 1),
        f"tensor {MODULE}.low_rank_v belongs to a low-rank correction",
    ),
    "float weight too": ("weight", torch.zeros(2, 3), f"{MODULE}.weight stands beside the quantized tensors"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_tensors_that_contradict_the_manifest_are_named(tmp_path: Path, name: str) -> None:
    suffix, replacement, words = REFUSED_TENSORS[name]
    tensors = golden_tensors()
    tensors.pop(f"{MODULE}.{suffix}", None)
    if replacement is not None:
        tensors[f"{MODULE}.{suffix}"] = replacement
    with pytest.raises(CheckpointError) as error:
        check_tensors(TensorFolder(write_model(tmp_path, tensors)), manifest_of("w8a8", (2, 3)))
    assert words in str(error.value)


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
