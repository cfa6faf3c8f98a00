"""What quantization cost: perplexity, and against the float model KL divergence and top-1 agreement."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrq_offline.calibration import read_texts, token_windows
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import load_tokenizer

__all__ = ["Quality", "compare", "evaluate_folder"]


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens of held-out windows.

    kl: KL(float || quantized) in nats. top1: share of tokens whose most likely successor is the same. Both None
    without a float model to compare with.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None


def evaluate_folder(
    folder: Path, text: Path, *, reference: Path | None = None, windows: int | None = None, seq_len: int = 512
) -> Quality:
    """Evaluate a float folder or an LRQ checkpoint on a text, by the reference path.

    windows None takes as many whole windows as the text has; they are spread evenly over it. Raises LrqError's children.
    """
    tokens = token_windows(load_tokenizer(folder), read_texts(text), windows, seq_len)
    return compare(load_model(folder), None if reference is None else load_model(reference), tokens)


@torch.inference_mode()
def compare(model: nn.Module, reference: nn.Module | None, windows: Tensor) -> Quality:
    """Quality of ``model`` on token windows [samples, seq_len]; every token after a window's first is predicted."""
    loss = divergence = agreement = reference_loss = 0.0
    count = windows[:, 1:].numel()
    for window in windows:
        log_p, successors = _log_probabilities(model, window), window[1:, None]
        loss -= log_p.gather(1, successors).sum().item()
        if reference is not None:
            log_r = _log_probabilities(reference, window)
            reference_loss -= log_r.gather(1, successors).sum().item()
            divergence += (log_r.exp() * (log_r - log_p)).sum().item()
            agreement += (log_r.argmax(1) == log_p.argmax(1)).sum().item()
    perplexity = math.exp(loss / count)
    if reference is None:
        return Quality(count, perplexity)
    return Quality(count, perplexity, divergence / count, agreement / count, math.exp(reference_loss / count))


def _log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities float64 [seq_len - 1, vocabulary] of the tokens after the first."""
    logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)
