"""Text to windows of tokens, and the inputs that the first decoder block receives for them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lrq_offline.decoder_blocks import Family
from lrq_vllm.errors import CalibrationDataError

__all__ = ["BlockInputs", "capture_block_inputs", "token_windows"]


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
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.calls: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden: Tensor, **arguments: Any) -> NoReturn:
        self.calls.append((hidden.to(self._dtype), arguments))
        raise _CapturedError


@torch.no_grad()
def capture_block_inputs(model: nn.Module, family: Family, windows: Tensor, dtype: torch.dtype) -> BlockInputs:
    """Run what stands before the blocks on token windows [samples, seq_len].

    The hidden states are kept in ``dtype``. ``model`` is an empty model whose embedding and rotary tables are real; its
    blocks are not touched.
    """
    blocks, catcher = model.get_submodule(family.blocks), _Catcher(dtype)
    model.set_submodule(family.blocks, nn.ModuleList([catcher]))
    try:
        for window in windows:
            with suppress(_CapturedError):
                model(input_ids=window.unsqueeze(0), use_cache=False)
    finally:
        model.set_submodule(family.blocks, blocks)
    hidden = torch.cat([hidden for hidden, _ in catcher.calls])
    return BlockInputs(hidden, catcher.calls[0][1])
