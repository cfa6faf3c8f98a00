"""The checkpoint format, held to literal bytes; docs/checkpoint-format.md shows the same bytes."""

import json
import math
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_vllm.checkpoint.correction import Correction
from lrq_vllm.checkpoint.hadamard import OnlineHadamard
from lrq_vllm.checkpoint.schema import Manifest, TensorSpec, config_without_quantization
from lrq_vllm.checkpoint.store import TensorFolder, check_tensors, read_manifest
from lrq_vllm.errors import CheckpointError
from tests.small_checkpoint import (
    GOLDEN_DATA,
    GOLDEN_HEADER,
    GOLDEN_INDEX,
    GOLDEN_MANIFEST,
    GOLDEN_ROWS,
    INDEX,
    MODULE,
    golden_tensors,
    manifest_of,
    write_model,
)

SPECIFICATION = Path(__file__).parents[1] / "docs" / "checkpoint-format.md"


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
    "a size without end": ({"tensor_parallel_sizes": [1, math.inf]}, "wrong form"),
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
    "a rotation of a list": (
        {"online_hadamard": {"modules": [[1]], "block": 64, "order": 1}},
        "online_hadamard lists [1], which is not quantized",
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
