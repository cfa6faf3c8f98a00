#!/usr/bin/env python3
"""Quantize a small trained Llama in every scheme, serve each with vLLM, and show what it cost and what it saved.

Run it with `make demo`. It needs no network and no GPU; results stay in demo-out/.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from lrq_server.vllm_process import VllmServer, start_vllm

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "models" / "tiny"
HELDOUT = ROOT / "tests" / "data" / "heldout.jsonl"
OUT = ROOT / "demo-out"
SCHEMES = ("w8a8", "w4a8", "w4a16", "w3a16")
PROMPT = "This PEP describes"


@dataclass
class Row:
    """A line of the final table."""

    scheme: str
    linear_bytes: int
    share: str
    perplexity: float
    kl: float | None
    completion: str = ""


def main() -> None:
    started = time.monotonic()
    # A server loads while the next scheme is learned: on few cores, threads that wait must not spin.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console(highlight=False, soft_wrap=True)
    OUT.mkdir(exist_ok=True)
    rows: list[Row] = []
    with ExitStack() as running:
        loading: VllmServer | None = None
        for scheme in SCHEMES:
            # While one scheme is quantized, the server of the one before loads.
            folder = OUT / f"tiny-{scheme}"
            console.rule(scheme)
            lrq_offline("quantize", MODEL, "-o", folder, "--scheme", scheme, "--overwrite")
            if loading is not None:
                rows[-1].completion = ask(loading, OUT / f"tiny-{rows[-1].scheme}", console)
                running.close()
            rows.append(measured(scheme, folder))
            log = OUT / f"vllm-{scheme}.log"
            options = ["--quantization", "lrq", "--max-model-len", "512", "--enforce-eager"]
            loading = running.enter_context(start_vllm(folder, free_port(), log, options))
        assert loading is not None
        rows[-1].completion = ask(loading, OUT / f"tiny-{rows[-1].scheme}", console)
    report = json.loads((OUT / f"tiny-{SCHEMES[0]}" / "lrq_report.json").read_text())
    quality = evaluate(MODEL)
    rows.insert(0, Row("bf16", report["quantized_linears"]["float_bytes"], "100%", quality["perplexity"], None))
    show(rows, console, time.monotonic() - started)


def lrq_offline(*arguments: object, capture: bool = False) -> str:
    command = [str(Path(sys.executable).with_name("lrq-offline")), *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None).stdout or ""


def evaluate(folder: Path, *options: object) -> dict[str, float]:
    return json.loads(lrq_offline("evaluate", folder, "--text", HELDOUT, "--json", *options, capture=True))


def measured(scheme: str, folder: Path) -> Row:
    quality = evaluate(folder, "--reference", MODEL)
    linears = json.loads((folder / "lrq_report.json").read_text())["quantized_linears"]
    return Row(scheme, linears["bytes"], f"{linears['ratio']:.1%}", quality["perplexity"], quality["kl"])


def ask(server: VllmServer, folder: Path, console: Console) -> str:
    """One completion over the OpenAI API."""
    server.wait_until_ready()
    request = {"model": str(folder), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60).raise_for_status().json()
    text = " ".join(answer["choices"][0]["text"].split())
    console.print(f"{folder.name} over HTTP: {PROMPT} … {text}")
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
