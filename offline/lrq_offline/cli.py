"""lrq-offline quantize | plan | try | verify | evaluate | inspect | report | export | doctor.

A problem the user can fix is one paragraph on stderr and exit code 2.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrq_offline.config import DEVICES, METHODS, QuantizeSettings, default_method
from lrq_offline.settings_options import add_settings, settings_of
from lrq_vllm.checkpoint.schema import SCHEMES
from lrq_vllm.cli_errors import exit_code_of
from lrq_vllm.errors import SettingsError, one_paragraph
from lrq_vllm.tensor_parallel import check_ranks, sizes_in_words

__all__ = ["main"]

_EXAMPLES = """examples:
  lrq-offline quantize ./Llama-3-8B --scheme w4a16
  lrq-offline quantize ./Llama-3-8B -o ./Llama-3-8B-w8a8 --scheme w8a8 --calibration mytexts.jsonl --samples 128
  lrq-offline plan ./Llama-3-8B --scheme w4a16 --preset paper
  lrq-offline evaluate ./Llama-3-8B-lrq-w4a16 --reference ./Llama-3-8B --text heldout.jsonl
  lrq-offline try ./Llama-3-70B/config.json --scheme w4a16
  lrq-offline verify ./Llama-3-8B-lrq-w4a16
  lrq-offline inspect ./Llama-3-8B-lrq-w4a16
  lrq-offline report ./Llama-3-8B-lrq-w4a16
  lrq-offline export ./Llama-3-8B-lrq-w4a16 --to dense
  lrq-offline export ./Llama-3-8B-lrq-w4a16 --to compressed-tensors --round-steps
  lrq-offline doctor
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, or 2 for a problem that the message tells how to fix."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if parsed.verbose else logging.WARNING, format="%(name)s: %(message)s")
    command: Callable[[argparse.Namespace, Console], None] = parsed.command

    def work() -> int:
        # Names of folders may hold brackets, which are no markup.
        command(parsed, Console(highlight=False, soft_wrap=True, markup=False))
        return 0

    return exit_code_of(
        work, "lrq-offline", "interrupted. A quantization goes on after its last finished block when run again."
    )


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

    quantize = commands.add_parser("quantize", help="quantize a model folder into an LRQ checkpoint")
    add_settings(quantize)
    quantize.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs to learn each block on (default: 1)")
    quantize.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: ./<model>-lrq-<scheme>")
    quantize.add_argument("--eval-text", metavar="TEXT", help="what you will evaluate on: warns if it was learned from")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT if it is an LRQ checkpoint")
    quantize.add_argument("--restart", action="store_true", help="throw the work of an unfinished run away")
    quantize.set_defaults(command=_quantize)

    plan = commands.add_parser("plan", help="what a quantization will need: memory, disk, minutes (reads headers only)")
    add_settings(plan)
    plan.set_defaults(command=_plan)

    trial = commands.add_parser(
        "try",
        help="whether models of a config can be quantized and served, found out with a small random one",
        description="Make a two-layer random model of a config.json, quantize it, let vLLM load and serve it, and compare its "
        "answers with the reference path's: a minute on a CPU.",
    )
    trial.add_argument("config", type=Path, metavar="CONFIG", help="config.json, or the folder that holds it")
    trial.add_argument("--scheme", choices=list(SCHEMES), default="w4a16", help="default: %(default)s")
    trial.add_argument("--method", choices=METHODS, help="default: lrq, but gptq for w4a4")
    trial.add_argument("--group-size", type=int, metavar="N", help="a step per N inputs (weights of 4 bits and fewer)")
    trial.set_defaults(command=_try)

    evaluate = commands.add_parser("evaluate", help="perplexity, KL divergence and top-1 agreement on a text")
    evaluate.add_argument("model_dir", type=Path, help="float model or LRQ checkpoint")
    evaluate.add_argument("--reference", type=Path, metavar="FP_DIR", help="float model to compare with")
    evaluate.add_argument("--text", required=True, metavar="FILE", help=".jsonl, plain text, or the name of a dataset")
    evaluate.add_argument("--windows", type=int, help="windows to take, spread over the text (default: all)")
    evaluate.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    evaluate.add_argument(
        "--kv-bits", type=int, choices=[8], help="fake-quantize keys and values (default: as the checkpoint says)"
    )
    evaluate.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate)

    _add_checkpoint_commands(commands)
    doctor = commands.add_parser("doctor", help="what this environment can serve: vLLM, plugin, devices, kernels")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_checkpoint_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The commands that look at one LRQ checkpoint."""

    def add(
        name: str, command: Callable[[argparse.Namespace, Console], None], help: str, description: str | None = None
    ) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=help, description=description)
        parser.add_argument("model_dir", type=Path, metavar="DIR")
        parser.set_defaults(command=command)
        return parser

    verify = add(
        "verify", _verify,
        help="prove that a checkpoint is whole, that vLLM loads all of it, and that it answers as it should",
        description="Compare the files with what was written; build vLLM's own model in host memory and prove that each tensor "
        "reaches it once and unchanged; serve a few short texts here and compare with what the reference path said of them.",
    )  # fmt: skip
    verify.add_argument("--files-only", action="store_true", help="leave vLLM out, which need not be installed then")
    verify.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="serve the texts on N GPUs (default: %(default)s)"
    )
    verify.add_argument(
        "--enable-expert-parallel", action="store_true", help="each of the N GPUs takes some experts whole, not a part of all"
    )
    verify.add_argument(
        "--compiled", action="store_true", help="serve the texts compiled, as vllm serve does by default; it starts slower"
    )
    add("inspect", _inspect, help="what is inside an LRQ checkpoint, per layer")
    report = add("report", _report, help="one HTML page about a quantization: errors, learning curves, sizes")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: DIR/lrq_report.html")
    export = add(
        "export", _export,
        help="write a checkpoint in a form that serves without the plugin",
        description="dense: an ordinary 16-bit model, which takes the float model's memory and gives this checkpoint's answers "
        "anywhere; for schemes with 16-bit activations. compressed-tensors: quantized, for vLLM without the plugin; weights of "
        "w8a8 must be symmetric, those of w3a16 and w2a16 take 4 bits there, and those of w4a8 take 8.",
    )  # fmt: skip
    export.add_argument("--to", choices=["dense", "compressed-tensors"], required=True)
    export.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: ./<checkpoint>-<form>")
    export.add_argument(
        "--round-steps",
        action="store_true",
        help="compressed-tensors with 16-bit activations keeps steps in 16 bits: round those that need more",
    )


def _quantize(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.compute import Machine
    from lrq_offline.pipeline import BlockReport, quantize_model

    settings = settings_of(parsed)
    output: Path = parsed.output or Path(f"{parsed.model_dir.resolve().name}-lrq-{parsed.scheme}")
    spent: list[float] = []

    def shown(error: float | None) -> str:
        return "not finite" if error is None else f"{error:.3e}"

    def show(report: BlockReport) -> None:
        if report.resumed:
            console.print(f"block {report.block}/{report.blocks}  finished before")
            return
        spent.append(time.monotonic())
        remaining = (spent[-1] - started) / len(spent) * (report.blocks - report.block)
        # Where nothing was learned, there is one.
        errors = dict.fromkeys((shown(report.error_before), shown(report.error_after)))
        console.print(
            f"block {report.block}/{report.blocks}  relative error {' -> '.join(errors)}  "
            f"{report.seconds:.1f} s  ETA {remaining:.0f} s"
        )

    def show_gradients(windows: int) -> None:
        console.print(f"weighing errors: {windows} windows go through the float model, and their gradients back")

    started = time.monotonic()
    with console.status(f"{settings.method} {settings.scheme}: learning block by block"):
        report = quantize_model(
            parsed.model_dir, output, settings, machine=Machine(parsed.device, parsed.max_gpu_gb, parsed.gpus),
            evaluation=parsed.eval_text, overwrite=parsed.overwrite, restart=parsed.restart,
            on_warning=lambda warning: console.print(f"warning: {warning}"), on_gradients=show_gradients, on_block=show,
        )  # fmt: skip
    linears = report["quantized_linears"]
    console.print(
        f"{output}: {linears['modules']} linear layers, {linears['float_bytes']:,} -> {linears['bytes']:,} bytes "
        f"({linears['ratio']:.1%}) in {report['seconds']:.0f} s"
    )


def _plan(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.compute import Machine
    from lrq_offline.resource_plan import plan_run
    from lrq_offline.scheme_advice import scheme_warnings

    settings = settings_of(parsed)
    plan = plan_run(parsed.model_dir, settings, Machine(parsed.device, parsed.max_gpu_gb))

    def gigabytes(size: int) -> str:
        return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"

    rows = [
        ("to quantize", f"{plan.quantized_modules} linear layers in {plan.blocks} blocks"),
        ("left as is", ", ".join(plan.skipped_modules) or "no linear layer"),
        ("peak GPU memory", "none: it runs on the CPU" if plan.gpu_bytes is None else f"about {gigabytes(plan.gpu_bytes)}"),
        ("peak host memory", f"about {gigabytes(plan.host_bytes)}"),
        ("disk", gigabytes(plan.disk_bytes)),
        ("hidden states in", plan.hidden_states_in),
        ("result", gigabytes(plan.output_bytes)),
        ("serves on", sizes_in_words(plan.tensor_parallel_sizes)),
        ("time", f"{'a few' if plan.minutes < 1 else f'about {plan.minutes:.1f}'} minutes on this machine"),
    ]
    for name, value in rows:
        console.print(f"{name:<18}{value}")
    for warning in scheme_warnings(settings):
        console.print(f"warning: {warning}")


def _try(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.trial import try_config

    settings = QuantizeSettings(parsed.scheme, parsed.method or default_method(parsed.scheme), group_size=parsed.group_size)
    with console.status("") as status:
        trial = try_config(parsed.config, settings, status.update)
    rows = [
        ("to quantize", f"{trial.linears} linear layers at full size"),
        ("serves on", sizes_in_words(trial.tensor_parallel_sizes)),
        ("loading", f"vLLM loads the small model as {trial.vllm_class}, every tensor"),
        ("serving", f"{trial.mean_difference:.4f} nats from the reference path on average"),
    ]
    for name, value in rows:
        console.print(f"{name:<13}{value}")


def _verify(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.verification import check_files, check_loading, check_serving
    from lrq_vllm.checkpoint.store import read_manifest

    def show(name: str, value: str) -> None:
        console.print(f"{name:<10}{value}")

    show("files", f"{check_files(parsed.model_dir)} tensors and config.json are as they were written")
    if parsed.files_only:
        show("verdict", "whole; whether vLLM loads it was not tried (--files-only)")
        return
    ranks, expert_parallel = parsed.tensor_parallel_size, parsed.enable_expert_parallel
    check_ranks(read_manifest(parsed.model_dir), ranks, expert_parallel=expert_parallel)
    with console.status("vLLM loads it"):
        loaded = check_loading(parsed.model_dir)
    show("loading", f"vLLM puts {loaded.tensors} tensors into {loaded.parameters} parameters of {loaded.model}, each unchanged")
    with console.status("vLLM serves it"):
        replayed = check_serving(parsed.model_dir, ranks, expert_parallel=expert_parallel, compiled=parsed.compiled)
    how = "texts, compiled" if parsed.compiled else "texts"
    show(
        "serving",
        f"{replayed.texts} {how}: {replayed.mean_difference:.4f} nats from the reference path on average (at most "
        f"{replayed.tolerance:.2f}), kernels {', '.join(replayed.kernels)}",
    )
    show("verdict", "right")


def _evaluate(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.evaluate import evaluate_folder

    with console.status("evaluating"):
        quality = evaluate_folder(
            parsed.model_dir, parsed.text, reference=parsed.reference, windows=parsed.windows, seq_len=parsed.seq_len,
            kv_bits=parsed.kv_bits, device=parsed.device,
        )  # fmt: skip
    if parsed.json:
        console.print(json.dumps(asdict(quality)))
        return
    console.print(f"tokens      {quality.tokens}\nperplexity  {quality.perplexity:.4f}")
    if quality.kl is not None and quality.top1 is not None:
        console.print(
            f"reference   {quality.reference_perplexity:.4f}\n"
            f"KL          {quality.kl:.5f} nats (95% interval {quality.kl_low:.5f} to {quality.kl_high:.5f})\n"
            f"top-1       {quality.top1:.2%}"
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


def _report(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.report_html import write_report

    console.print(str(write_report(parsed.model_dir, parsed.output)))


def _export(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_offline.compressed_tensors_export import export_compressed_tensors
    from lrq_offline.dense_export import export_dense

    output: Path = parsed.output or Path(f"{parsed.model_dir.resolve().name}-{parsed.to}")
    if parsed.to == "dense":
        if parsed.round_steps:
            raise SettingsError("--round-steps is for --to compressed-tensors: a dense model has no steps. Leave it out.")
        with console.status("writing"):
            total_bytes = export_dense(parsed.model_dir, output)
        console.print(f"{output}: {total_bytes:,} bytes")
        return
    with console.status("writing"):
        written = export_compressed_tensors(parsed.model_dir, output, round_steps=parsed.round_steps)
    steps = f"steps changed by up to {written.step_change:.2%}" if written.step_change else "every number as it was"
    console.print(f"{output}: {written.total_bytes:,} bytes, {steps}")


def _doctor(parsed: argparse.Namespace, console: Console) -> None:
    from lrq_vllm.diagnosis import diagnose

    findings = diagnose()
    width = max(len(finding.subject) for finding in findings) + 2
    for finding in findings:
        console.print(f"{finding.subject:<{width}}{finding.detail}")
    problems = [f"{finding.subject}: {finding.cure}" for finding in findings if finding.cure]
    if problems:
        raise SettingsError(f"Checkpoints cannot be served here. {one_paragraph(problems, 'Then run this again.')}")
    console.print("Checkpoints can be served here.")
