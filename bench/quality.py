#!/usr/bin/env python3
"""Method x scheme -> perplexity, KL and top-1 agreement on a held-out text, bytes and seconds, for one model.

    .venv/bin/python bench/quality.py tests/models/tiny --text tests/data/heldout.jsonl --out bench/results/quality-tiny.json

Every cell is a fresh `lrq-offline quantize` at default settings, evaluated by the reference path.
"""

import argparse
import datetime
import json
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lrq_offline.config import METHODS, QuantizeSettings
from lrq_offline.evaluate import evaluate_folder
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint import SCHEMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="held-out text, .jsonl or plain")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "lrq"])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    console = Console(width=110, highlight=False)
    rows = []
    for row in measured(arguments.model, arguments.text, arguments.schemes, arguments.methods):
        rows.append(row)
        console.print(f"{row['scheme']} {row['method']}: KL {row['kl']:.4f}, perplexity {row['perplexity']:.2f}")
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("lrq", "torch", "transformers")} | {"python": platform.python_version()},
        "model": arguments.model.name,
        "text": arguments.text.name,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("scheme", "method", "perplexity", "KL (nats)", "top-1", "bytes of bf16", "seconds")
    for row in rows:
        table.add_row(
            row["scheme"], row["method"], f"{row['perplexity']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}",
            f"{row['bytes_ratio']:.1%}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(f"float model: perplexity {rows[0]['reference_perplexity']:.2f} on {rows[0]['tokens']} tokens")
    console.print(table)


def measured(model: Path, text: Path, schemes: list[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """One row per cell."""
    with tempfile.TemporaryDirectory() as folder:
        for scheme in schemes:
            for method in methods:
                output = Path(folder, f"{scheme}-{method}")
                report = quantize_model(model, output, QuantizeSettings(scheme=scheme, method=method))
                quality = evaluate_folder(output, text, reference=model)
                yield {
                    "scheme": scheme,
                    "method": method,
                    **asdict(quality),
                    "bytes_ratio": report["quantized_linears"]["ratio"],
                    "seconds": report["seconds"],
                    "settings": report["settings"],
                }


if __name__ == "__main__":
    main()
