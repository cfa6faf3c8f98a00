"""A weight that several GPUs learn together: each its own rows, all computing with the whole.

What does not depend on the batch (the scale L U, the fake quantizer, AdamW) is divided by the weights' rows, the block's own
products by the windows. What the processes tell each other travels on a stream of its own: the rows of W_hat while the next
layer's are computed, their gradients during the rest of the block's backward pass (which therefore ends at W_hat, a leaf).
U, which every row of W needs, is divided by its own rows between the steps: it is brought together before it is used, and its
gradient travels while the next layer's is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from lrq_offline.learned_correction import LearnedCorrection
from lrq_offline.learned_experts import learned_experts_of
from lrq_offline.learned_scales import LearnedRounding, Rounding
from lrq_offline.ranks import Ranks
from lrq_offline.weight_transfers import transfers_between
from lrq_vllm.checkpoint.affine import StepAndZeroPoint

__all__ = ["ShardedRounding", "finish_backward", "start_weights"]


class ShardedRounding(Rounding):
    """``own`` learns this process's rows; calling this gives all of W_hat [out, in]."""

    def __init__(self, own: LearnedRounding, ranks: Ranks) -> None:
        super().__init__()
        self.own = own
        self.ranks = ranks
        self._transfers = transfers_between(ranks, own.weight.device)
        self._all_rows = self._gatherer(own.weight)
        self._factor_rows = None if (factor := own.factor()) is None else self._gatherer(factor)
        self._own_weight: Tensor | None = None
        self._whole_factor: _OnItsWay | None = None
        self._started: _OnItsWay | None = None
        self._gradient: _OnItsWay | None = None
        self._factor_gradient: _OnItsWay | None = None

    def start_factor(self) -> None:
        """Begin to bring together what :meth:`start` needs whole."""
        factor = self.own.factor()
        if factor is not None:
            assert self._factor_rows is not None
            rows = factor.detach().to(self.own.dtype)
            with _beside(rows):
                self._whole_factor = _OnItsWay(self._factor_rows(rows))

    def start(self) -> None:
        """Begin to compute W_hat; the next call waits for it."""
        if self._whole_factor is not None:
            factor, self._whole_factor = self._whole_factor.arrived(), None
            if torch.is_grad_enabled():
                factor.requires_grad_()
                factor.register_post_accumulate_grad_hook(self._send_factor_gradient)
            self.own.whole_factor = factor
        own = self.own()
        self.own.whole_factor = None
        with _beside(own):
            self._started = _OnItsWay(self._all_rows(own.detach()))
        if own.requires_grad:
            self._own_weight = own
            self._started.tensor.requires_grad_()
            self._started.tensor.register_post_accumulate_grad_hook(self._send_gradient)

    def forward(self) -> Tensor:
        """W_hat [out, in], a leaf: its gradient reaches what is learned in :func:`finish_backward`."""
        if self._started is None:
            self.start_factor()
            self.start()
        assert self._started is not None
        weight, self._started = self._started.arrived(), None
        return weight

    def finish_backward(self) -> None:
        """The rest of the backward pass, from W_hat to the parameters, of which :meth:`take_factor_gradient` completes one."""
        assert self._own_weight is not None and self._gradient is not None, "the block's backward pass comes first"
        self._own_weight.backward(self._gradient.arrived())
        self._own_weight = self._gradient = None

    def take_factor_gradient(self) -> None:
        """Wait for the gradient of this process's rows of the factor."""
        factor = self.own.factor()
        if factor is not None:
            assert self._factor_gradient is not None
            factor.grad = self._factor_gradient.arrived().to(factor.dtype)
            self._factor_gradient = None

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, StepAndZeroPoint]:
        """The integers of all rows, the same in every process."""
        q, quantizer = self.own.quantized()
        return self.ranks.all_rows(q), StepAndZeroPoint(*(self.ranks.all_rows(part.contiguous()) for part in quantizer))

    def _gatherer(self, own: Tensor) -> Callable[[Tensor], Tensor]:
        rows, columns = own.shape
        return self._transfers.gatherer((self.ranks.size * rows, columns), self.own.dtype)

    def _send_gradient(self, weight: Tensor) -> None:
        self._gradient = self._sent_gradient(weight)

    def _send_factor_gradient(self, factor: Tensor) -> None:
        self._factor_gradient = self._sent_gradient(factor)

    def _sent_gradient(self, whole: Tensor) -> "_OnItsWay":
        gradient, whole.grad = whole.grad, None
        assert gradient is not None
        with _beside(gradient):
            return _OnItsWay(self._transfers.own_rows_of_sum(gradient))


def start_weights(block: nn.Module) -> None:
    """Begin with every sharded weight of ``block``."""
    roundings = _sharded(block)
    for rounding in roundings:
        rounding.start_factor()
    for rounding in roundings:
        rounding.start()


def finish_backward(block: nn.Module, ranks: Ranks) -> None:
    """After the backward pass of ``block``: from each sharded weight to its parameters, and wait for the processes' sums."""
    if ranks.size == 1:
        return
    roundings = _sharded(block)
    for rounding in reversed(roundings):
        rounding.finish_backward()
    for rounding in reversed(roundings):
        rounding.take_factor_gradient()
    shared = [parameter.grad for rounding in roundings for parameter in rounding.own.shared_parameters()]
    corrections = [module for module in block.modules() if isinstance(module, LearnedCorrection)]
    for module in (*corrections, *learned_experts_of(block)):
        shared += [parameter.grad for parameter in module.parameters()]
    gradients = [gradient for gradient in shared if gradient is not None]
    if gradients:
        total = ranks.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


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


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
