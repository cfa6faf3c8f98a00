"""What quantization cost: perplexity, and against the float model KL divergence and top-1 agreement."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrq_offline.calibration import token_windows
from lrq_offline.calibration_text import read_texts
from lrq_offline.compute import choose_device
from lrq_offline.kv_cache import quantize_kv_cache
from lrq_offline.reference_model import load_model
from lrq_offline.source_model import check_length, check_vocabulary, load_tokenizer, model_config
from lrq_vllm.bootstrap import mean_interval
from lrq_vllm.checkpoint.schema import config_without_quantization
from lrq_vllm.checkpoint.store import read_config, read_manifest
from lrq_vllm.errors import SettingsError

__all__ = ["Quality", "compare", "evaluate_folder"]


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens of held-out windows.

    kl: KL(float || quantized) in nats; kl_low, kl_high: its 95% interval, by bootstrap over windows. top1: share of tokens
    whose most likely successor is the same. All None without a float model to compare with.
    """

    tokens: int
    perplexity: float
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None


def evaluate_folder(
    folder: Path,
    text: Path | str,
    *,
    reference: Path | None = None,
    windows: int | None = None,
    seq_len: int = 512,
    kv_bits: int | None = None,
    device: str = "auto",
) -> Quality:
    """Evaluate a float folder or an LRQ checkpoint on a text, by the reference path.

    windows None takes as many whole windows as the text has; they are spread evenly over it. kv_bits 8 fake-quantizes the
    model's keys and values (not the reference's), and so does a checkpoint that asks for it. Raises LrqError's children.
    """
    if windows is not None and windows < 1:
        raise SettingsError(f"--windows is {windows}: give 1 or more, or leave it out to take all.")
    if seq_len < 2:
        raise SettingsError(f"--seq-len is {seq_len}: give 2 or more, so that a token follows another.")
    vocabularies = [read_config(path).get("vocab_size") for path in (folder, reference) if path is not None]
    if len(set(vocabularies)) > 1:
        raise SettingsError(
            f"{folder} knows {vocabularies[0]} tokens and the reference {reference} {vocabularies[1]}: it is another model. "
            "Give the one that was quantized."
        )
    raw_config = read_config(folder)
    config = model_config(config_without_quantization(raw_config), folder)
    check_length(folder, seq_len, config)
    tokenizer = load_tokenizer(folder)
    tokens = token_windows(tokenizer, read_texts(text, tokenizer), windows, seq_len)
    check_vocabulary(folder, tokens, config)
    place = choose_device(device)
    model = load_model(folder).to(place)
    if kv_bits is None and "quantization_config" in raw_config:
        kv_bits = read_manifest(folder).kv_bits
    if kv_bits is not None:
        quantize_kv_cache(model, kv_bits)
    return compare(model, None if reference is None else load_model(reference).to(place), tokens.to(place))


@torch.inference_mode()
def compare(model: nn.Module, reference: nn.Module | None, windows: Tensor) -> Quality:
    """Quality of ``model`` on token windows [samples, seq_len]; every token after a window's first is predicted."""
    losses, divergences, agreements, reference_losses = [], [], [], []
    for window in windows:
        log_p, successors = _log_probabilities(model, window), window[1:, None]
        losses.append(-log_p.gather(1, successors).mean())
        if reference is not None:
            log_r = _log_probabilities(reference, window)
            reference_losses.append(-log_r.gather(1, successors).mean())
            divergences.append((log_r.exp() * (log_r - log_p)).sum(dim=1).mean())
            agreements.append((log_r.argmax(1) == log_p.argmax(1)).double().mean())
    count = windows[:, 1:].numel()
    perplexity = math.exp(torch.stack(losses).mean().item())
    if reference is None:
        return Quality(count, perplexity)
    kl = torch.stack(divergences).cpu()
    low, high = mean_interval(kl)
    top1 = torch.stack(agreements).mean().item()
    reference_perplexity = math.exp(torch.stack(reference_losses).mean().item())
    return Quality(count, perplexity, kl.mean().item(), low, high, top1, reference_perplexity)


def _log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Log-probabilities float64 [seq_len - 1, vocabulary] of the tokens after the first."""
    logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)
