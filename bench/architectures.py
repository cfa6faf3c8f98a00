#!/usr/bin/env python3
"""Each model family with each scheme: quantized, verified, and served on one and two ranks. Writes the table in the docs.

    python bench/architectures.py --out bench/results/architectures.json --table docs/architectures.md
    python bench/architectures.py --families mixtral --out bench/results/architectures.json --table docs/architectures.md \
        --beside bench/results/architectures-h200.json

Small random models of the real classes; `lrq-offline verify` says whether vLLM loads every tensor and answers as it should.
What --out says of cells that are not tried this time stays there, if it comes from the same versions and machine.
"""

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measured_on import version_of

from lrq_offline import decoder_blocks
from lrq_offline.config import QuantizeSettings
from lrq_offline.pipeline import quantize_model
from lrq_offline.verification import check_files, check_loading, check_serving
from lrq_vllm.checkpoint.schema import SCHEMES
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.errors import LrqError, SettingsError
from tests.checkpoints import FAMILIES, QUICK, model_type_of, write_random_model

NAMES = ("llama", *FAMILIES)
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="results of other machines, for --table")
    arguments = parser.parse_args()
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else torch.cpu.get_capabilities()["cpu_name"],
        "versions": {name: version_of(name) for name in ("lrq", "torch", "vllm", "transformers")},
        "unit": "nats: mean difference of vLLM's log-probabilities from the reference path's; tp: tensor-parallel ranks; "
        "ep: of which each has some experts whole",
    }
    rows = [
        row
        for row in earlier_rows(arguments.out, result)
        if row["family"] not in arguments.families or row["scheme"] not in arguments.schemes
    ]
    today = datetime.date.today().isoformat()
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as folder:
            source = write_random_model(family, Path(folder, "float"))
            for scheme in arguments.schemes:
                found = tried(family, source, Path(folder, "quantized"), scheme)
                rows.append({"family": family, "scheme": scheme, "date": today, **found})
                print(json.dumps(rows[-1]), flush=True)
        result["rows"] = sorted(rows, key=lambda row: (NAMES.index(row["family"]), list(SCHEMES).index(row["scheme"])))
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.table is not None:
        others = {path.name: json.loads(path.read_text()) for path in arguments.beside}
        arguments.table.write_text(page({arguments.out.name: result, **others}))


def earlier_rows(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an earlier run that is comparable."""
    if not path.exists():
        return []
    earlier: dict[str, Any] = json.loads(path.read_text())
    return earlier["rows"] if all(earlier[key] == now[key] for key in ("device", "versions")) else []


def tried(family: str, source: Path, folder: Path, scheme: str) -> dict[str, Any]:
    """What each step gave, or in what words it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    learns = "lrq" if SCHEMES[scheme].weight_bits > 2 else "rtn"
    row: dict[str, Any] = {"method": learns}
    try:
        quantize_model(source, folder, QuantizeSettings(scheme, learns, **QUICK))
    except SettingsError as error:
        return row | {"refused": str(error)[:400]}
    row["tp_sizes"] = list(read_manifest(folder).tensor_parallel_sizes)
    steps: dict[str, Callable[[], Any]] = {
        "tensors": lambda: check_files(folder),
        "model": lambda: check_loading(folder).model,
        "nats": lambda: round(check_serving(folder).mean_difference, 5),
    }
    if RANKS in row["tp_sizes"]:
        steps[f"nats_tp{RANKS}"] = lambda: round(check_serving(folder, RANKS).mean_difference, 5)
    if has_experts(family):
        steps[f"nats_ep{RANKS}"] = lambda: round(check_serving(folder, RANKS, expert_parallel=True).mean_difference, 5)
    for name, step in steps.items():
        try:
            row[name] = step()
        except LrqError as error:
            row["failed"] = f"{name}: {error}"[:400]
            break
    return row


def has_experts(family: str) -> bool:
    """Whether a block of such a model may have some."""
    return decoder_blocks.FAMILIES[model_type_of(family)].experts is not None


def cell(row: dict[str, Any] | None) -> str:
    """What the table says of one family and scheme; nothing of those that were not tried."""
    if row is None:
        return ""
    if "failed" in row:
        return "fails"
    if "refused" in row:
        return "refused"
    on_ranks = [row.get(f"nats_{kind}{RANKS}") for kind in ("tp", "ep") if kind == "tp" or has_experts(row["family"])]
    distances = " / ".join("-" if nats is None else f"{nats:.4f}" for nats in (row["nats"], *on_ranks))
    return f"{distances}; {', '.join(map(str, row['tp_sizes']))}"


def page(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a table for each result, by the names of their files in bench/results."""
    lines = [
        "# Architectures",
        "",
        "<!-- bench/architectures.py writes this file. -->",
        "",
        "Small random models of each family, quantized, verified and served. A cell says how far vLLM's log-probabilities",
        f"are from the reference path's on average, in nats, on one rank / on {RANKS} tensor-parallel ranks (-: its checkpoint",
        "says that so many cannot serve it); with experts, also on so many of which each takes some whole. Behind it are the",
        "numbers of tensor-parallel ranks that the checkpoint says can serve it. `lrq-offline verify` has found every tensor",
        "where it belongs. refused: `lrq-offline quantize` does so at its defaults, and says why. qwen3_moe-mixed: its first",
        "block has an MLP in place of experts.",
    ]
    return "\n".join(lines + [line for file, result in results.items() for line in table(result, file)]) + "\n"


def table(result: dict[str, Any], file: str) -> list[str]:
    """Families by schemes. file: where the numbers are."""
    rows = result["rows"]
    dates = [row["date"] for row in rows]
    schemes = [scheme for scheme in SCHEMES if any(row["scheme"] == scheme for row in rows)]
    lines = [
        "",
        f"vLLM {result['versions']['vllm']}, {result['device']}, {' to '.join(dict.fromkeys((min(dates), max(dates))))} "
        f"(`bench/results/{file}`):",
        "",
        f"| model_type | vLLM's class | {' | '.join(schemes)} |",
        f"| --- | --- | {' | '.join('---' for _ in schemes)} |",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = {row["scheme"]: row for row in rows if row["family"] == family}
        cells = [cell(mine.get(scheme)) for scheme in schemes]
        lines.append(f"| {family} | {next(iter(mine.values())).get('model', '')} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
