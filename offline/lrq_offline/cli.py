"""lrq-offline quantize | evaluate | inspect. A problem the user can fix is one paragraph on stderr and exit code 2."""

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrq_offline.config import METHODS, QuantizeSettings
from lrq_vllm.checkpoint.schema import SCHEMES
from lrq_vllm.errors import LrqError

__all__ = ["main"]

_EXAMPLES = """examples:
  lrq-offline quantize ./Llama-3-8B --scheme w4a16
  lrq-offline quantize ./Llama-3-8B -o ./Llama-3-8B-w8a8 --scheme w8a8 --calibration mytexts.jsonl --samples 128
  lrq-offline evaluate ./Llama-3-8B-lrq-w4a16 --reference ./Llama-3-8B --text heldout.jsonl
  lrq-offline inspect ./Llama-3-8B-lrq-w4a16
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for a problem that the message tells how to fix."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(name)s: %(message)s")
    command: Callable[[argparse.Namespace, Console], None] = parsed.command
    try:
        command(parsed, Console(highlight=False, soft_wrap=True))
    except LrqError as error:
        print(f"lrq-offline: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder without permission
        print(f"lrq-offline: {error}. Check the disk's free space and the folder's permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lrq-offline: interrupted, nothing was written.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lrq-offline",
        description="Quantize language models with LRQ and look at the result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("lrq"))
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)
    evaluate = commands.add_parser("evaluate", help="perplexity, KL divergence and top-1 agreement on a text")
    evaluate.add_argument("model_dir", type=Path, help="float model or LRQ checkpoint")
    evaluate.add_argument("--reference", type=Path, metavar="FP_DIR", help="float model to compare with")
    evaluate.add_argument("--text", type=Path, required=True, metavar="FILE", help='.jsonl with "text", or plain text')
    evaluate.add_argument("--windows", type=int, help="windows to take, spread over the text (default: all)")
    evaluate.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate)
    inspect = commands.add_parser("inspect", help="what is inside an LRQ checkpoint, per layer")
    inspect.add_argument("model_dir", type=Path, metavar="DIR")
    inspect.set_defaults(command=_inspect)
    return parser


def _add_quantize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    defaults = QuantizeSettings(scheme="w4a16")
    parser = commands.add_parser("quantize", help="quantize a model folder into an LRQ checkpoint")
    parser.add_argument("model_dir", type=Path, help="folder of a Hugging Face model (config.json, *.safetensors, tokenizer)")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: ./<model>-lrq-<scheme>")
    parser.add_argument("--scheme", required=True, choices=list(SCHEMES), help="bits of weights (w) and activations (a)")
    parser.add_argument("--method", choices=METHODS, default=defaults.method, help="default: %(default)s")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="a step per N inputs (16-bit activations only; default: per channel)",
    )
    parser.add_argument("--symmetric", action="store_true", help="symmetric weights (default: asymmetric)")
    parser.add_argument("--rank", type=int, metavar="K", help="rank of LRQ's scale matrix (default: width / 4)")
    parser.add_argument("--iters", type=int, default=defaults.iters, help="steps per block (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (default: by method and scheme, docs/quantize.md)")
    parser.add_argument("--samples", type=int, default=defaults.samples, help="calibration windows (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="tokens per window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size, help="windows per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text to calibrate on (default: what ships with lrq)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an LRQ checkpoint")
    parser.set_defaults(command=_quantize)


def _quantize(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.pipeline import BlockReport, quantize_model

    settings = QuantizeSettings(
        scheme=parsed.scheme, method=parsed.method, group_size=parsed.group_size, symmetric=parsed.symmetric,
        rank=parsed.rank, iters=parsed.iters, learning_rate=parsed.lr, samples=parsed.samples, seq_len=parsed.seq_len,
        batch_size=parsed.batch_size, seed=parsed.seed, calibration=parsed.calibration,
    )  # fmt: skip
    output: Path = parsed.output or Path(f"{parsed.model_dir.resolve().name}-lrq-{parsed.scheme}")
    started = time.monotonic()

    def show(report: BlockReport) -> None:
        remaining = (time.monotonic() - started) / report.block * (report.blocks - report.block)
        console.print(
            f"block {report.block}/{report.blocks}  relative error {report.error_before:.3e} -> {report.error_after:.3e}  "
            f"{report.seconds:.1f} s  ETA {remaining:.0f} s"
        )

    with console.status(f"{settings.method} {settings.scheme}: learning block by block"):
        report = quantize_model(parsed.model_dir, output, settings, overwrite=parsed.overwrite, on_block=show)
    linears = report["quantized_linears"]
    console.print(
        f"{output}: {linears['modules']} linear layers, {linears['float_bytes']:,} -> {linears['bytes']:,} bytes "
        f"({linears['ratio']:.1%}) in {report['seconds']:.0f} s"
    )


def _evaluate(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.evaluate import evaluate_folder

    with console.status("evaluating"):
        quality = evaluate_folder(
            parsed.model_dir, parsed.text, reference=parsed.reference, windows=parsed.windows, seq_len=parsed.seq_len
        )
    if parsed.json:
        console.print(json.dumps(asdict(quality)))
        return
    console.print(f"tokens      {quality.tokens}\nperplexity  {quality.perplexity:.4f}")
    if quality.kl is not None and quality.top1 is not None:
        console.print(
            f"reference   {quality.reference_perplexity:.4f}\nKL          {quality.kl:.5f} nats\ntop-1       {quality.top1:.2%}"
        )


def _inspect(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.inspection import inspect_checkpoint

    summary = inspect_checkpoint(parsed.model_dir)
    for line in summary.headline:
        console.print(line)
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "out", "in", "bits", "steps", "step min", "step max", "clipped", "bytes"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "layer" else "right")
    for row in summary.layers:
        table.add_row(
            row.module, str(row.out_features), str(row.in_features), str(row.bits), str(row.steps),
            f"{row.step_min:.3e}", f"{row.step_max:.3e}", f"{row.at_bounds:.1%}", f"{row.stored_bytes:,}",
        )  # fmt: skip
    # Also into a pipe or a narrow terminal each layer is one whole line.
    Console(highlight=False, width=max(console.width, 140)).print(table)
