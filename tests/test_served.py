"""The real thing against the reference path: ``vllm serve`` asked over HTTP."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lrq_offline.agreement import Agreement, agreement_with_reference
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.compressed_tensors_export import export_compressed_tensors
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_offline.source_model import load_tokenizer
from lrq_server.vllm_process import VllmServer, start_vllm, vllm_command
from lrq_vllm.vllm_environment import serving_environment
from tests.checkpoints import HELDOUT, QUICK, TINY, Checkpoints, with_16_bit_steps
from tests.vllm_layers import EQUAL, EXACT_BYTES, GREEDY_AGREEMENT, MEAN_DIFFERENCE, ROUNDS_ONCE, SAME_SUMS

pytestmark = [
    pytest.mark.server,
    # A GPU rounds elsewhere, and quantized activations magnify that: bench/served_agreement.py measures it there.
    pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU"),
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 32
OPTIONS = ("--max-model-len", "512")
# Where no number is compared: without compilation a server starts sooner.
EAGER = (*OPTIONS, "--enforce-eager")
PLUGIN = ("--quantization", "lrq")


@dataclass(frozen=True)
class Served:
    """What a server answered: log-probabilities of the prompts' tokens, and greedy continuations."""

    prompts: torch.Tensor  # int64 [prompts, tokens]
    log_probabilities: torch.Tensor  # [prompts, tokens - 1]
    continuations: torch.Tensor  # int64 [prompts, new tokens]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is for the kernel tests of this process, not for vLLM."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="module")
def served(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What a server of a checkpoint answered, compiled as vLLM does by default."""
    return answers({"w8a8": checkpoints("w8a8", "lrq")}, tmp_path_factory.mktemp("logs"), (*PLUGIN, *OPTIONS))["w8a8"]


@pytest.fixture(scope="module")
def exported(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By scheme, a checkpoint and its export as compressed-tensors, which changes nothing."""
    folder = tmp_path_factory.mktemp("exported")
    with_16_bit_steps(shutil.copytree(checkpoints("w4a16", "lrq"), folder / "w4a16"))
    quantize_model(TINY, folder / "w8a8", QuantizeSettings("w8a8", "smoothquant-rtn", symmetric=True, **QUICK))
    pairs = {scheme: (folder / scheme, folder / f"{scheme}-exported") for scheme in ("w4a16", "w8a8")}
    for checkpoint, export in pairs.values():
        assert export_compressed_tensors(checkpoint, export).step_change == 0
    return pairs


@pytest.fixture(scope="module")
def served_exports(exported: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """By scheme, what vLLM answered without the plugin."""
    logs = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        patch.setenv("VLLM_CPU_INT4_W4A8", "0")  # with AMX, vLLM would quantize the inputs of 4-bit weights
        found = answers({scheme: export for scheme, (_, export) in exported.items()}, logs, EAGER)
    for log in logs.iterdir():
        assert "for CompressedTensorsW" in log.read_text() and "lrq_vllm" not in log.read_text()
    return found


def answers(folders: dict[str, Path], logs: Path, options: tuple[str, ...]) -> dict[str, Served]:
    prompts = token_windows(load_tokenizer(TINY), read_texts(HELDOUT), PROMPTS, PROMPT_TOKENS)
    found, names = {}, list(folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for pair in (names[at : at + 2] for at in range(0, len(names), 2)):
            with ExitStack() as running:
                servers = {
                    name: running.enter_context(start_vllm(folders[name], logs / f"{name}.log", options)) for name in pair
                }
                for name, server in servers.items():
                    server.wait_until_ready()
                    found[name] = parse(prompts, complete(server, folders[name], prompts.tolist())["choices"])
    return found


def complete(server: VllmServer, model: Path, prompts: list[list[int]]) -> Any:
    request = {
        "model": str(model), "prompt": prompts, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
        "prompt_logprobs": 1, "return_token_ids": True,
    }  # fmt: skip
    return httpx.post(f"{server.url}/v1/completions", json=request, timeout=120).raise_for_status().json()


def parse(prompts: torch.Tensor, choices: list[dict[str, Any]]) -> Served:
    choices = sorted(choices, key=lambda choice: choice["index"])
    log_probabilities = [
        [
            places[str(token)]["logprob"]
            for places, token in zip(choice["prompt_logprobs"][1:], prompt[1:].tolist(), strict=True)
        ]
        for choice, prompt in zip(choices, prompts, strict=True)
    ]
    continuations = torch.tensor([choice["token_ids"] for choice in choices])
    return Served(prompts, torch.tensor(log_probabilities), continuations)


def test_served_numbers_are_those_of_the_reference_path(checkpoints: Checkpoints, served: Served) -> None:
    agreement = assert_agreement(checkpoints("w8a8", "lrq"), served)
    assert not SAME_SUMS or agreement.median_difference <= EQUAL


@pytest.mark.parametrize("scheme", ["w4a16", pytest.param("w8a8", marks=EXACT_BYTES)])
def test_an_export_is_served_without_the_plugin_as_the_reference_path_computes(
    scheme: str, exported: dict[str, tuple[Path, Path]], served_exports: dict[str, Served]
) -> None:
    rounds_once = ROUNDS_ONCE or scheme == "w8a8"
    assert_agreement(exported[scheme][0], served_exports[scheme], MEAN_DIFFERENCE * (1 if rounds_once else 2))


def assert_agreement(folder: Path, answer: Served, mean_difference: float = MEAN_DIFFERENCE) -> Agreement:
    agreement = agreement_with_reference(folder, answer.prompts, answer.log_probabilities, answer.continuations)
    print(f"{folder.name}: {agreement}")
    assert answer.continuations.shape == (PROMPTS, NEW_TOKENS)
    assert agreement.mean_difference <= mean_difference
    assert agreement.greedy_agreement >= GREEDY_AGREEMENT
    return agreement


def test_an_unquantized_model_is_served_as_before(tmp_path: Path) -> None:
    with start_vllm(TINY, tmp_path / "vllm.log", EAGER) as server:
        server.wait_until_ready()
        answer = complete(server, TINY, [[0, 280, 670]])
    assert len(answer["choices"][0]["token_ids"]) == NEW_TOKENS


def run_vllm(model: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        vllm_command(model, *EAGER, *options),
        env=serving_environment(), text=True, capture_output=True, timeout=240,
    )  # fmt: skip


def test_vllm_refuses_a_checkpoint_that_lacks_a_tensor(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoints("w4a8", "lrq"), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    # The manifest lists a module that no file holds.
    config["quantization_config"]["quantized"]["model.layers.9.mlp.up_proj"] = [768, 256]
    (folder / "config.json").write_text(json.dumps(config))
    ended = run_vllm(folder)
    assert ended.returncode == 2
    assert "tensor model.layers.9.mlp.up_proj.qweight is missing" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_vllm_says_that_an_unquantized_model_is_not_quantized() -> None:
    ended = run_vllm(TINY, "--quantization", "lrq")
    assert ended.returncode == 2
    assert "lrq-offline quantize" in ended.stderr
