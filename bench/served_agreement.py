#!/usr/bin/env python3
"""How closely vLLM's numbers follow the reference path: log-probabilities and greedy tokens, for each checkpoint.

    .venv/bin/python bench/served_agreement.py demo-out/tiny-* --text tests/data/heldout.jsonl \
        --out bench/results/served-agreement.json

Runs vLLM in one child process per mode (eager; compiled, which is vLLM's default) and layout, one checkpoint after the other,
in bfloat16; one that fails is listed with the reason. A layout is tp2 (tensor parallel on two ranks), ep2 (the same, but each
rank has whole experts) or pp2 (pipeline parallel). With several layouts it also says how many greedy tokens are those of the
first:

    python bench/served_agreement.py small small-w4a8 --text eval.jsonl --modes compiled --layouts tp1 tp2 pp2 --out two.json

With --one-gpu all ranks of a layout share the first GPU (ranks_on_one_gpu.py).
"""

import argparse
import json
import re
import subprocess
import sys
import traceback
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measured_on import lrq_variables, measured_on

from lrq_offline.agreement import agreement_with_reference, reference_noise, rounding_noise
from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.source_model import load_tokenizer
from lrq_vllm.golden_replay import kernels_in_use, prompt_log_probabilities
from lrq_vllm.vllm_environment import serving_environment

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 96, 32


class Layout(NamedTuple):
    """How several ranks share a model. kind: tp, ep or pp."""

    kind: str
    ranks: int

    @classmethod
    def named(cls, text: str) -> "Layout":
        """tp2 and so on; raises argparse.ArgumentTypeError for anything else."""
        found = re.fullmatch("(tp|ep|pp)([1-9][0-9]*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not a layout: write tp2, ep2 or pp2, with any number.")
        return cls(found[1], int(found[2]))

    def __str__(self) -> str:
        return f"{self.kind}{self.ranks}"

    def engine_arguments(self) -> dict[str, Any]:
        """What vLLM calls it."""
        if self.kind == "pp":
            return {"pipeline_parallel_size": self.ranks}
        return {"tensor_parallel_size": self.ranks, "enable_expert_parallel": self.kind == "ep"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--layouts", nargs="+", type=Layout.named, default=[Layout("tp", 1)], metavar="{tp,ep,pp}N")
    parser.add_argument("--executor", choices=["mp", "ray"], default="mp", help="what starts several ranks")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the first GPU, with vLLM's own processes")
    parser.add_argument(
        "--noise", action="store_true", help="also how far the reference is from itself, summed up or rounded otherwise"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for folder in arguments.folders:
            try:
                answer = serve(
                    folder, windows(folder, arguments.text), arguments.modes[0], arguments.layouts[0],
                    arguments.executor, one_gpu=arguments.one_gpu,
                )  # fmt: skip
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": traceback.format_exception_only(error)[-1].strip()[:300]}
            print("RESULT " + json.dumps(answer), flush=True)
        return
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    result = {
        **measured_on("torch", "vllm", "transformers"),
        "positions": f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} greedy tokens each, bfloat16",
        "environment": lrq_variables(),
        "rows": rows,
        "failed": failed,
    }
    for mode in arguments.modes:
        by_layout = [
            serve_in_child(arguments.folders, arguments.text, mode, layout, arguments.executor, one_gpu=arguments.one_gpu)
            for layout in arguments.layouts
        ]
        for folder, *of_folder in zip(arguments.folders, *by_layout, strict=True):
            first = next((answer for answer in of_folder if "failed" not in answer), {})
            for layout, answer in zip(arguments.layouts, of_folder, strict=True):
                row = {"checkpoint": folder.name, "mode": mode, "layout": str(layout)}
                if layout.ranks > 1:
                    row |= {"executor": arguments.executor, "gpus": 1 if arguments.one_gpu else layout.ranks}
                if "failed" in answer:
                    failed.append(row | answer)
                    continue
                row |= {"kernels": answer["kernels"], **compare(folder, arguments.text, answer)}
                if arguments.noise:
                    row |= noise_of(folder, arguments.text)
                rows.append(row | {"as_first": as_first(answer["tokens"], first["tokens"])})
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    noise = f"{'noise':>10}{'rounding':>10}" if arguments.noise else ""
    print(
        f"{'checkpoint':<24}{'mode':<9}{'layout':>6}{'mean |diff|':>13}{'median':>10}{'max':>10}{noise}"
        f"{'greedy':>9}{'as 1st':>8}  kernel"
    )
    for row in rows:
        noise = f"{row['reference_noise']:>10.2e}{row['rounding']:>10.2e}" if arguments.noise else ""
        print(
            f"{row['checkpoint']:<24}{row['mode']:<9}{row['layout']:>6}{row['mean_difference']:>13.2e}"
            f"{row['median_difference']:>10.2e}{row['max_difference']:>10.2e}{noise}"
            f"{row['greedy_agreement']:>9.2%}{row['as_first']['tokens']:>8.1%}  {', '.join(row['kernels'])}"
        )
    for row in failed:
        print(f"{row['checkpoint']:<24}{row['mode']:<9}{row['layout']:>6}  failed: {row['failed']}")
    if failed:
        sys.exit(1)


def as_first(tokens: list[list[int]], first: list[list[int]]) -> dict[str, float]:
    """The share of greedy tokens before the first that differs, and of prompts in which none does."""
    same = (torch.tensor(tokens) == torch.tensor(first)).cumprod(dim=1)
    return {"tokens": same.float().mean().item(), "prompts": same[:, -1].float().mean().item()}


def windows(folder: Path, text: Path) -> torch.Tensor:
    """int64 [PROMPTS, PROMPT_TOKENS]"""
    return token_windows(load_tokenizer(folder), read_texts(text), PROMPTS, PROMPT_TOKENS)


@cache
def noise_of(folder: Path, text: Path) -> dict[str, float]:
    """How far the reference is from itself, whoever serves."""
    prompts = windows(folder, text)
    return {"reference_noise": reference_noise(folder, prompts), "rounding": rounding_noise(folder, prompts)}


def compare(folder: Path, text: Path, answer: dict[str, Any]) -> dict[str, Any]:
    served, tokens = torch.tensor(answer["log_probabilities"]), torch.tensor(answer["tokens"])
    return asdict(agreement_with_reference(folder, windows(folder, text), served, tokens))


def serve_in_child(
    folders: list[Path], text: Path, mode: str, layout: Layout, executor: str, *, one_gpu: bool
) -> list[dict[str, Any]]:
    environment = serving_environment(layout.ranks) | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    command = [
        sys.executable, __file__, *map(str, folders), "--text", str(text), "--modes", mode, "--layouts", str(layout),
        "--executor", executor, *(["--one-gpu"] if one_gpu else []), "--child",
    ]  # fmt: skip
    ended = subprocess.run(command, env=environment, text=True, capture_output=True)
    lines = [line.removeprefix("RESULT ") for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    answers = [json.loads(line) for line in lines]
    if len(answers) < len(folders) or any("failed" in answer for answer in answers):
        print(f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}", file=sys.stderr)
    return answers + [{"failed": f"vLLM's process ended with exit code {ended.returncode}"}] * (len(folders) - len(answers))


def serve(folder: Path, prompts: torch.Tensor, mode: str, layout: Layout, executor: str, *, one_gpu: bool) -> dict[str, Any]:
    """Serve in this process: the prompts' log-probabilities, the tokens that follow, and the kernels that computed them.

    The comparison is the parent's: a family that vLLM runs as transformers' code is changed there for the whole process.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    llm = LLM(
        str(folder), dtype="bfloat16", enforce_eager=mode == "eager", max_model_len=512, enable_prefix_caching=False,
        **layout.engine_arguments(), distributed_executor_backend=executor if layout.ranks > 1 else None,
        **({"worker_cls": "ranks_on_one_gpu.Worker"} if one_gpu and layout.ranks > 1 else {}),
        gpu_memory_utilization=0.1, kv_cache_memory_bytes=2**28,  # so that several can share a GPU
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=1, ignore_eos=True)
    answers = llm.generate([TokensPrompt(prompt_token_ids=prompt.tolist()) for prompt in prompts], sampling)
    answer = {
        "log_probabilities": [
            prompt_log_probabilities(answer, prompt.tolist()) for answer, prompt in zip(answers, prompts, strict=True)
        ],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "kernels": sorted(kernels_in_use(llm) or {"vLLM's own"}),
    }
    # Another checkpoint may follow in this process.
    del llm
    cleanup_dist_env_and_memory()
    return answer


if __name__ == "__main__":
    main()
