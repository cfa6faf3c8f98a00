"""Text to windows of tokens, and the inputs that the first decoder block receives for them."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lrq_offline.decoder_blocks import Family
from lrq_vllm.errors import CalibrationDataError

__all__ = ["BlockInputs", "capture_block_inputs", "read_texts", "shipped_calibration", "token_windows"]


def shipped_calibration() -> Path:
    """The calibration text that comes with lrq (public domain, see NOTICE): 64 records of 3,000 characters."""
    return Path(str(files("lrq_offline") / "data" / "calibration.jsonl"))


def read_texts(path: Path) -> list[str]:
    """The texts of a file: the ``text`` of each line of a .jsonl, or the whole of any other file as one text.

    Raises CalibrationDataError if the file cannot be read or holds no text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationDataError(f"{path} cannot be read as text ({error}). Give a .jsonl or a plain UTF-8 file.") from error
    texts = list(_jsonl_texts(path, content)) if path.suffix == ".jsonl" else [content]
    if not any(text.strip() for text in texts):
        raise CalibrationDataError(f'{path} holds no text. Give a .jsonl with a "text" in each line, or a plain text file.')
    return texts


def _jsonl_texts(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield str(json.loads(line)["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationDataError(
                f'{path}, line {number}: not a JSON object with a "text" ({error!r}). Put one such object on each line.'
            ) from error


def token_windows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], samples: int | None, seq_len: int) -> Tensor:
    """Token ids int64 [samples, seq_len]: windows spread evenly over the tokenized texts, end to end.

    samples None takes every whole window. Raises CalibrationDataError if the texts have too few tokens.
    """
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    available = len(ids) // seq_len
    wanted = max(available, 1) if samples is None else samples
    if available < wanted:
        raise CalibrationDataError(
            f"The text has {len(ids)} tokens, which makes {available} windows of {seq_len}; {wanted} are needed. "
            "Give a longer text, or lower --samples or --seq-len."
        )
    starts = torch.linspace(0, len(ids) - seq_len, wanted).long()
    return torch.stack([torch.tensor(ids[start : start + seq_len]) for start in starts.tolist()])


@dataclass(frozen=True)
class BlockInputs:
    """What the first block receives: hidden states [samples, seq_len, width] and the other arguments of the call.

    ``arguments`` come from a batch of one and broadcast over the batch (rotary tables, positions, mask).
    """

    hidden: Tensor
    arguments: dict[str, Any]


class _CapturedError(Exception):
    """Leaves the model's forward as soon as the first block is reached."""


class _Catcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **arguments: Any) -> NoReturn:
        self.calls.append((hidden, arguments))
        raise _CapturedError


@torch.no_grad()
def capture_block_inputs(model: nn.Module, family: Family, windows: Tensor) -> BlockInputs:
    """Run what stands before the blocks on token windows [samples, seq_len].

    ``model`` is an empty model whose embedding and rotary tables are real; its blocks are not touched.
    """
    blocks, catcher = model.get_submodule(family.blocks), _Catcher()
    model.set_submodule(family.blocks, nn.ModuleList([catcher]))
    try:
        for window in windows:
            with suppress(_CapturedError):
                model(input_ids=window.unsqueeze(0), use_cache=False)
    finally:
        model.set_submodule(family.blocks, blocks)
    hidden = torch.cat([hidden for hidden, _ in catcher.calls])
    return BlockInputs(hidden, catcher.calls[0][1])
