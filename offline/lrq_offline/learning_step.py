"""One step of learning a block: forward, backward, AdamW; on a GPU replayed as one CUDA graph, with no host in the loop,
unless experts ask it how many tokens they have."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrq_offline.compute import block_output
from lrq_offline.experts import experts_of
from lrq_offline.hidden_states import BatchFeeder
from lrq_offline.learned_experts import learned_experts_of
from lrq_offline.output_metric import PLAIN, OutputMetric
from lrq_offline.ranks import ONE_RANK, Ranks
from lrq_offline.sharded_rounding import finish_backward, start_weights

__all__ = ["LearningStep", "ParameterGroup", "block_loss"]

_WARM_UP_STEPS = 3


def block_loss(
    block: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    metric: OutputMetric = PLAIN,
) -> Tensor:
    """Mean squared difference of the block's output from ``targets``, both [batch, seq_len, width]; float32 scalar."""
    return metric.mean_square(block_output(block, inputs, arguments, dtype), targets)


class ParameterGroup(NamedTuple):
    """Parameters that have one learning rate, here the first step's, and one weight decay."""

    parameters: Sequence[nn.Parameter]
    rate: float
    decay: float = 0.0


class LearningStep:
    """AdamW on the parameters of ``block`` that are in ``groups``, for the loss over the batches of all ``ranks``.

    Learning rates are decayed to 0 by a half-cosine over ``steps``. ``scale`` divides the loss: it keeps Adam's epsilon small
    beside the gradients and changes no direction. ``metric`` measures differences of the output.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[ParameterGroup],
        feeder: BatchFeeder,
        arguments: dict[str, Any],
        *,
        steps: int,
        scale: float,
        dtype: torch.dtype,
        ranks: Ranks = ONE_RANK,
        metric: OutputMetric = PLAIN,
    ) -> None:
        device = feeder.inputs.device
        self._block, self._feeder, self._arguments = block, feeder, arguments
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._ranks, self._metric = ranks, metric
        # Gradients are summed over the ranks, and the loss is a mean.
        self._scale, self._dtype = scale * ranks.size, dtype
        half_cosine = [0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
        schedule = [[group.rate * share for group in groups] for share in half_cosine]
        self._schedule = torch.tensor(schedule, dtype=torch.float32, device=device)
        self._rates = self._schedule[0].clone()
        options = [
            {"params": group.parameters, "lr": rate, "weight_decay": group.decay}
            for group, rate in zip(groups, self._rates.unbind(), strict=True)
        ]
        self._optimizer = torch.optim.AdamW(options, fused=True, capturable=device.type == "cuda")
        self.losses = torch.zeros(steps, dtype=torch.float32, device=device)
        self._loss = torch.zeros((), device=device)
        self._graph = self._captured() if device.type == "cuda" and not _asks_host(block) else None

    def run(self, step: int) -> None:
        """Take one step. Its loss (this rank's part, relative to ``scale``) lands in ``losses[step]``, on the device."""
        self._feeder.feed(step)
        self._rates.copy_(self._schedule[step])
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self.losses[step].copy_(self._loss)

    def forget(self, parameters: list[nn.Parameter]) -> None:
        """Let AdamW treat these parameters as new: their moments and step counts become 0."""
        for parameter in parameters:
            for state in self._optimizer.state[parameter].values():
                state.zero_()

    def wait(self) -> None:
        """Return when the steps so far have been computed."""
        if self.losses.is_cuda:
            torch.cuda.synchronize()

    def _step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        start_weights(self._block)
        batch = self._feeder.inputs, self._feeder.targets
        loss = block_loss(self._block, *batch, self._arguments, self._dtype, self._metric) / self._scale
        loss.backward()
        finish_backward(self._block, self._ranks)
        self._optimizer.step()
        self._loss.copy_(loss.detach())

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph. The steps taken to warm up are undone: parameters put back, Adam's state emptied."""
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._feeder.feed(0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # With several ranks another thread, of torch.distributed, asks for events meanwhile: that must not end the capture.
        with torch.cuda.graph(graph, capture_error_mode="global" if self._ranks.size == 1 else "thread_local"):
            self._step()
        with torch.no_grad():
            for parameter, value in zip(self._parameters, before, strict=True):
                parameter.copy_(value)
        self.forget(self._parameters)
        return graph


def _asks_host(block: nn.Module) -> bool:
    """Whether the host has to know how many tokens an expert gets."""
    return bool(experts_of(block)) or any(experts.asks_host for experts in learned_experts_of(block))
