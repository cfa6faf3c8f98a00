"""A changed checkpoint is refused, by ``lrq-offline verify`` and by vLLM, and what was changed is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrq_offline.cli import main
from lrq_offline.golden_texts import golden_texts
from lrq_offline.reference_model import load_model
from lrq_offline.verification import _cause, check_files
from lrq_vllm.checkpoint.golden import GOLDEN_NAME, GoldenText, GoldenTexts, mean_difference, read_golden, write_golden
from lrq_vllm.checkpoint.seal import SEAL_NAME
from lrq_vllm.checkpoint.store import TensorFolder, read_config
from lrq_vllm.errors import CheckpointError, LrqError
from lrq_vllm.vllm_environment import serving_environment
from tests.refusals import CPU_VLLM, said_of

Tensors = dict[str, Tensor]


def vllm_config(folder: Path) -> None:
    """What vLLM does before it loads anything; raises what it says of the folder."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(folder), quantization="lrq", max_model_len=64).create_engine_config()


# --- what may happen to one tensor ---


def removed(tensors: Tensors, name: str) -> None:
    del tensors[name]


def renamed(tensors: Tensors, name: str) -> None:
    tensors[f"{name}_"] = tensors.pop(name)


def transposed(tensors: Tensors, name: str) -> None:
    """Also where the shape stays the same; what has one dimension is turned round."""
    tensor = tensors[name]
    tensors[name] = (tensor.T if tensor.dim() == 2 and min(tensor.shape) > 1 else tensor.flip(0)).contiguous()


def truncated(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:-1].contiguous()


MUTATIONS = [removed, renamed, transposed, truncated]


def rewrite(path: Path, name: str, change: Callable[[Tensors, str], None]) -> bool:
    """Change one tensor of a file; whether that made a difference."""
    tensors = load_file(path)
    before = tensors[name]
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return name not in tensors or not torch.equal(tensors[name], before)


@pytest.mark.parametrize("change", MUTATIONS, ids=lambda change: change.__name__)
def test_each_changed_tensor_is_named(copy: Path, change: Callable[[Tensors, str], None]) -> None:
    names = [name for name in TensorFolder(copy) if ".layers." not in name or ".layers.1." in name]
    assert len(names) > 36
    files = {name: TensorFolder(copy).file_of(name) for name in names}
    for name, path in files.items():
        original = path.read_bytes()
        if rewrite(path, name, change):
            assert name in said_of(check_files, copy)
        path.write_bytes(original)
    assert check_files(copy) > len(names)


@pytest.mark.vllm
@CPU_VLLM
@pytest.mark.parametrize("change", MUTATIONS, ids=lambda change: change.__name__)
def test_vllm_names_each_changed_tensor(
    copy: Path, change: Callable[[Tensors, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)
    block = "model.layers.1"
    names = [name for name in TensorFolder(copy) if name.startswith((f"{block}.self_attn.o_proj", f"{block}.input_layernorm"))]
    for name in [*names, "model.embed_tokens.weight"]:
        path = TensorFolder(copy).file_of(name)
        original = path.read_bytes()
        if rewrite(path, name, change):
            assert name in said_of(vllm_config, copy)
        path.write_bytes(original)
    vllm_config(copy)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in serving_environment().items():
        monkeypatch.setenv(name, value)


# --- what may happen to one key of config.json ---


def config_mutations(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each key gone, under another name, and with another value."""
    changed = []
    for key in config:
        rest = {other: value for other, value in config.items() if other != key}
        changed += [(key, rest), (key, {**rest, f"{key}_": config[key]})]
    for key in ("rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "eos_token_id"):
        changed.append((key, {**config, key: {"rms_norm_eps": 1e-6, "hidden_act": "gelu"}.get(key)}))
    return changed


def test_each_changed_key_of_the_config_is_named(copy: Path) -> None:
    for key, config in config_mutations(read_config(copy)):
        (copy / "config.json").write_text(json.dumps(config))
        assert key in said_of(check_files, copy)


@pytest.mark.vllm
@CPU_VLLM
def test_vllm_names_each_changed_key_of_the_config(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    for key, config in config_mutations(read_config(copy)):
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(Exception, match=key):  # some keys vLLM itself misses first
            vllm_config(copy)


@pytest.mark.parametrize("key", ["scheme", "weight", "activation", "quantized", "skipped", "tool_version"])
def test_each_changed_key_of_the_manifest_is_named(copy: Path, key: str) -> None:
    config = read_config(copy)
    del config["quantization_config"][key]
    (copy / "config.json").write_text(json.dumps(config))
    assert key in said_of(check_files, copy)


# --- the two files that tell ---


@pytest.mark.parametrize("name", [SEAL_NAME, GOLDEN_NAME])
def test_a_missing_or_damaged_record_is_refused(copy: Path, name: str) -> None:
    for content in ("{}", "[]", "no JSON", None):
        (copy / name).write_text(content) if content is not None else (copy / name).unlink()
        assert name in said_of(check_files, copy)


def test_the_golden_texts_are_the_reference_path_s_own(sealed: Path) -> None:
    golden = read_golden(sealed)
    tokens = torch.tensor([text.tokens for text in golden.texts])
    found = {}
    for dtype in (torch.bfloat16, None):
        logits = load_model(sealed, served_in=dtype)(input_ids=tokens, use_cache=False).logits[:, :-1]
        found[dtype] = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    assert mean_difference(golden.texts, found[torch.bfloat16].tolist()) < 1e-4
    assert mean_difference(golden.texts, found[None].tolist()) == pytest.approx(golden.rounding, abs=1e-3) != 0


def test_what_rounding_does_is_measured_in_bfloat16_whatever_the_model_s_dtype(sealed: Path) -> None:
    golden, config = read_golden(sealed), read_config(sealed) | {"dtype": "float16"}
    windows = torch.tensor([text.tokens for text in golden.texts])
    in_float16 = golden_texts(sealed, config, windows, torch.device("cpu"))
    assert in_float16.rounding == golden.rounding and in_float16.texts != golden.texts


def test_golden_texts_read_a_block_at_a_time(sealed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    get = TensorFolder.get

    def watched(self: TensorFolder, name: str) -> Tensor:
        read.append(name)
        return get(self, name)

    monkeypatch.setattr(TensorFolder, "get", watched)
    golden = read_golden(sealed)
    windows = torch.tensor([text.tokens for text in golden.texts])
    assert golden_texts(sealed, read_config(sealed), windows, torch.device("cpu")) == golden
    passes = [read[: len(read) // 2], read[len(read) // 2 :]]  # with the roundings of a server, and without
    for names in passes:
        blocks = [name.split(".")[2] for name in names if ".layers." in name]
        assert blocks == sorted(blocks) and len(names) == len(set(names))
    assert passes[0] == passes[1]


@pytest.mark.parametrize(
    "text",
    [
        {"tokens": [5], "log_probabilities": []},
        {"tokens": ["five", 6], "log_probabilities": [-1.0]},
        {"tokens": [5, 6], "log_probabilities": [[-1.0]]},
    ],
    ids=str,
)
def test_golden_texts_without_numbers_are_refused(text: dict[str, Any], copy: Path) -> None:
    golden = json.loads((copy / GOLDEN_NAME).read_text()) | {"texts": [text]}
    (copy / GOLDEN_NAME).write_text(json.dumps(golden))
    assert f"{GOLDEN_NAME} is damaged" in said_of(check_files, copy)


@pytest.mark.parametrize("rounding", [None, "0.1 nats", -0.1, float("nan"), float("inf")])
def test_golden_texts_that_do_not_say_what_rounding_does_are_refused(rounding: Any, copy: Path) -> None:
    golden = json.loads((copy / GOLDEN_NAME).read_text()) | {"rounding": rounding}
    (copy / GOLDEN_NAME).write_text(json.dumps(golden))
    assert f"{GOLDEN_NAME} is damaged" in said_of(check_files, copy)


def test_a_server_may_be_as_far_away_as_rounding_takes_it() -> None:
    weights_alone, four_bit_activations = GoldenTexts([], 0.02), GoldenTexts([], 0.44)  # both seen, and on a GPU 0.025 and 0.42
    assert weights_alone.tolerance() == pytest.approx(0.08)
    assert four_bit_activations.tolerance() == pytest.approx(1.34)
    assert weights_alone.tolerance(eight_bit_cache=True) == pytest.approx(0.38)


# --- without vLLM ---


def test_verify_without_vllm_says_what_it_left_out(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sealed), "--files-only"]) == 0
    assert "not tried" in capsys.readouterr().out


def test_numbers_that_are_not_finite_never_pass(tmp_path: Path) -> None:
    write_golden(tmp_path, GoldenTexts([GoldenText([1, 2, 3], [-1.0, -2.0])], 0.01))
    (text,) = read_golden(tmp_path).texts
    assert mean_difference([text], [[-1.5, -2.0]]) == 0.25
    difference = mean_difference([text], [[float("nan"), -2.0]])
    assert not difference <= 1e9


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LrqError, match=r"has no config\.json"):
        check_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not quantized"):
        check_files(tmp_path)


def test_why_a_rank_failed_is_found_in_what_it_said() -> None:
    log = """(Worker_TP1 pid=7) ERROR 11-30 [x.py:1] AssertionError: 512 is not divisible by 3
    (Worker_TP1 pid=7) ERROR 11-30 [x.py:1] lrq_vllm.errors.SettingsError: LRQ_KERNEL is 'foo'. Unset it.
    Exception: WorkerProc initialization failed due to an exception in a background process."""
    assert _cause(log) == "LRQ_KERNEL is 'foo'. Unset it."
    assert _cause(log.replace("lrq_vllm.errors.SettingsError", "loading")) == "512 is not divisible by 3"
    assert _cause("nothing of the kind") is None
