#!/usr/bin/env python3
"""What 4-bit activations cost, and what rotations and low-rank corrections win back: perplexity and KL by text, extra bytes.

    .venv/bin/python bench/correction.py small --text docs=docs.jsonl prose=prose.jsonl --out correction.json

A cell is words joined by colons: a scheme and a method, then, where wanted, the correction's rank (10%), ``float`` (found with
the float model's inputs), ``rounds=2``, ``lr=0.002``, a loss (``mse``), ``rotate`` or ``no-rotate``, and ``svd``: in
place of LRC's pair the one of that rank nearest to W - W_hat, beside the integers of the same cell without a correction. With
``lrq`` a correction is learned. Evaluated by the reference path.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from held_out import HeldOut, add_held_out
from low_rank_pairs import add_pairs
from torch import Tensor

from lrq_offline.calibration_text import shipped_calibration
from lrq_offline.compute import Machine
from lrq_offline.config import INPUTS, LOSSES, METHODS, QuantizeSettings
from lrq_offline.pipeline import open_source, quantize_model
from lrq_vllm.checkpoint.schema import SCHEMES, Manifest
from lrq_vllm.checkpoint.store import read_manifest
from lrq_vllm.kernels.reference import dequantize_weight

CELLS = [
    "w4a4:gptq",
    "w4a4:gptq:10%",
    "w4a4:gptq:30%",
    "w4a4:gptq:10%:svd",
    "w4a4:gptq:10%:float",
    "w4a4:gptq:5%",
    "w4a4:gptq:20%",
    "w4a4:rtn",
    "w4a4:gptq:no-rotate",
    "w4a4:gptq:10%:no-rotate",
    "w4a8:gptq",
    "w4a8:gptq:2%",
]
# GPTQ with a correction, scales and the same correction learned together, and scales alone.
LEARNED_CELLS = [
    f"{scheme}:{method}"
    for scheme, ranks in (("w4a4", ["10%"]), ("w3a16", ["5%", "10%"]), ("w4a8", ["2%"]))
    for method in [f"{one}:{rank}" for rank in ranks for one in ("gptq", "lrq")] + ["lrq"]
]


def main() -> None:
    arguments = parsed()
    held_out = HeldOut.of(arguments)
    result: dict[str, Any] = {
        **held_out.about,
        "calibration": Path(arguments.calibration or shipped_calibration()).name,
        "calibration_tokens": arguments.samples * arguments.calibration_seq_len,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for cell in arguments.cells:
            settings, svd = settings_of(cell, arguments)
            output = Path(scratch, "model")
            made = replace(settings, correction_rank=None) if svd else settings
            report = quantize_model(arguments.model, output, made, machine=Machine(arguments.device), overwrite=True)
            if svd:
                add_svd(arguments.model, output, settings)
            manifest = read_manifest(output)
            row = {
                "cell": cell,
                "scheme": settings.scheme,
                "method": settings.method,
                "rotated": settings.rotates,
                "correction": ("svd" if svd else "lrc") if settings.corrects else None,
                "correction_rank": settings.correction_rank,
                "statistics": settings.correction_statistics if settings.corrects and not svd else None,
                "rounds": settings.correction_rounds,
                "learning_rate": report["settings"]["learning_rate"],
                "bytes": manifest.quantized_bytes,
                "correction_bytes": manifest.correction_bytes,
                "float_bytes": report["quantized_linears"]["float_bytes"],
                "seconds": report["seconds"],
                "texts": held_out.qualities(output),
            }
            result["rows"].append(row)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
            print(line_of(row, result["rows"]), flush=True)


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row for people; closed: the share of the gap in perplexity between the first row and the float model that is gone."""
    shown = []
    for name, quality in row["texts"].items():
        least, most = quality["reference_perplexity"], rows[0]["texts"][name]["perplexity"]
        closed = (most - quality["perplexity"]) / (most - least)
        shown.append(f"{name} {quality['perplexity']:.2f} (float {least:.2f}, closed {closed:.0%}) KL {quality['kl']:.4f}")
    extra = row["correction_bytes"] / row["float_bytes"]
    return f"{row['cell']:<24} {'  '.join(shown)}  +{extra:.1%} of bf16 bytes, {row['seconds']:.0f} s"


def settings_of(cell: str, arguments: argparse.Namespace) -> tuple[QuantizeSettings, bool]:
    """A cell's settings, and whether its correction is an SVD."""
    found: dict[str, Any] = {}
    words = cell.split(":")
    for word in words:
        if word in SCHEMES:
            found["scheme"] = word
        elif word in METHODS:
            found["method"] = word
        elif word.endswith("%"):
            found["correction_rank"] = word
        elif word in INPUTS:
            found["correction_statistics"] = word
        elif word in LOSSES:
            found["loss"] = word
        elif word in ("rotate", "no-rotate"):
            found["rotate"] = word == "rotate"
        elif word.startswith("rounds="):
            found["correction_rounds"] = int(word.removeprefix("rounds="))
        elif word.startswith("lr="):
            found["learning_rate"] = float(word.removeprefix("lr="))
        elif word != "svd":
            raise SystemExit(f"bench/correction.py: {word!r} in cell {cell} is not known")
    lengths = {"samples": arguments.samples, "seq_len": arguments.calibration_seq_len}
    return QuantizeSettings(**found, **lengths, calibration=arguments.calibration), "svd" in words


def add_svd(model: Path, folder: Path, settings: QuantizeSettings) -> None:
    """Give a checkpoint without a correction the pair that is nearest to W - W_hat, at the rank that the settings say."""
    source = open_source(model, settings)

    def nearest(manifest: Manifest, module: str, rank: int, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        stored = [tensors[f"{module}.{suffix}"] for suffix in ("qweight", "weight_step", "weight_zero_point")]
        w_hat = dequantize_weight(*stored, manifest.weight.bits, manifest.quantized[module][1])
        u, energy, vt = torch.linalg.svd(source.read(f"{module}.weight").float() - w_hat, full_matrices=False)
        return u[:, :rank] * energy[:rank], vt[:rank].T

    add_pairs(model, folder, settings, nearest)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_held_out(parser)
    parser.set_defaults(windows=16)
    parser.add_argument("--cells", nargs="*", default=CELLS, metavar="CELL", help="default: %(default)s")
    parser.add_argument(
        "--learned", dest="cells", action="store_const", const=LEARNED_CELLS, help="the cells that learn instead"
    )
    parser.add_argument("--calibration", help="default: what ships with lrq")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (default: %(default)s)")
    parser.add_argument("--calibration-seq-len", type=int, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
