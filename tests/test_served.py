"""The real thing: ``vllm serve`` as a child process, asked over HTTP, against the reference path."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lrq_offline.agreement import agreement_with_reference
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.source_model import load_tokenizer
from lrq_server.vllm_process import VllmServer, serving_environment, start_vllm, vllm_command
from tests.checkpoints import HELDOUT, SCHEMES, TINY, Checkpoints

pytestmark = [
    pytest.mark.server,
    # A GPU rounds elsewhere, and quantized activations magnify that: bench/served_agreement.py measures it there.
    pytest.mark.skipif(torch.cuda.is_available(), reason="the reference path rounds like vLLM on a CPU"),
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 32
OPTIONS = ("--max-model-len", "512")
# Where no number is compared: without compilation a server starts sooner.
EAGER = (*OPTIONS, "--enforce-eager")


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


@pytest.fixture(scope="module", params=SCHEMES)
def scheme_folder(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    return checkpoints(request.param, "lrq")


@pytest.fixture(scope="module")
def served(scheme_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server per scheme, compiled as vLLM does by default, asked once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        log = tmp_path_factory.mktemp("log") / "vllm.log"
        options = ("--quantization", "lrq", *OPTIONS)
        with start_vllm(scheme_folder, log, options) as server:
            server.wait_until_ready()
            prompts = token_windows(load_tokenizer(TINY), read_texts(HELDOUT), PROMPTS, PROMPT_TOKENS)
            answer = complete(server, scheme_folder, prompts.tolist())
        yield parse(prompts, answer["choices"])


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


def test_served_numbers_are_those_of_the_reference_path(scheme_folder: Path, served: Served) -> None:
    agreement = agreement_with_reference(scheme_folder, served.prompts, served.log_probabilities, served.continuations)
    print(f"{scheme_folder.name}: {agreement}")
    assert served.continuations.shape == (PROMPTS, NEW_TOKENS)
    assert agreement.mean_difference <= 0.02
    assert agreement.greedy_agreement >= 0.97


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
