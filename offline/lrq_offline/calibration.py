"""Text to windows of tokens, and what the decoder blocks receive for them."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lrq_offline.decoder_blocks import blocks_of, load_block, restore_constants
from lrq_offline.source_model import SourceModel
from lrq_vllm.token_windows import spread_windows

__all__ = ["BlockInputs", "first_block_inputs", "token_windows"]


def token_windows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], samples: int | None, seq_len: int) -> Tensor:
    """Token ids int64 [samples, seq_len]: windows spread evenly over the tokenized texts, end to end.

    samples None takes every whole window. Raises CalibrationDataError if the texts have too few tokens.
    """
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    return spread_windows(ids, samples, seq_len)


@dataclass(frozen=True)
class BlockInputs:
    """What the first block receives, hidden states [samples, seq_len, width], and the other arguments of each block's call.

    ``arguments`` come from a batch of one and broadcast over the batch (rotary tables, positions, mask). Blocks that see a
    window of tokens have other ones than blocks that see all.
    """

    hidden: Tensor
    arguments: list[dict[str, Any]]


class _CapturedError(Exception):
    """Leaves the model's forward as soon as the last block is reached."""


class _Catcher(nn.Module):
    """Stands for a block: notes its call and hands the hidden states on, or ends the pass if it is the last."""

    hidden: Tensor
    arguments: dict[str, Any]

    def __init__(self, last: bool) -> None:
        super().__init__()
        self._last = last

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        if self._last:
            raise _CapturedError
        return hidden


@torch.no_grad()
def first_block_inputs(source: SourceModel, model: nn.Module, windows: Tensor, dtype: torch.dtype) -> BlockInputs:
    """Run what stands before the blocks on token windows [samples, seq_len], on the CPU.

    The hidden states are kept in ``dtype``. ``model`` is the empty model of ``source``: it gets its embedding, in float32, and
    its rotary tables; its blocks are not touched.
    """
    family, cpu = source.family, torch.device("cpu")
    model.set_submodule(family.embedding, load_block(model, family.embedding, source.read, torch.float32, cpu))
    restore_constants(model, family, source.config)
    blocks = blocks_of(model, family)
    catchers = [_Catcher(last=index == len(blocks) - 1) for index in range(len(blocks))]
    model.set_submodule(family.blocks, nn.ModuleList(catchers))
    hidden = []
    try:
        for window in windows:
            with suppress(_CapturedError):
                model(input_ids=window.unsqueeze(0), use_cache=False)
            hidden.append(catchers[0].hidden.to(dtype))
    finally:
        model.set_submodule(family.blocks, blocks)
    return BlockInputs(torch.cat(hidden), [catcher.arguments for catcher in catchers])
