"""RMSNorm by torch's own kernel, one each way: transformers' modules take six passes over the hidden states, and more back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lrq_offline.decoder_blocks import Family

__all__ = ["FusedNorm", "epsilon_of", "fused_norms"]


class FusedNorm(nn.Module):
    """gain * x / sqrt(mean(x^2) + epsilon), with the norm's own parameter; ``gain_offset`` is part of the gain."""

    def __init__(self, norm: nn.Module, gain_offset: float) -> None:
        super().__init__()
        assert isinstance(norm.weight, nn.Parameter)
        self.weight = norm.weight
        self._epsilon = epsilon_of(norm)
        self._offset = gain_offset

    def forward(self, x: Tensor) -> Tensor:
        """float32 x [..., width] to the same."""
        gain = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, gain.shape, gain + self._offset if self._offset else gain, self._epsilon)


@contextmanager
def fused_norms(block: nn.Module, family: Family) -> Iterator[None]:
    """Meanwhile replace the norms of ``block`` that read the residual stream, which is float32; what others read has fewer
    bits, and families differ in where they round that.

    Its own norms add up in another order: what a block puts out when it has been learned has to be what it puts out when a
    stopped run goes on.
    """
    own = {name: block.get_submodule(name) for name, _ in family.residual if name in family.norms}
    for name, norm in own.items():
        block.set_submodule(name, FusedNorm(norm, family.gain_offset))
    try:
        yield
    finally:
        for name, norm in own.items():
            block.set_submodule(name, norm)


def epsilon_of(norm: Any) -> float:
    """What a norm of transformers adds to the mean square, under whichever of two names."""
    epsilon: float = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return epsilon
