"""A weight that several GPUs learn together: each its own rows, all computing with the whole.

What does not depend on the batch (the scale L U, the fake quantizer, AdamW) is divided by the weights' rows, the block's own
products by the windows. What the processes tell each other travels on a stream of its own: the rows of W_hat while the next
layer's are computed, their gradients during the rest of the block's backward pass (which therefore ends at W_hat, a leaf),
and the gradients of U while those of the next layer's are computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from lrq_offline.learned_scales import LearnedRounding, Rounding
from lrq_offline.ranks import Ranks
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["ShardedRounding", "finish_backward", "start_weights"]


class ShardedRounding(Rounding):
    """``own`` learns this process's rows; calling this gives all of W_hat [out, in]."""

    def __init__(self, own: LearnedRounding, ranks: Ranks) -> None:
        super().__init__()
        self.own = own
        self.ranks = ranks
        self._own_weight: Tensor | None = None
        self._started: _OnItsWay | None = None
        self._gradient: _OnItsWay | None = None
        for parameter in own.shared_parameters():
            parameter.register_post_accumulate_grad_hook(self._sum_gradient)

    def start(self) -> None:
        """Begin to compute W_hat; the next call waits for it."""
        own = self.own()
        with _beside(own):
            self._started = _OnItsWay(self.ranks.all_rows(own.detach()))
        if own.requires_grad:
            self._own_weight = own
            self._started.tensor.requires_grad_()
            self._started.tensor.register_post_accumulate_grad_hook(self._send_gradient)

    def forward(self) -> Tensor:
        """W_hat [out, in], a leaf: its gradient reaches what is learned in :func:`finish_backward`."""
        if self._started is None:
            self.start()
        assert self._started is not None
        weight, self._started = self._started.arrived(), None
        return weight

    def finish_backward(self) -> None:
        """The rest of the backward pass, from W_hat to the parameters."""
        assert self._own_weight is not None and self._gradient is not None, "the block's backward pass comes first"
        self._own_weight.backward(self._gradient.arrived())
        self._own_weight = self._gradient = None

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """The integers of all rows, the same in every process."""
        q, quantizer = self.own.quantized()
        return self.ranks.all_rows(q), StepAndZeroPoint(*(self.ranks.all_rows(part.contiguous()) for part in quantizer))

    def _send_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None
        with _beside(weight.grad):
            self._gradient = _OnItsWay(self.ranks.own_rows_of_sum(weight.grad))
        weight.grad = None

    def _sum_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with _beside(parameter.grad):
            self.ranks.sum(parameter.grad)


def start_weights(block: nn.Module) -> None:
    """Begin with every sharded weight of ``block``."""
    for rounding in _sharded(block):
        rounding.start()


def finish_backward(block: nn.Module) -> None:
    """After the backward pass of ``block``: from each sharded weight to its parameters, and wait for the processes' sums."""
    roundings = _sharded(block)
    for rounding in reversed(roundings):
        rounding.finish_backward()
    for rounding in roundings[:1]:
        _wait(rounding.own.weight)


def _sharded(block: nn.Module) -> list[ShardedRounding]:
    return [module for module in block.modules() if isinstance(module, ShardedRounding)]


class _OnItsWay:
    """A tensor that the second stream is computing (on a CPU: one that is there)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._event = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def arrived(self) -> Tensor:
        """The tensor, for the current stream, which waits for it and for nothing that began later."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self._event)
            self.tensor.record_stream(stream)
        return self.tensor


@contextmanager
def _beside(tensor: Tensor) -> Iterator[None]:
    """On a GPU, what is done here runs on a second stream, after what has made ``tensor``."""
    if not tensor.is_cuda:
        yield
        return
    stream = _second_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).wait_stream(_second_stream(tensor.device))


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
