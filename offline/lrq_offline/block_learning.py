"""Learn one block: make the quantized block's output match the float block's, by AdamW over random windows.

    minimise || block_fp(X) - block_q(X_q) ||^2

X is the float model's input to this block, X_q what the already quantized blocks produce (LRQ, section 2), or X again. The
length may be that of another metric (output_metric.py). Some windows are held out: the state that is best on them is kept,
and learning ends early when they stop getting better.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.compute import block_output
from lrq_offline.config import HELD_OUT_SHARE, QuantizeSettings
from lrq_offline.experts import experts_of
from lrq_offline.hidden_states import BatchFeeder, HiddenStates
from lrq_offline.learned_scales import LearnedRounding, LrqScale
from lrq_offline.learning_step import LearningStep, ParameterGroup
from lrq_offline.output_metric import PLAIN, OutputMetric
from lrq_offline.quantized_block import held_weights
from lrq_offline.ranks import ONE_RANK, Ranks

__all__ = [
    "LearningCurve",
    "LearningResult",
    "LearningWindows",
    "learn_block",
    "relative_error",
    "run_block",
    "windows_at_once",
]

logger = logging.getLogger(__name__)

_PATIENCE = 6
# In passes in which nothing is learned. Experts apart take many launches, however many tokens they have.
_WINDOWS_AT_ONCE, _WINDOWS_OF_EXPERTS = 4, 16


@dataclass(frozen=True)
class LearningCurve:
    """Relative squared errors at some steps: mean over the training batches since the last one, and on the held-out windows."""

    step: list[int] = field(default_factory=list)
    train: list[float | None] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class LearningResult:
    """Relative squared error of the block's output on all calibration windows before and after; steps really taken.

    seconds_per_step: wall-clock time of a step between checks; 0 if none was taken.
    """

    error_before: float
    error_after: float
    steps: int
    seconds_per_step: float
    curve: LearningCurve


@dataclass(frozen=True)
class LearningWindows:
    """Which windows are learned from, and which only say how well that went: int64 indices, in random order.

    One in sixteen of all ranks' is held out, and none of so few that each is needed for learning.
    """

    learned_from: Tensor
    held_out: Tensor

    @classmethod
    def drawn(cls, samples: int, generator: torch.Generator, ranks: Ranks = ONE_RANK) -> "LearningWindows":
        """Of as many windows of this rank; all ranks have as many, and hold as many out."""
        held_out = min(-(-(samples * ranks.size // HELD_OUT_SHARE) // ranks.size), samples - 1)
        order = torch.randperm(samples, generator=generator)
        return cls(order[held_out:], order[:held_out])


def windows_at_once(block: nn.Module) -> int:
    """How many a pass over all of them gives ``block`` at a time, if nothing is learned."""
    return _WINDOWS_OF_EXPERTS if experts_of(block) else _WINDOWS_AT_ONCE


@torch.no_grad()
def run_block(
    block: nn.Module,
    source: HiddenStates,
    target: HiddenStates,
    arguments: dict[str, Any],
    batch_size: int,
    dtype: torch.dtype,
) -> None:
    """Write the block's output for ``source`` into ``target`` (which may be ``source``), batch by batch."""
    for rows in source.slices(batch_size):
        target.put(rows, block_output(block, source.get(rows), arguments, dtype))


@torch.no_grad()
def relative_error(
    block: nn.Module,
    inputs: HiddenStates,
    targets: HiddenStates,
    arguments: dict[str, Any],
    rows: list[Tensor],
    dtype: torch.dtype,
    ranks: Ranks = ONE_RANK,
    metric: OutputMetric = PLAIN,
) -> float:
    """|| block(inputs) - targets ||^2 / || targets ||^2 over every rank's samples in ``rows``, int64 indices per batch."""
    sums = torch.zeros(2, dtype=torch.float64, device=inputs.device)
    with held_weights(block):
        for batch in rows:
            wanted = targets.get(batch).float()
            output = block_output(block, inputs.get(batch), arguments, dtype)
            sums += torch.stack([metric(vectors).square().sum() for vectors in (output.float() - wanted, wanted)])
    squared_error, squared_norm = ranks.sum(sums).tolist()
    return float(squared_error / max(squared_norm, torch.finfo(torch.float32).tiny))


def learn_block(
    block: nn.Module,
    inputs: HiddenStates,
    targets: HiddenStates,
    arguments: dict[str, Any],
    settings: QuantizeSettings,
    rate: float,
    windows: LearningWindows,
    generator: torch.Generator,
    dtype: torch.dtype,
    ranks: Ranks = ONE_RANK,
    metric: OutputMetric = PLAIN,
) -> LearningResult:
    """Learn every parameter of ``block`` that wants a gradient, in place; with none this only measures the error.

    inputs, targets: X_q (or X) and block_fp(X) of this rank's windows, ``windows`` which of them are learned from; a batch is
    that of all ranks together. ``metric`` measures the loss and all errors. Scales that renew their factors do so after each
    check. If no state was better than the first, the block is put back to where it started.
    """
    batch_size = settings.batch_size // ranks.size
    everything = list(torch.arange(len(inputs)).split(batch_size))
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    before = relative_error(block, inputs, targets, arguments, everything, dtype, ranks, metric)
    if not parameters or not math.isfinite(before):
        return LearningResult(before, before, 0, 0.0, LearningCurve())
    batches = _batches(windows.learned_from, settings.iters, batch_size, generator)
    checked = list((windows.held_out if len(windows.held_out) else windows.learned_from).split(batch_size))
    scale = _mean_square(targets, ranks, metric)
    step = LearningStep(
        block, _parameter_groups(block, parameters, settings, rate), BatchFeeder(inputs, targets, batches), arguments,
        steps=settings.iters, scale=scale, dtype=dtype, ranks=ranks, metric=metric,
    )  # fmt: skip
    renewing = [module for module in block.modules() if isinstance(module, LrqScale) and module.renews]
    best = _BestState([*parameters, *(rounding.weight for rounding in renewing)])
    curve = LearningCurve()

    def check(taken: int) -> bool:
        """Record the error after ``taken`` steps; False when learning should end."""
        error = relative_error(block, inputs, targets, arguments, checked, dtype, ranks, metric)
        if math.isfinite(error):
            previous = curve.step[-1] if curve.step else 0
            curve.train.append(ranks.sum(step.losses[previous:taken].mean()).item() if taken else None)
            curve.held_out.append(error)
            curve.step.append(taken)
        return best.offer(error)

    check(0)
    taken, every, seconds = 0, settings.check_every, 0.0
    going_on = True
    while taken < settings.iters and going_on:
        started, upto = time.monotonic(), min(taken + every, settings.iters)
        for number in range(taken, upto):
            step.run(number)
        step.wait()
        seconds += time.monotonic() - started
        taken = upto
        going_on = check(taken)
        if taken < settings.iters and going_on:
            for rounding in renewing:
                rounding.renew(generator)
                step.forget(rounding.matrix_parameters())
            step.wait()
    best.restore()
    after = relative_error(block, inputs, targets, arguments, everything, dtype, ranks, metric)
    if best.is_first:
        logger.warning("learning did not lower the error of %.3g: the block stays as it began", before)
    return LearningResult(before, after, taken, seconds / taken, curve)


class _BestState:
    """The values of ``tensors`` at the lowest held-out error so far."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._values = [tensor.clone() for tensor in self._tensors]
        self._errors: list[float] = []
        self._best_at = 0

    @property
    def is_first(self) -> bool:
        return self._best_at == 0

    def offer(self, error: float) -> bool:
        """Keep the present values if ``error`` is the lowest. False once it is NaN or has long not been lower."""
        self._errors.append(error)
        latest = len(self._errors) - 1
        if error < self._errors[self._best_at]:
            self._best_at = latest
            torch._foreach_copy_(self._values, self._tensors)
        return math.isfinite(error) and latest - self._best_at < _PATIENCE

    def restore(self) -> None:
        torch._foreach_copy_(self._tensors, self._values)


def _mean_square(states: HiddenStates, ranks: Ranks, metric: OutputMetric) -> float:
    measured = (metric(states.get(rows).float()) for rows in states.slices(8))
    total = torch.stack([vectors.double().square().mean(dim=(1, 2)).sum() for vectors in measured]).sum()
    return max(ranks.sum(total).item() / (len(states) * ranks.size), torch.finfo(torch.float32).tiny)


def _parameter_groups(
    block: nn.Module, parameters: list[nn.Parameter], settings: QuantizeSettings, rate: float
) -> list[ParameterGroup]:
    """``parameters`` of ``block`` by how they are learned: matrices of scales decay, and steps may be slower than the rest."""
    roundings = [module for module in block.modules() if isinstance(module, LearnedRounding)]
    matrices = [parameter for rounding in roundings for parameter in rounding.matrix_parameters()]
    steps = [rounding.log_step for rounding in roundings]
    apart = {id(parameter) for parameter in (*matrices, *steps)}
    groups = [
        ParameterGroup(matrices, rate, settings.decay),
        ParameterGroup(steps, rate * settings.step_rate_share),
        ParameterGroup([parameter for parameter in parameters if id(parameter) not in apart], rate),
    ]
    return [group for group in groups if group.parameters]


def _batches(samples: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """int64 [count, size]: batches of distinct samples (all of them, if they are fewer than ``size``).

    They go through the samples in a new random order each time; what is left over at the end of an order waits for another.
    """
    size = min(size, len(samples))
    per_pass = len(samples) // size
    passes = [
        samples[torch.randperm(len(samples), generator=generator)[: per_pass * size]].view(per_pass, size)
        for _ in range(-(-count // per_pass))
    ]
    return torch.cat(passes)[:count]
