"""Static activation ranges: one step and zero-point for the input of each group of linear layers (W8A8)."""

from typing import Any

import torch
from torch import Tensor, nn

from lrq_offline.decoder_blocks import Family
from lrq_vllm.checkpoint.affine import StepAndZeroPoint, dequantize, quantize, step_and_zero_point

__all__ = ["calibrate_static_ranges"]

_BITS = 8
_KEPT_VALUES = 1 << 20
_RATIOS = [1.0 - 0.02 * i for i in range(41)]


@torch.no_grad()
def calibrate_static_ranges(
    block: nn.Module, hidden: Tensor, arguments: dict[str, Any], family: Family, generator: torch.Generator
) -> dict[str, StepAndZeroPoint]:
    """Linear name -> step and zero-point (one element each) of its input, over all calibration windows.

    ``block`` is the float block, ``hidden`` the quantized model's input to it, [samples, seq_len, width]. Linears of one
    group read the same input and get the same values. The min-max range is shrunk to the ratio with the least squared
    error on a random sample of at most 2^20 values of that input.
    """
    watched = {name: _RangeWatcher(len(hidden), generator) for name in (group[0] for group in family.linear_groups)}
    hooks = [block.get_submodule(name).register_forward_pre_hook(watcher) for name, watcher in watched.items()]
    try:
        for window in hidden.split(1):
            block(window.float(), **arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: watched[group[0]].best() for group in family.linear_groups for name in group}


class _RangeWatcher:
    """A forward pre-hook that keeps the extremes and an even share of random values of a layer's input."""

    def __init__(self, calls: int, generator: torch.Generator) -> None:
        self._share = max(_KEPT_VALUES // calls, 1)
        self._generator = generator
        self._low, self._high = torch.zeros(()), torch.zeros(())
        self._values: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float().flatten().cpu()
        self._low, self._high = torch.minimum(self._low, values.min()), torch.maximum(self._high, values.max())
        chosen = torch.randint(values.numel(), (min(self._share, values.numel()),), generator=self._generator)
        self._values.append(values[chosen])

    def best(self) -> StepAndZeroPoint:
        """The quantizer with the least squared error among ranges shrunk by 1.00, 0.98 .. 0.20, low and high alike."""
        values = torch.cat(self._values)

        def error(quantizer: StepAndZeroPoint) -> float:
            return (dequantize(quantize(values, *quantizer, _BITS), *quantizer) - values).square().mean().item()

        candidates = [_quantizer(self._low * ratio, self._high * ratio) for ratio in _RATIOS]
        return min(candidates, key=error)


def _quantizer(low: Tensor, high: Tensor) -> StepAndZeroPoint:
    return step_and_zero_point(low.reshape(1), high.reshape(1), _BITS)
