"""The command line's options that decide what a quantization does, for ``quantize`` and ``plan``."""

import argparse
from pathlib import Path

from lrq_offline.config import DEVICES, FULL_RANK, INPUTS, LOSSES, METHODS, PRESETS, QuantizeSettings, default_method
from lrq_vllm.checkpoint.schema import SCHEMES
from lrq_vllm.errors import SettingsError, one_paragraph

__all__ = ["add_settings", "settings_of"]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that make a :class:`QuantizeSettings` and a machine."""
    default = PRESETS["default"]
    parser.add_argument("model_dir", type=Path, help="folder of a Hugging Face model (config.json, *.safetensors, tokenizer)")
    parser.add_argument("--scheme", required=True, choices=list(SCHEMES), help="bits of weights (w) and activations (a)")
    parser.add_argument("--method", choices=METHODS, help="default: lrq, but gptq for w4a4")
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help="how long to learn (default: %(default)s)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="a step per N inputs (4 bits and fewer; default: a channel)"
    )
    parser.add_argument("--symmetric", action="store_true", help="symmetric weights (default: asymmetric)")
    parser.add_argument(
        "--rank", type=_rank, metavar="K", help=f"rank of LRQ's scale matrix, or {FULL_RANK} (default: width / 4)"
    )
    parser.add_argument("--iters", type=int, help=f"most steps per block (default preset: {default.iters})")
    parser.add_argument("--lr", type=float, help="learning rate (default: by method and scheme, docs/quantize.md)")
    parser.add_argument("--weight-decay", type=float, metavar="X", help="of the scale matrix; 0 as in the papers")
    parser.add_argument(
        "--renew",
        action=argparse.BooleanOptionalAction,
        help="let LRQ's factors begin anew (default: from 300 steps on, below 8 bits)",
    )
    parser.add_argument(
        "--loss", choices=LOSSES,
        help="squared error, or weighed by what it does to predictions (default: fisher below 8 bits without a correction)",
    )  # fmt: skip
    parser.add_argument(
        "--learn-inputs", choices=INPUTS,
        help="what blocks learn from: what quantized blocks produce, or the float model's inputs (default: float at 8 bits "
        "without a correction)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, help=f"calibration windows (default preset: {default.samples})")
    parser.add_argument("--seq-len", type=int, help=f"tokens per window (default preset: {default.seq_len})")
    parser.add_argument("--batch-size", type=int, help=f"windows per step (default preset: {default.batch_size})")
    parser.add_argument("--kv-bits", type=int, choices=[8], help="keys and values to learn and serve with (default: 16)")
    _add_correction(parser)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--calibration", metavar="TEXT",
        help='.jsonl with "text" or chat "messages", plain text, or a dataset\'s name (default: what ships with lrq)',
    )  # fmt: skip
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU if there is one")
    parser.add_argument(
        "--max-gpu-gb", type=float, metavar="GB", help="for cached hidden states (default: half of what is free)"
    )


def _add_correction(parser: argparse.ArgumentParser) -> None:
    """What stands beside the integers: LRC's low-rank pairs and QuaRot's rotations."""
    default = QuantizeSettings("w4a16")
    parser.add_argument(
        "--correction-rank", type=_correction_rank, metavar="K",
        help="rank of a 16-bit correction of each layer: a number, or a share of its smaller side such as 10%%",
    )  # fmt: skip
    parser.add_argument(
        "--correction-statistics",
        choices=INPUTS,
        default=default.correction_statistics,
        help="inputs it is found with: what quantized blocks produce, or the float model's (default: %(default)s)",
    )
    parser.add_argument(
        "--correction-rounds", type=int, default=default.correction_rounds, metavar="T",
        help="how often weight and correction are found in turn (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rotate",
        action=argparse.BooleanOptionalAction,
        help="spread outliers over all channels by Hadamard rotations (default: for w4a4)",
    )
    parser.add_argument(
        "--hadamard-block", type=int, metavar="N",
        help="inputs of down_proj that are rotated together (default: all, which no tensor parallelism divides)",
    )  # fmt: skip


def _correction_rank(text: str) -> int | str:
    return text if text.endswith("%") else int(text)


def _rank(text: str) -> int | str:
    return text if text == FULL_RANK else int(text)


def settings_of(parsed: argparse.Namespace) -> QuantizeSettings:
    """What :func:`add_settings` parsed. Raises SettingsError, also for an option that would be taken and do nothing."""
    preset = PRESETS[parsed.preset].with_given(
        iters=parsed.iters, samples=parsed.samples, seq_len=parsed.seq_len, batch_size=parsed.batch_size
    )
    settings = QuantizeSettings(
        scheme=parsed.scheme, method=parsed.method or default_method(parsed.scheme), group_size=parsed.group_size,
        symmetric=parsed.symmetric, rank=parsed.rank, learning_rate=parsed.lr, weight_decay=parsed.weight_decay,
        renew=parsed.renew, loss=parsed.loss, learn_inputs=parsed.learn_inputs, kv_bits=parsed.kv_bits,
        correction_rank=parsed.correction_rank,
        correction_statistics=parsed.correction_statistics, correction_rounds=parsed.correction_rounds, rotate=parsed.rotate,
        hadamard_block=parsed.hadamard_block, seed=parsed.seed, calibration=parsed.calibration, **vars(preset),
    )  # fmt: skip
    unused = _unused(settings)
    if unused:
        raise SettingsError(one_paragraph(unused, "Leave them out, or choose what they are for."))
    return settings


def _unused(settings: QuantizeSettings) -> list[str]:
    """A sentence for each option that was given and that nothing will look at."""
    of_lrq = {"--rank": settings.rank, "--renew": settings.renew}
    of_learning = {
        "--lr": settings.learning_rate,
        "--weight-decay": settings.weight_decay,
        "--loss": settings.loss,
        "--learn-inputs": settings.learn_inputs,
    }
    unused = [
        f"{option} is for method lrq, not for {settings.method}"
        for option, value in of_lrq.items()
        if value is not None and settings.method != "lrq"
    ]
    unused += [
        f"{option} is for methods that learn, lrq and flexround, not for {settings.method}"
        for option, value in of_learning.items()
        if value is not None and not settings.learns
    ]
    if settings.renew and settings.rank == FULL_RANK:
        unused.append(f"--renew is for the two factors of a matrix, which --rank {FULL_RANK} does not have")
    default = QuantizeSettings(settings.scheme)
    of_corrections = ("correction_statistics", "correction_rounds")
    unused += [
        f"--{name.replace('_', '-')} is for a correction (--correction-rank)"
        for name in of_corrections
        if not settings.corrects and getattr(settings, name) != getattr(default, name)
    ]
    return unused
