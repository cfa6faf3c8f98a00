"""A weight that several GPUs learn together: each its own rows, all computing with the whole.

What does not depend on the batch (the scale L U, the fake quantizer, AdamW) is divided by the weights' rows, the block's own
products by the windows. The rows of W_hat travel on a stream of their own while the next layer's are computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from lrq_offline.learned_scales import LearnedRounding, Rounding
from lrq_offline.ranks import Ranks
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["ShardedRounding", "finish_sums", "start_weights"]


class ShardedRounding(Rounding):
    """``own`` learns this process's rows; calling this gives all of W_hat [out, in]."""

    def __init__(self, own: LearnedRounding, ranks: Ranks) -> None:
        super().__init__()
        self.own = own
        self.ranks = ranks
        self._started: Tensor | None = None
        for parameter in own.shared_parameters():
            parameter.register_post_accumulate_grad_hook(self._sum_gradient)

    def start(self) -> None:
        """Begin to compute W_hat; the next call waits for it."""
        own = self.own()
        with _beside(own):
            self._started = self.ranks.all_rows(own)
        if own.is_cuda:
            self._started.record_stream(torch.cuda.current_stream(own.device))

    def forward(self) -> Tensor:
        """W_hat [out, in], with gradients."""
        if self._started is None:
            self.start()
        weight, self._started = self._started, None
        assert weight is not None
        _wait(weight)
        return weight

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """The integers of all rows, the same in every process."""
        q, quantizer = self.own.quantized()
        return self.ranks.all_rows(q), StepAndZeroPoint(*(self.ranks.all_rows(part.contiguous()) for part in quantizer))

    def _sum_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with _beside(parameter.grad):
            self.ranks.sum(parameter.grad)


def start_weights(block: nn.Module) -> None:
    """Begin with every sharded weight of ``block``: backwards their gradients then come last, in the same order everywhere."""
    for rounding in _sharded(block):
        rounding.start()


def finish_sums(block: nn.Module) -> None:
    """Wait until the gradients of what the processes share are summed. A block without sharded weights waits for nothing."""
    for rounding in _sharded(block)[:1]:
        _wait(rounding.own.weight)


def _sharded(block: nn.Module) -> list[ShardedRounding]:
    return [module for module in block.modules() if isinstance(module, ShardedRounding)]


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
