"""The Fisher information of every block's output: one pass through the float model's blocks, and one back from its predictions.

In memory at any time: one block, or the output head; cached hidden states of all blocks, of some of the windows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.block_learning import run_block
from lrq_offline.compute import block_output, products_in
from lrq_offline.decoder_blocks import HEAD, Family, load_block
from lrq_offline.gptq import HessianSum
from lrq_offline.hidden_states import HiddenStates, HiddenStatesStore
from lrq_offline.ranks import Ranks

__all__ = ["OutputGradients", "drawn_tokens", "some_windows"]

_WINDOWS = 32  # of all processes, that are passed through if there are so many
_WINDOWS_AT_ONCE = 2


def some_windows(samples: int, ranks: int) -> Tensor:
    """int64: which of ``samples`` windows of each of ``ranks`` processes are passed through, spread evenly."""
    count = min(max(_WINDOWS // ranks, 1), samples)
    return torch.arange(count) * samples // count


@dataclass(frozen=True)
class OutputGradients:
    """What one process needs for its share of the moments.

    model: an empty model whose embedding and rotary tables are real. load: the float block of an index, from 0. read: a tensor
    of the float model. store: where hidden states go. dtype: of matrix products.
    """

    model: nn.Module
    family: Family
    load: Callable[[int], nn.Module]
    read: Callable[[str], Tensor]
    store: HiddenStatesStore
    dtype: torch.dtype
    ranks: Ranks

    def moments(
        self,
        windows: Tensor,
        hidden: Tensor,
        arguments: Sequence[dict[str, Any]],
        seeds: Sequence[int],
        into: HiddenStates,
    ) -> None:
        """Write 2 E[g g^T] of each block's output ``into`` [blocks, width, width], over all processes' tokens.

        windows: token ids int64 [samples, seq_len]; hidden [samples, seq_len, width]: what the first block receives for them;
        arguments: of each block's call. g is the gradient of the log-probability of a next token, which is drawn from the
        model's own predictions, with a seed for each window.
        """
        states = [self.store.like(tuple(hidden.shape), hidden.dtype) for _ in range(len(arguments) + 1)]
        states[0].put(slice(None), hidden)
        for index, of_block in enumerate(arguments):
            run_block(self.load(index), states[index], states[index + 1], of_block, _WINDOWS_AT_ONCE, self.dtype)
        gradients = self.store.like(tuple(hidden.shape), torch.float32)
        self._begin(windows, states[-1], gradients, seeds)
        for index in reversed(range(len(arguments))):
            total = HessianSum()
            for rows in gradients.slices(_WINDOWS_AT_ONCE):
                total(gradients.get(rows).flatten(0, 1))
            into.put(slice(index, index + 1), total.value(self.ranks).unsqueeze(0))
            if index > 0:
                self._pass_back(self.load(index), states[index], gradients, arguments[index])

    def _begin(self, windows: Tensor, last: HiddenStates, gradients: HiddenStates, seeds: Sequence[int]) -> None:
        """Write the gradients with respect to the last block's output."""
        with self._tail(last.device) as predict:
            for row, (window, seed) in enumerate(zip(windows, seeds, strict=True)):
                rows = slice(row, row + 1)
                hidden = last.get(rows).float().requires_grad_()
                with products_in(self.dtype, last.device):
                    logits = predict(window.unsqueeze(0), hidden)
                scores = logits.detach().float()
                drawn, gradient = drawn_tokens(scores, seed), scores.softmax(dim=-1)
                gradient.scatter_(-1, drawn, gradient.gather(-1, drawn) - 1)
                gradients.put(rows, torch.autograd.grad(logits, hidden, gradient.to(logits.dtype))[0])

    @contextmanager
    def _tail(self, device: torch.device) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
        """What maps token ids [1, seq_len] and the last block's output to logits: the model from its final norm on."""
        kept = {name: self.model.get_submodule(name) for name in (self.family.blocks, self.family.final_norm, HEAD)}
        given = _Given()
        own = None if self.dtype == torch.bfloat16 else torch.float32
        try:
            for name in (self.family.final_norm, HEAD):
                self.model.set_submodule(name, load_block(self.model, name, self.read, own, device))
            self.model.set_submodule(self.family.blocks, nn.ModuleList([given]))

            def predict(window: Tensor, hidden: Tensor) -> Tensor:
                given.hidden = hidden
                logits: Tensor = self.model(input_ids=window, use_cache=False).logits
                return logits

            yield predict
        finally:
            for name, module in kept.items():
                self.model.set_submodule(name, module)

    def _pass_back(self, block: nn.Module, inputs: HiddenStates, gradients: HiddenStates, arguments: dict[str, Any]) -> None:
        """Put the gradients with respect to the block's inputs in the place of those with respect to its outputs."""
        for rows in inputs.slices(_WINDOWS_AT_ONCE):
            x = inputs.get(rows).float().requires_grad_()
            output = block_output(block, x, arguments, self.dtype)
            gradients.put(rows, torch.autograd.grad(output, x, gradients.get(rows).to(output.dtype))[0])


def drawn_tokens(logits: Tensor, seed: int) -> Tensor:
    """int64 [..., 1]: for each of ``logits`` [..., vocabulary] a token, drawn from their softmax."""
    generator = torch.Generator(logits.device).manual_seed(seed)
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_(1e-20, 1 - 1e-7)
    return (logits - (-uniform.log()).log()).argmax(dim=-1, keepdim=True)  # the largest sum of a logit and Gumbel noise


class _Given(nn.Module):
    """Stands for all blocks: puts out what it was given."""

    hidden: Tensor

    def forward(self, *arguments: Any, **others: Any) -> Tensor:
        return self.hidden
