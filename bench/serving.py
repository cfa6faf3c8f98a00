#!/usr/bin/env python3
"""Tokens per second of vLLM with a random Llama, end to end: bfloat16, the stock quantized forms, and ours.

    python bench/serving.py --out bench/results/serving-h200.json                    # 32 layers of Llama-3-8B; 60 GB of disk
    python bench/serving.py --candidates bf16 lrq-w4a8 --concurrency 1 256 --out serving.json
    python bench/serving.py --candidates lrq-w4a4 lrq-w4a4-10% --out serving.json         # rotated; with a low-rank correction
    python bench/serving.py --candidates lrq-w4a8 --ranks 2 --out serving.json                          # tensor parallel
    python bench/serving.py --size small --concurrency 1 4 --work /tmp/small --out /tmp/serving.json        # on any machine

Each form is quantized by round-to-nearest (corrections are random pairs), served in a process of its own as vLLM's defaults
have it (torch.compile, CUDA graphs), measured and deleted. With --at-once 4, so many start side by side, and each is measured
while the others have nothing to do: 30 GB of GPU memory for each form of Llama-3-8B.

With --size narrow the GPU has next to nothing to do, and a step takes what the host takes for it.

Decoding: so many requests at a time, each PROMPT random tokens, then NEW more. Prefill: PREFILL prompts of PREFILL_TOKENS
random tokens, one new token each. Medians of REPEATS, after one that does not count. Candidates that are in the file from
before stay there.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from gpu_trace import begin_trace, end_trace
from measured_on import lrq_variables, measured_on
from random_llama import SIZES, write_llama, write_ours, write_stock

from lrq_vllm.golden_replay import kernels_of
from lrq_vllm.vllm_environment import serving_environment

CANDIDATES = ("bf16", "stock-w8a8", "lrq-w8a8", "lrq-w4a8", "stock-w4a16", "lrq-w4a16", "lrq-w3a16")
# 4-bit activations, rotated, without a low-rank correction and with one of these ranks.
CORRECTIONS = ("lrq-w4a4", "lrq-w4a4-5%", "lrq-w4a4-10%", "lrq-w4a4-20%", "lrq-w4a4-30%")
KNOWN = (*CANDIDATES, *CORRECTIONS)
PROMPT, NEW = 128, 128
PREFILL, PREFILL_TOKENS = 32, 1024
REPEATS = 3

Found = TypeVar("Found")
llm: Any  # of a process that serves


def main() -> None:
    arguments = parsed()
    before = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = [row for row in before if row["candidate"] not in arguments.candidates]
    source = arguments.work / "bf16"
    if not source.exists():
        with Alone() as process:
            process.begin(write_llama, source, SIZES[arguments.size]).result()
    for first in range(0, len(arguments.candidates), arguments.at_once):
        for row in measured(arguments.candidates[first : first + arguments.at_once], arguments):
            rows.append(row)
            rows.sort(key=lambda row: KNOWN.index(row["candidate"]))
            write(arguments, rows)
    show(rows, arguments.concurrency)


def measured(candidates: list[str], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of these: made and started all at a time, then measured while the others have nothing to do."""
    folders = {candidate: arguments.work / candidate for candidate in candidates}
    written = [candidate for candidate in candidates if not folders[candidate].exists()]
    begin = time.monotonic()
    rows: dict[str, dict[str, Any]] = {
        candidate: {"candidate": candidate, "at_once": arguments.at_once} for candidate in candidates
    }
    with all_alone(candidates) as makers:
        collect({candidate: makers[candidate].begin(make, candidate, arguments.work) for candidate in written}, rows)
    print(f"{' '.join(written) or 'nothing'} written: {time.monotonic() - begin:.0f} s", flush=True)
    with all_alone(candidates) as servers:
        made = [candidate for candidate in candidates if "why_not" not in rows[candidate]]
        collect({candidate: servers[candidate].begin(start, folders[candidate], arguments) for candidate in made}, rows)
        print(f"started: {time.monotonic() - begin:.0f} s", flush=True)
        for candidate, row in rows.items():
            if "why_not" not in row:
                collect({candidate: servers[candidate].begin(speeds, arguments)}, rows)
            print(f"{time.monotonic() - begin:.0f} s, {json.dumps(row)}"[:400], flush=True)
            yield row
        collect({candidate: servers[candidate].begin(stop) for candidate in made}, rows)
    if not arguments.keep:
        for candidate in written:
            shutil.rmtree(folders[candidate], ignore_errors=True)


def collect(work: dict[str, Future[dict[str, Any]]], rows: dict[str, dict[str, Any]]) -> None:
    """What each candidate's work found, in its row; or why it found nothing."""
    for candidate, future in work.items():
        try:
            rows[candidate] |= future.result()
        except Exception as error:
            rows[candidate].setdefault("why_not", f"{type(error).__name__}: {error}"[:600])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", nargs="+", choices=KNOWN, default=CANDIDATES, help=f"default: {' '.join(CANDIDATES)}")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--prefill", type=int, default=PREFILL, help=f"prompts of {PREFILL_TOKENS} tokens")
    parser.add_argument("--size", choices=list(SIZES), default="8b")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lrq-serving", help="for checkpoints")
    parser.add_argument("--keep", action="store_true", help="leave the quantized checkpoints there")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="tensor parallel")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="quantized and started side by side")
    parser.add_argument("--trace", action="store_true", help="also say what the GPU did in one more run, which is slower")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


class Alone:
    """A process of its own, which leaves nothing in the GPU's memory."""

    def __enter__(self) -> Self:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, work: Callable[..., Found], *given: Any) -> Future[Found]:
        """A process that has died says so in the result."""
        try:
            return self._pool.submit(work, *given)
        except BrokenProcessPool as error:
            future: Future[Found] = Future()
            future.set_exception(error)
            return future


@contextmanager
def all_alone(candidates: list[str]) -> Iterator[dict[str, Alone]]:
    with ExitStack() as stack:
        yield {candidate: stack.enter_context(Alone()) for candidate in candidates}


def make(candidate: str, work: Path) -> dict[str, Any]:
    begin = time.monotonic()
    maker, scheme, *rank = candidate.split("-")
    (write_ours if maker == "lrq" else write_stock)(work / "bf16", work / candidate, scheme, *rank)
    return {"seconds_to_make": round(time.monotonic() - begin, 1)}


def start(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM, for this process's life, with room for all requests."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    os.environ |= serving_environment(arguments.ranks)
    from vllm import LLM

    begin = time.monotonic()
    global llm
    llm = LLM(
        str(folder), dtype="bfloat16", max_model_len=2048, max_num_seqs=max(arguments.concurrency), max_num_batched_tokens=8192,
        enable_prefix_caching=False, gpu_memory_utilization=0.85 / arguments.at_once, skip_tokenizer_init=True,
        kv_cache_memory_bytes=kv_bytes(arguments), tensor_parallel_size=arguments.ranks,
        compilation_config={"cudagraph_capture_sizes": sorted(set(arguments.concurrency))},
    )  # fmt: skip
    return {"seconds_to_start": round(time.monotonic() - begin, 1), **facts()}


def kv_bytes(arguments: argparse.Namespace) -> int:
    """Of a rank's keys and values in 16 bits, for all requests of the largest load at a time."""
    size = SIZES[arguments.size]
    block = 128  # tokens, at most
    requests = [(max(arguments.concurrency), PROMPT + NEW), (arguments.prefill, PREFILL_TOKENS + 1)]
    tokens = max(count * (tokens + block) for count, tokens in requests)
    return 2 * 2 * size["num_hidden_layers"] * size["num_key_value_heads"] * size["head_dim"] * tokens // arguments.ranks


def stop() -> dict[str, Any]:
    """The process would wait for its child."""
    if "llm" in globals():
        llm.llm_engine.engine_core.shutdown()
    return {}


def speeds(arguments: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {"decode": {}, "decode_all": {}}
    generator = torch.Generator().manual_seed(0)
    vocabulary = SIZES[arguments.size]["vocab_size"]
    for count in arguments.concurrency:
        found = [count * NEW / seconds(vocabulary, generator, count, PROMPT, NEW) for _ in range(REPEATS + 1)][1:]
        row["decode"][str(count)] = round(statistics.median(found), 1)
        row["decode_all"][str(count)] = [round(value, 1) for value in found]
        if arguments.trace:
            row.setdefault("traced", {})[str(count)] = traced(vocabulary, generator, count, PROMPT, NEW)
    if count := arguments.prefill:
        found = [count * PREFILL_TOKENS / seconds(vocabulary, generator, count, PREFILL_TOKENS, 1) for _ in range(REPEATS + 1)]
        row["prefill"] = round(statistics.median(found[1:]), 1)
        row["prefill_all"] = [round(value, 1) for value in found[1:]]
        if arguments.trace:
            row.setdefault("traced", {})["prefill"] = traced(vocabulary, generator, count, PREFILL_TOKENS, 1)
    return row


def traced(vocabulary: int, generator: torch.Generator, count: int, tokens: int, new: int) -> dict[str, Any]:
    """As seconds, with the GPU's kernels written down."""
    llm.collective_rpc(begin_trace)
    elapsed = seconds(vocabulary, generator, count, tokens, new)
    found, *_ = llm.collective_rpc(end_trace)
    return {"ms": round(1000 * elapsed, 3), **found}


def facts() -> dict[str, Any]:
    """Bytes of the first rank's tensors, and the kernels that its layers run on."""
    (nbytes, kernels), *_ = llm.apply_model(look_at)
    return {"weight_gb": round(nbytes / 1e9, 3), "kernels": kernels or ["vLLM's own"]}


def look_at(model: torch.nn.Module) -> tuple[int, list[str]]:
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(stored.values()), sorted(kernels_of(model))


def seconds(vocabulary: int, generator: torch.Generator, count: int, tokens: int, new: int) -> float:
    """Of serving ``count`` requests at a time, prompts never seen before."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = torch.randint(2, vocabulary, (count, tokens), generator=generator).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
    begin = time.monotonic()
    answers = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    elapsed = time.monotonic() - begin
    assert all(len(answer.outputs[0].token_ids) == new for answer in answers)
    return elapsed


def write(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    result = {
        **measured_on("lrq", "torch", "vllm", "transformers"),
        "model": SIZES[arguments.size],
        "ranks": arguments.ranks,
        "environment": lrq_variables(),
        "unit": f"decode: output tokens/s of so many requests of {PROMPT} + {NEW} tokens; prefill: prompt tokens/s",
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def show(rows: list[dict[str, Any]], concurrency: list[int]) -> None:
    base = next((row for row in rows if row["candidate"] == "bf16" and "decode" in row), None)
    print(f"{'':<13}" + "".join(f"{count:>16}" for count in concurrency) + f"{'prefill':>16}{'GB':>8}")
    for row in rows:
        if "decode" not in row:
            print(f"{row['candidate']:<13}{row['why_not'][:100]}")
            continue
        cells = [(row["decode"].get(str(count), 0), base and base["decode"].get(str(count))) for count in concurrency]
        cells.append((row.get("prefill", 0), base and base.get("prefill")))
        text = "".join(f"{value:>9.0f} {f'{value / other:.2f}x' if other else '':>6}" for value, other in cells)
        print(f"{row['candidate']:<13}{text}{row['weight_gb']:>8.2f}  {', '.join(row['kernels'])}")


if __name__ == "__main__":
    main()
