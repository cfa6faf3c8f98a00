"""``lrq-offline export --to dense``: an ordinary model that computes what the checkpoint means."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrq_offline.cli import main
from lrq_offline.config import QuantizeSettings
from lrq_offline.dense_export import export_dense
from lrq_offline.pipeline import quantize_model
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import SourceModel
from lrq_vllm.checkpoint.store import TensorFolder, read_config
from lrq_vllm.errors import LrqError, SettingsError
from tests.checkpoints import QUICK, TINY, Checkpoints, write_random_model

TOKENS = torch.arange(2, 66).unsqueeze(0)


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return load_model(folder, served_in=torch.bfloat16)(input_ids=TOKENS).logits


@pytest.mark.parametrize("scheme", ["w4a16", "w3a16"])
def test_a_dense_export_gives_the_checkpoint_s_numbers_to_the_bit(
    scheme: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = checkpoints(scheme, "lrq")
    export_dense(folder, tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "dense"), logits(folder))


@pytest.mark.parametrize(("family", "group_size"), [("phi3", 64), ("mixtral", 64), ("qwen3_moe-mixed", 32)])
def test_groups_fused_layers_and_experts_are_exported(family: str, group_size: int, tmp_path: Path) -> None:
    source = write_random_model(family, tmp_path / "float")
    quantize_model(source, tmp_path / "lrq", QuantizeSettings("w4a16", "rtn", group_size=group_size, **QUICK))
    export_dense(tmp_path / "lrq", tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "dense"), logits(tmp_path / "lrq"))


def test_a_dense_export_is_a_model_like_the_float_one(checkpoints: Checkpoints, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    assert main(["export", str(checkpoints("w4a16", "lrq")), "--to", "dense", "-o", str(dense)]) == 0
    assert read_config(dense) == read_config(TINY)
    wanted, found = TensorFolder(TINY), TensorFolder(dense)
    assert {name: found.spec(name) for name in found} == {name: wanted.spec(name) for name in wanted}
    assert not list(dense.glob("lrq_*")) and (dense / "tokenizer.json").is_file()
    SourceModel.open(dense)
    AutoModelForCausalLM.from_pretrained(dense)(input_ids=TOKENS)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_scheme_whose_activations_are_rounded_is_refused(
    scheme: str, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoints(scheme, "lrq")), "--to", "dense", "-o", str(tmp_path / "dense")]) == 2
    assert "round their inputs to 8 bits" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_8_bit_keys_and_values_are_refused(tmp_path: Path) -> None:
    quantize_model(TINY, tmp_path / "lrq", QuantizeSettings("w4a16", "rtn", kv_bits=8, **QUICK))
    with pytest.raises(SettingsError, match="asks for 8-bit keys and values"):
        export_dense(tmp_path / "lrq", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_an_output_that_exists_is_left_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(LrqError, match="is not empty"):
        export_dense(checkpoints("w4a16", "lrq"), tmp_path)
