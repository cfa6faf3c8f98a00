"""lrq-server serve: what it checks before it becomes vLLM, and what it hands over."""

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_server import checked_server
from lrq_server.cli import main
from lrq_vllm.checkpoint.store import INDEX_NAME
from tests.checkpoints import QUICK, TINY


class ExecutedError(Exception):
    """Stands for the process that would have been replaced."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of the exec call that a good ``serve`` ends with."""
    calls: list[Any] = []

    def execvpe(file: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        calls.extend([file, arguments, environment])
        raise ExecutedError

    monkeypatch.setattr(os, "execvpe", execvpe)
    return calls


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("server") / "w4a16"
    quantize_model(TINY, output, QuantizeSettings(scheme="w4a16", method="rtn", **QUICK))
    return output


def test_serve_hands_every_option_to_vllm(checkpoint: Path, executed: list[Any]) -> None:
    with pytest.raises(ExecutedError):
        main(["serve", str(checkpoint), "--port", "8080", "--enforce-eager"])
    program, arguments, environment = executed
    assert Path(program).name == "vllm"
    assert arguments[1:] == ["serve", str(checkpoint), "--quantization", "lrq", "--port", "8080", "--enforce-eager"]
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_serve_gives_a_checkpoint_the_cache_that_it_asks_for(tmp_path: Path, executed: list[Any]) -> None:
    quantize_model(TINY, tmp_path / "kv8", QuantizeSettings(scheme="w4a16", method="rtn", kv_bits=8, **QUICK))
    for options, wanted in (([], "fp8"), (["--kv-cache-dtype=auto"], None), (["--kv-cache-dtype", "auto"], None)):
        executed.clear()
        with pytest.raises(ExecutedError):
            main(["serve", str(tmp_path / "kv8"), *options])
        given = ["--kv-cache-dtype", wanted if not torch.cuda.is_available() else "int8_per_token_head"] if wanted else options
        assert executed[1][5:] == given


@pytest.mark.parametrize("option", ["--tensor-parallel-size=2", "-tp=2"])
def test_serve_hands_a_number_of_gpus_on_that_can_serve(option: str, checkpoint: Path, executed: list[Any]) -> None:
    with pytest.raises(ExecutedError):
        main(["serve", str(checkpoint), option])
    assert executed[1][-2:] == ["--tensor-parallel-size", "2"]


def test_serve_refuses_a_number_of_gpus_that_cannot_serve(
    checkpoint: Path, executed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(checkpoint), "--tensor-parallel-size", "3"]) == 2
    assert "Use 2 or 4." in capsys.readouterr().err
    assert not executed


def test_serve_refuses_an_unquantized_model(executed: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(TINY)]) == 2
    assert "lrq-offline quantize" in capsys.readouterr().err
    assert not executed


def test_serve_names_a_missing_file(
    checkpoint: Path, tmp_path: Path, executed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shards = sorted(checkpoint.glob("*.safetensors"))
    for path in (checkpoint / "config.json", checkpoint / INDEX_NAME, *shards[1:]):
        (damaged / path.name).write_bytes(path.read_bytes())
    assert main(["serve", str(damaged)]) == 2
    assert f"file {shards[0].name} is missing" in capsys.readouterr().err
    assert not executed


def test_with_the_self_test_the_checked_server_takes_the_options(
    checkpoint: Path, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRQ_SELFTEST", "1")
    with pytest.raises(ExecutedError):
        main(["serve", str(checkpoint), "--port", "8080"])
    assert executed[1][1:] == [
        "-m", "lrq_server.checked_server", str(checkpoint), "--quantization", "lrq", "--port", "8080",
    ]  # fmt: skip


@pytest.mark.vllm
@pytest.mark.parametrize("options", [["--api-server-count", "2"], ["--data-parallel-size", "2"], ["--headless"]])
def test_the_checked_server_refuses_what_it_cannot_test(
    checkpoint: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked_server.main([str(checkpoint), *options]) == 2
    assert "Unset LRQ_SELFTEST" in capsys.readouterr().err
