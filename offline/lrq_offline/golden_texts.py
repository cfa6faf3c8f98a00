"""What the reference path says of the first calibration texts, kept with the checkpoint (lrq_vllm/checkpoint/golden.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq_offline.agreement import of_tokens
from lrq_offline.reference_model import open_model
from lrq_offline.served_precision import served_dtype
from lrq_vllm.checkpoint.golden import GoldenText, GoldenTexts

__all__ = ["golden_memory", "golden_texts"]

_TEXTS, _TOKENS = 4, 32
_DIGITS = 4
_COARSEST = torch.bfloat16  # what a server may be told to compute in, whatever the model's own dtype


def golden_memory(outside: int, largest_block: int, vocabulary: int) -> int:
    """Bytes of :func:`golden_texts` at their peak, for so many values outside of a model's blocks and in its largest block."""
    # In float32, a block's weights beside what they are made of; logits also in float64, before and after the softmax.
    return 4 * (outside + 2 * largest_block) + _TEXTS * _TOKENS * vocabulary * (4 + 8 + 8)


@torch.inference_mode()
def golden_texts(folder: Path, config: Mapping[str, Any], windows: Tensor, device: torch.device) -> GoldenTexts:
    """Of the checkpoint in ``folder``, whose config.json will hold ``config``, served in its own 16-bit dtype.

    windows: token ids, int64 [samples, seq_len]; the beginnings of the first few are taken. A block is in memory at a time.
    """
    tokens = windows[:_TEXTS, :_TOKENS].to(device)

    def log_probabilities(served_in: torch.dtype | None) -> Tensor:
        model = open_model(folder, config, served_in=served_in, device=device, streamed=True)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return of_tokens(logits.double().log_softmax(-1), tokens)

    served_in = served_dtype(config)
    found = {dtype: log_probabilities(dtype) for dtype in dict.fromkeys((served_in, _COARSEST, None))}
    texts = [
        GoldenText(text, [round(value, _DIGITS) for value in values])
        for text, values in zip(tokens.tolist(), found[served_in].tolist(), strict=True)
    ]
    return GoldenTexts(texts, round((found[_COARSEST] - found[None]).abs().mean().item(), _DIGITS))
