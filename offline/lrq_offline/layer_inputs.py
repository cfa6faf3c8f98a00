"""Look at what linear layers receive while a block runs over the calibration windows."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.compute import block_output
from lrq_offline.hidden_states import HiddenStates
from lrq_offline.ranks import ONE_RANK, Ranks

__all__ = ["InputSample", "sample_inputs", "watch_inputs"]


@torch.no_grad()
def watch_inputs(
    block: nn.Module,
    hidden: HiddenStates,
    arguments: dict[str, Any],
    observers: Mapping[str, Callable[[Tensor], None]],
    batches: Iterable[slice | Tensor],
    dtype: torch.dtype,
) -> None:
    """Run ``block`` over these batches of ``hidden`` and give each observer its layer's inputs, float32 [tokens, in]."""

    def hook(observe: Callable[[Tensor], None]) -> Callable[..., None]:
        def called(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.autocast(hidden.device.type, enabled=False):
                observe(inputs[0].detach().float().flatten(0, -2))

        return called

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook(observe)) for name, observe in observers.items()]
    try:
        for rows in batches:
            block_output(block, hidden.get(rows), arguments, dtype)
    finally:
        for handle in hooks:
            handle.remove()


class InputSample:
    """Of one layer's input over all windows: the extremes of every channel, and an even share of random tokens.

    low, high: [in] (widened to hold 0). tokens: [about ``wanted``, in], of the ``seen`` ones. NaN and infinite values count as
    0; ``finite`` says whether there were none. A call may come without tokens, and an expert that none reaches is not called.
    """

    def __init__(self, calls: int, wanted: int, generator: torch.Generator) -> None:
        self._share = -(-wanted // calls)
        self._generator = generator
        self._tokens: list[Tensor] = []
        self._low = self._high = torch.zeros(())
        self.finite = True
        self.seen = 0

    def __call__(self, x: Tensor) -> None:
        self.finite = self.finite and bool(torch.isfinite(x).all())
        self.seen += len(x)
        x = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        low, high = x.aminmax(dim=0) if len(x) else x.new_zeros((2, x.shape[1]))
        self._low, self._high = torch.minimum(self._low.to(x.device), low), torch.maximum(self._high.to(x.device), high)
        chosen = torch.randint(max(len(x), 1), (min(self._share, len(x)),), generator=self._generator)
        self._tokens.append(x[chosen.to(x.device)])

    def share(self, ranks: Ranks) -> None:
        """Make this the sample of all ranks' inputs, the same in each."""
        self._low, self._high = ranks.smallest(self._low), -ranks.smallest(-self._high)
        self._tokens = [ranks.joined(self.tokens)]
        damaged, self.seen = ranks.sum(torch.tensor([not self.finite, self.seen], device=self._low.device)).tolist()
        self.finite = damaged == 0

    @classmethod
    def of_any(cls, samples: Iterable["InputSample"]) -> "InputSample":
        """What several layers with as many inputs receive, as if they were one."""
        given = [sample for sample in samples if sample.seen]
        joined = copy.copy(given[0])
        joined._tokens = [sample.tokens for sample in given]
        joined._low = torch.stack([sample.low for sample in given]).amin(dim=0)
        joined._high = torch.stack([sample.high for sample in given]).amax(dim=0)
        joined.seen, joined.finite = sum(sample.seen for sample in given), all(sample.finite for sample in given)
        return joined

    def divide(self, scale: Tensor) -> None:
        """Make this the sample of inputs divided by ``scale`` [in], channel by channel."""
        self._low, self._high = self._low / scale, self._high / scale
        self._tokens = [tokens / scale for tokens in self._tokens]

    @property
    def low(self) -> Tensor:
        """Each channel's smallest value, and 0 [in]."""
        return self._low.clamp(max=0)

    @property
    def high(self) -> Tensor:
        """Each channel's largest value, and 0 [in]."""
        return self._high.clamp(min=0)

    @property
    def tokens(self) -> Tensor:
        """Those that were kept [tokens, in]; [0] of a layer that was never called."""
        self._tokens = [torch.cat(self._tokens) if self._tokens else torch.empty(0)]
        return self._tokens[0]


def sample_inputs(
    block: nn.Module,
    hidden: HiddenStates,
    arguments: dict[str, Any],
    names: list[str],
    wanted: int,
    generator: torch.Generator,
    batch_size: int,
    dtype: torch.dtype,
    ranks: Ranks = ONE_RANK,
) -> dict[str, InputSample]:
    """Layer name -> a sample of its inputs over the windows of all ranks, for the layers in ``names``."""
    calls = -(-len(hidden) // batch_size) * ranks.size
    # How much is drawn depends on how many tokens reach an expert.
    own = ranks.own_generator(generator)
    samples = {name: InputSample(calls, wanted, own) for name in names}
    watch_inputs(block, hidden, arguments, samples, hidden.slices(batch_size), dtype)
    for sample in samples.values():
        sample.share(ranks)
    return samples
