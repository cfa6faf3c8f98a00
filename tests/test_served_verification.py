"""``lrq-offline verify``, and a server that tests itself, as they serve a checkpoint's golden texts by vLLM."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrq_offline.cli import main
from lrq_offline.verification import check_loading, check_serving
from lrq_server.vllm_process import VllmServer, start_server
from lrq_vllm.checkpoint.seal import write_seal
from lrq_vllm.checkpoint.store import TensorFolder, read_config
from lrq_vllm.errors import LrqError
from tests.checkpoints import Checkpoints
from tests.refusals import CPU_VLLM, said_of

pytestmark = [pytest.mark.server, CPU_VLLM]

Tensors = dict[str, Tensor]


def test_verify_says_right_of_a_right_checkpoint(sealed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(sealed)]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, each unchanged" in printed and "kernels onednn" in printed
    assert printed.splitlines()[-1].split() == ["verdict", "right"]


def test_verify_serves_compiled_when_asked(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    assert main(["verify", str(sealed), "--compiled"]) == 0
    printed = capsys.readouterr().out
    assert "texts, compiled: " in printed and "kernels onednn" in printed
    assert printed.splitlines()[-1].split() == ["verdict", "right"]
    assert any(tmp_path.glob("torch_compile_cache/*"))


def resealed(folder: Path, path: Path, change: Callable[[Tensors], None]) -> None:
    """A change that only vLLM can find: the seal is made anew."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    write_seal(folder, read_config(folder))


def test_tensors_that_vllm_ignores_or_lacks_are_named(copy: Path) -> None:
    bias, norm = "model.layers.1.self_attn.o_proj.bias", "model.layers.1.input_layernorm.weight"

    def change(tensors: Tensors) -> None:
        tensors[bias] = torch.zeros(256, dtype=torch.bfloat16)  # of a layer that has none in this model
        del tensors[norm]

    resealed(copy, TensorFolder(copy).file_of(norm), change)
    said = said_of(check_loading, copy)
    assert f"vLLM ignored tensor {bias}" in said and f"{norm} of vLLM's model got no tensor" in said


def lose_a_zero_point(folder: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight_zero_point"

    def change(tensors: Tensors) -> None:
        tensors[name] = torch.zeros_like(tensors[name])

    resealed(folder, TensorFolder(folder).file_of(name), change)


def mix_up_two_shards(folder: Path) -> None:
    """One layer as two tensor-parallel ranks hold it that took each other's rows."""
    module = "model.layers.1.mlp.gate_proj"

    def change(tensors: Tensors) -> None:
        for name in ("qweight", "weight_step", "weight_zero_point"):
            tensors[f"{module}.{name}"] = torch.cat(tensors[f"{module}.{name}"].chunk(2)[::-1])

    resealed(folder, TensorFolder(folder).file_of(f"{module}.qweight"), change)


@pytest.mark.parametrize("break_it", [lose_a_zero_point, mix_up_two_shards])
def test_a_fault_is_noticed_by_how_vllm_answers(break_it: Callable[[Path], None], copy: Path) -> None:
    break_it(copy)
    assert "nats on average" in said_of(check_serving, copy)


def test_two_ranks_answer_as_the_reference_path(checkpoints: Checkpoints) -> None:
    assert check_serving(checkpoints("w3a16", "lrq"), 2).mean_difference < 0.1


def self_testing_server(folder: Path, log: Path, patch: pytest.MonkeyPatch) -> AbstractContextManager[VllmServer]:
    patch.delenv("TRITON_INTERPRET", raising=False)
    patch.setenv("LRQ_SELFTEST", "1")
    program = str(Path(sys.executable).with_name("lrq-server"))
    return start_server([program, "serve", str(folder), "--max-model-len", "512", "--enforce-eager"], log)


def test_a_server_that_answers_wrongly_never_serves(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_a_zero_point(copy)
    with self_testing_server(copy, tmp_path / "log", monkeypatch) as server:
        with pytest.raises(LrqError, match="ended with code 2 before it served"):
            server.wait_until_ready()
    assert "nats on average" in (tmp_path / "log").read_text()
