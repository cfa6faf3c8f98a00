#!/usr/bin/env python3
"""How closely vLLM's numbers follow the reference path: log-probabilities and greedy tokens, for each checkpoint.

    .venv/bin/python bench/served_agreement.py demo-out/tiny-* --text tests/data/heldout.jsonl \
        --out bench/results/served-agreement.json

Runs vLLM in one child process per checkpoint and mode (eager; compiled, which is vLLM's default), in bfloat16.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lrq_vllm.golden_replay import kernels_of, prompt_log_probabilities
from lrq_vllm.vllm_environment import serving_environment

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print("RESULT " + json.dumps(measure(arguments.folders[0], arguments.text, arguments.modes[0])))
        return
    rows = [measure_in_child(folder, arguments.text, mode) for folder in arguments.folders for mode in arguments.modes]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities()["cpu_name"]
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": {"torch": version("torch"), "vllm": version("vllm"), "transformers": version("transformers")},
        "positions": f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} greedy tokens each, bfloat16",
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'checkpoint':<14}{'mode':<10}{'mean |diff|':>12}{'max':>10}{'greedy':>9}  kernel")
    for row in rows:
        print(
            f"{row['checkpoint']:<14}{row['mode']:<10}{row['mean_difference']:>12.2e}{row['max_difference']:>10.2e}"
            f"{row['greedy_agreement']:>9.2%}  {', '.join(row['kernels'])}"
        )


def measure_in_child(folder: Path, text: Path, mode: str) -> dict[str, Any]:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"} | serving_environment()
    command = [sys.executable, __file__, str(folder), "--text", str(text), "--modes", mode, "--child"]
    ended = subprocess.run(command, env=environment, text=True, capture_output=True)
    results = [line for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        sys.exit(f"{folder} {mode} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    return json.loads(results[0].removeprefix("RESULT "))


def measure(folder: Path, text: Path, mode: str) -> dict[str, Any]:
    """Serve in this process, then compare with the reference path on the same texts."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from lrq_offline.agreement import agreement_with_reference
    from lrq_offline.calibration import token_windows
    from lrq_offline.calibration_text import read_texts
    from lrq_offline.source_model import load_tokenizer

    prompts = token_windows(load_tokenizer(folder), read_texts(text), PROMPTS, PROMPT_TOKENS)
    llm = LLM(
        str(folder), dtype="bfloat16", enforce_eager=mode == "eager", max_model_len=512, enable_prefix_caching=False,
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28,  # so that several can share a GPU
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=1, ignore_eos=True)
    answers = llm.generate([TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts], sampling)
    served = torch.tensor(
        [prompt_log_probabilities(answer, prompt.tolist()) for answer, prompt in zip(answers, prompts, strict=True)]
    )
    continuations = torch.tensor([list(answer.outputs[0].token_ids) for answer in answers])
    return {
        "checkpoint": folder.name,
        "mode": mode,
        **asdict(agreement_with_reference(folder, prompts, served, continuations)),
        "kernels": sorted(kernels(llm)),
    }


def kernels(llm: Any) -> set[str]:
    """The kernels that the model's layers really use."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to the worker, which is this process
    found = llm.apply_model(kernels_of)
    return set().union(*found) or {"vLLM's own"}


if __name__ == "__main__":
    main()
