#!/usr/bin/env python3
"""Quantize a small trained Llama in every scheme, serve each with vLLM, and show what it cost and what it saved.

Run it with `make demo`. It needs no network and no GPU; results stay in demo-out/.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from lrq_offline.cli import main as lrq_offline
from lrq_offline.evaluate import evaluate_folder
from lrq_server.vllm_process import start_vllm

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny"
HELDOUT = ROOT / "tests" / "data" / "heldout.jsonl"
OUT = ROOT / "demo-out"
SCHEMES = ("w8a8", "w4a8", "w4a16", "w3a16")
PROMPT = "This PEP describes"
# Fewer steps than the default's, less text to learn from, a part of the held-out text: to be done sooner.
QUICKLY = ("--iters", 40, "--samples", 16)
WINDOWS = 8


@dataclass
class Row:
    """A line of the final table."""

    scheme: str
    linear_bytes: int
    share: str
    perplexity: float
    kl: float | None
    completion: str


def main() -> None:
    started = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    OUT.mkdir(exist_ok=True)
    rows = []
    for scheme in SCHEMES:
        console.rule(scheme)
        folder = OUT / f"tiny-{scheme}"
        quantize(folder, scheme)
        rows.append(measured(scheme, folder))
        console.print(f"{folder.name} over HTTP: {PROMPT} … {rows[-1].completion}")
    report = json.loads((OUT / f"tiny-{SCHEMES[0]}" / "lrq_report.json").read_text())
    float_bytes = report["quantized_linears"]["float_bytes"]
    rows.insert(0, Row("bf16", float_bytes, "100%", evaluate_folder(MODEL, HELDOUT, windows=WINDOWS).perplexity, None, ""))
    show(rows, console, time.monotonic() - started)


def quantize(folder: Path, scheme: str) -> None:
    arguments = ["quantize", MODEL, "-o", folder, "--scheme", scheme, *QUICKLY, "--overwrite", "--restart"]
    print("$ lrq-offline", *arguments, flush=True)
    # The command's own function: another process would take as long to import torch as to learn a block.
    if lrq_offline(list(map(str, arguments))):
        sys.exit(1)


def measured(scheme: str, folder: Path) -> Row:
    """Evaluate a checkpoint while its server starts, take one completion over the OpenAI API, stop the server."""
    options = ["--quantization", "lrq", "--max-model-len", "512", "--enforce-eager"]
    with start_vllm(folder, OUT / f"vllm-{scheme}.log", options) as server:
        quality = evaluate_folder(folder, HELDOUT, reference=MODEL, windows=WINDOWS)
        server.wait_until_ready()
        request = {"model": str(folder), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60).raise_for_status().json()
    completion = " ".join(answer["choices"][0]["text"].split())
    linears = json.loads((folder / "lrq_report.json").read_text())["quantized_linears"]
    return Row(scheme, linears["bytes"], f"{linears['ratio']:.1%}", quality.perplexity, quality.kl, completion)


def show(rows: list[Row], console: Console, seconds: float) -> None:
    table = Table("scheme", "bytes of linears", "of bf16", "perplexity", "KL (nats)", f"“{PROMPT} …” over HTTP")
    for row in rows:
        kl = "" if row.kl is None else f"{row.kl:.4f}"
        table.add_row(row.scheme, f"{row.linear_bytes:,}", row.share, f"{row.perplexity:.2f}", kl, row.completion)
    # On a narrow terminal or a pipe the table keeps its full width.
    Console(highlight=False, width=max(console.width, shutil.get_terminal_size((120, 24)).columns)).print(table)
    console.print(f"{seconds:.0f} s. Checkpoints, reports and server logs are in {OUT.name}/; the servers are stopped.")


if __name__ == "__main__":
    main()
