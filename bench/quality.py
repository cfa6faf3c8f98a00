#!/usr/bin/env python3
"""Method x scheme -> perplexity, KL divergence (with a 95% interval) and top-1 agreement on each text, and seconds.

    .venv/bin/python bench/quality.py tests/models/tiny --text heldout=tests/data/heldout.jsonl \
        --out bench/results/quality-tiny.json
    .venv/bin/python bench/quality.py small --text docs=docs.jsonl code=code.jsonl --calibration mixed.jsonl --samples 128 \
        --cells lrq:w3a16 gptq:w3a16 lrq:w4a16:128 --peers autoround:w3a16=folder --out quality.json

A cell is method:scheme or method:scheme:group-size, where a method may name its loss (lrq+mse); each is a fresh quantization
at the tool's settings, evaluated by the reference path. A peer is a folder that is quantized already: an LRQ checkpoint, or a
float model that another tool has quantized (its weights written back as floats).
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from held_out import HeldOut, add_held_out
from rich.console import Console
from rich.table import Table

from lrq_offline.compute import Machine
from lrq_offline.config import PRESETS, QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_vllm.checkpoint.report import REPORT_NAME
from lrq_vllm.cli_errors import exit_code_of
from lrq_vllm.errors import SettingsError

CELLS = [f"{method}:{scheme}" for scheme in ("w8a8", "w4a8", "w4a16", "w3a16") for method in ("rtn", "lrq")]


def main() -> int:
    arguments = parsed()
    # What is wrong with any cell is found before the first takes its hour.
    cells = {cell: settings_of(arguments, cell) for cell in arguments.cells}
    arguments.out.touch()
    held_out = HeldOut.of(arguments)
    console = Console(width=140, highlight=False)

    def measured(row: dict[str, Any], folder: Path) -> None:
        row["texts"] = held_out.qualities(folder)
        rows.append(row)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
        shown = "  ".join(f"{name} KL {quality['kl']:.4f}" for name, quality in row["texts"].items())
        console.print(f"{row['method']} {row['scheme']} {row['group_size'] or ''}: {shown}")

    rows: list[dict[str, Any]] = []
    result = {**held_out.about, "rows": rows}
    for peer in arguments.peers:
        label, _, folder = peer.partition("=")
        method, scheme, size = cell_of(label)
        made = Path(folder, REPORT_NAME)
        facts = facts_of(json.loads(made.read_text())) if made.is_file() else {"peer": True}
        measured({"method": method, "scheme": scheme, "group_size": size, **facts}, Path(folder))
    with tempfile.TemporaryDirectory() as scratch:
        for cell, settings in cells.items():
            name, scheme, size = cell_of(cell)
            output = Path(scratch, cell.replace(":", "-"))
            report = quantize_model(arguments.model, output, settings, machine=Machine(arguments.device))
            measured({"method": name, "scheme": scheme, "group_size": size, **facts_of(report)}, output)
    if rows:
        show(rows, list(held_out.windows), console)
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_held_out(parser)
    parser.add_argument("--cells", nargs="*", default=CELLS, metavar="METHOD[+LOSS]:SCHEME[:GROUP]")
    parser.add_argument("--peers", nargs="*", default=[], metavar="LABEL:SCHEME[:GROUP]=FOLDER")
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--calibration", help="default: what ships with lrq")
    parser.add_argument("--samples", type=int, help="default: the preset's")
    parser.add_argument("--iters", type=int, help="default: the preset's")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def facts_of(report: dict[str, Any]) -> dict[str, Any]:
    """What a row tells of a quantization, from its lrq_report.json."""
    return {
        "bytes_ratio": report["quantized_linears"]["ratio"],
        "seconds": report["seconds"],
        "steps": [block["steps"] for block in report["blocks"]],
        "settings": report["settings"],
    }


def cell_of(text: str) -> tuple[str, str, int | None]:
    found = re.fullmatch(r"([^:]+):([^:]+)(?::(\d+))?", text)
    if found is None:
        raise SettingsError(f"{text!r} is no cell: write it like lrq:w4a16, or lrq:w4a16:128 for groups of 128 inputs.")
    method, scheme, size = found.groups()
    return method, scheme, None if size is None else int(size)


def settings_of(arguments: argparse.Namespace, cell: str) -> QuantizeSettings:
    name, scheme, size = cell_of(cell)
    method, _, loss = name.partition("+")
    preset = PRESETS[arguments.preset].with_given(iters=arguments.iters, samples=arguments.samples)
    return QuantizeSettings(
        scheme, method, group_size=size, loss=loss or None, calibration=arguments.calibration, **vars(preset)
    )


def show(rows: list[dict[str, Any]], texts: list[str], console: Console) -> None:
    floats = (f"{name} {rows[0]['texts'][name]['reference_perplexity']:.2f}" for name in texts)
    console.print(f"float model: perplexity {', '.join(floats)}; below: KL (95% interval), perplexity, top-1 agreement")
    table = Table("scheme", "method", *texts, "seconds")
    for row in rows:
        qualities = [row["texts"][name] for name in texts]
        table.add_row(
            row["scheme"] + (f" g{row['group_size']}" if row["group_size"] else ""),
            row["method"],
            *(
                f"{q['kl']:.4f} ({q['kl_low']:.4f}-{q['kl_high']:.4f}), {q['perplexity']:.2f}, {q['top1']:.1%}"
                for q in qualities
            ),
            f"{row['seconds']:.0f}" if "seconds" in row else "",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, "quality.py"))
