"""What bench/quality.py and bench/correction.py evaluate on: texts that were not calibrated on, and the float model."""

import argparse
import datetime
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.compute import choose_device, device_name
from lrq_offline.evaluate import compare
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import load_tokenizer

__all__ = ["HeldOut", "add_held_out"]


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """The options that :meth:`HeldOut.of` reads."""
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", nargs="+", required=True, type=_named, metavar="NAME=FILE", help="held-out texts")
    parser.add_argument("--windows", type=int, help="of each text (default: all)")
    parser.add_argument("--seq-len", type=int, default=512, help="of evaluation windows (default: %(default)s)")
    parser.add_argument("--device", default="auto")


def _named(text: str) -> tuple[str, str]:
    name, separator, file = text.partition("=")
    if not (name and separator and file):
        raise argparse.ArgumentTypeError(f"{text!r} has no name: write it like docs=docs.jsonl")
    return name, file


@dataclass(frozen=True)
class HeldOut:
    """about: what a result's file begins with. windows: token ids int64 [windows, seq_len] of each text. reference: the float
    model on ``device``.
    """

    about: dict[str, Any]
    windows: dict[str, Tensor]
    reference: nn.Module
    device: torch.device

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "HeldOut":
        """The texts and the model that a command names."""
        device, tokenizer = choose_device(arguments.device), load_tokenizer(arguments.model)
        texts = dict(arguments.text)
        windows = {
            name: token_windows(tokenizer, read_texts(path, tokenizer), arguments.windows, arguments.seq_len).to(device)
            for name, path in texts.items()
        }
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": device_name(device),
            "versions": {name: version(name) for name in ("lrq", "torch", "transformers")}
            | {"python": platform.python_version()},
            "model": arguments.model.name,
            "texts": [f"{name}={Path(path).name}" for name, path in texts.items()],
        }
        return cls(about, windows, load_model(arguments.model).to(device), device)

    def qualities(self, folder: Path) -> dict[str, dict[str, Any]]:
        """By text, how good the model in ``folder`` is."""
        model = load_model(folder).to(self.device)
        return {name: asdict(compare(model, self.reference, tokens)) for name, tokens in self.windows.items()}
