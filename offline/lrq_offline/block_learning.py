"""Learn one block: make the quantized block's output match the float block's, by Adam over random windows.

    minimise || block_fp(X) - block_q(X_q) ||^2

X is the float model's input to this block, X_q what the already quantized blocks produce (LRQ, section 2).
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.config import QuantizeSettings

__all__ = ["LearningResult", "learn_block", "relative_error", "run_block"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningResult:
    """Relative squared error of the block's output on the calibration windows, before and after; seconds it took."""

    error_before: float
    error_after: float
    seconds: float


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any], batch_size: int) -> Tensor:
    """The block's output for hidden [samples, seq_len, width], in hidden's dtype; computed batch by batch in float32."""
    outputs = [block(batch.float(), **arguments).to(hidden.dtype) for batch in hidden.split(batch_size)]
    return torch.cat(outputs)


@torch.no_grad()
def relative_error(block: nn.Module, hidden: Tensor, target: Tensor, arguments: dict[str, Any], batch_size: int) -> float:
    """|| block(hidden) - target ||^2 / || target ||^2 over all windows."""
    squared_error = squared_norm = 0.0
    for inputs, wanted in zip(hidden.split(batch_size), target.split(batch_size), strict=True):
        wanted = wanted.float()
        squared_error += (block(inputs.float(), **arguments) - wanted).square().sum().item()
        squared_norm += wanted.square().sum().item()
    return squared_error / max(squared_norm, torch.finfo(torch.float32).tiny)


def learn_block(
    block: nn.Module,
    hidden: Tensor,
    target: Tensor,
    arguments: dict[str, Any],
    settings: QuantizeSettings,
    learning_rate: float,
    generator: torch.Generator,
) -> LearningResult:
    """Learn every parameter of ``block`` that wants a gradient, in place; with none this only measures the error.

    hidden, target: X_q and block_fp(X), [samples, seq_len, width]. Adam with the learning rate decayed to 0 by a
    half-cosine. If the error did not fall, the block is put back to where it started.
    """
    started = time.monotonic()
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    before = relative_error(block, hidden, target, arguments, settings.batch_size)
    if not parameters:
        return LearningResult(before, before, time.monotonic() - started)
    initial = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    scale = target.float().square().mean().item()
    for step, chosen in enumerate(_batches(len(hidden), settings, generator)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.iters))
        with _matrix_products_in_bfloat16():
            output = block(hidden[chosen].float(), **arguments).float()
        # Dividing by the target's mean square keeps Adam's epsilon small beside the gradients; it changes no direction.
        loss = nn.functional.mse_loss(output, target[chosen].float()) / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    after = relative_error(block, hidden, target, arguments, settings.batch_size)
    if not after < before:
        logger.warning("learning did not lower the error (%.3g to %.3g): the block keeps round-to-nearest", before, after)
        with torch.no_grad():
            for parameter, value in zip(parameters, initial, strict=True):
                parameter.copy_(value)
        after = before
    return LearningResult(before, after, time.monotonic() - started)


def _matrix_products_in_bfloat16() -> AbstractContextManager[None]:
    """Autocast where the processor multiplies bfloat16 natively. Quantizers opt out of it and stay in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu.get_capabilities().get("avx512_bf16", False))


def _batches(samples: int, settings: QuantizeSettings, generator: torch.Generator) -> Iterator[Tensor]:
    """``iters`` random batches of distinct windows."""
    for _ in range(settings.iters):
        yield torch.randperm(samples, generator=generator)[: settings.batch_size]
