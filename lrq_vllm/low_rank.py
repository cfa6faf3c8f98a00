"""Who adds the low-rank correction U (V^T x) to a layer's output. The arithmetic is that of reference.add_low_rank."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lrq_vllm import exact_ops
from lrq_vllm.arranged_layer import keep_factors
from lrq_vllm.kernel_choice import HOPPER, REFERENCE
from lrq_vllm.kernels import low_rank
from lrq_vllm.low_rank_factors import factors_of, put_factors

__all__ = ["LowRank", "Pair", "choose_low_rank"]

Pair = tuple[Tensor, Tensor]
"""U [out, k] and V [in, k] of one of the modules that are fused into a layer."""


class LowRank(Protocol):
    """Prepares the pairs of a layer, and adds what they give."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Put U and V on the layer, as parameters in ``dtype``, that of activations."""

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """y [tokens, out] + U (V^T x) for x [tokens, in]. y may be overwritten."""


def choose_low_rank(device: torch.device, kernel: str) -> LowRank:
    """By device and by what multiplies, ``kernel``."""
    if kernel == REFERENCE:
        return Exact()
    if kernel == HOPPER:
        return InProduct()
    return InPlace() if device.type == "cuda" else Composed()


class InProduct:
    """A Hopper GPU: what multiplies adds the correction too."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Lay the factors out, and compile what they may need."""
        keep_factors(layer, pairs, dtype)

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """y, which has it already."""
        return y


class InPlace:
    """Another GPU, as one opaque op: y is read and written once more, and no sum of both products is ever stored apart."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Lay the factors out."""
        put_factors(layer, low_rank.arrange(pairs, dtype))

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """Two products in 16 bits with float32 sums."""
        from lrq_vllm.kernels import ops

        factors, widths, ranks = factors_of(layer)
        ops.add_low_rank_(y, x, *factors, widths, ranks, False)
        return y


class Composed:
    """A CPU: the reference itself, with float32 factors, which take twice the memory."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """The factors are rounded to 16 bits, and then kept in float32."""
        _keep(layer, [(u.to(dtype).float(), v.to(dtype).float()) for u, v in pairs])

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """torch's own products, as one opaque op."""
        from lrq_vllm.kernels import ops

        return ops.add_low_rank(y, x, *_kept(layer))


class Exact:
    """Any device, where the reference multiplies: kernels/exact.py."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """The factors are rounded to 16 bits."""
        _keep(layer, [(u.to(dtype), v.to(dtype)) for u, v in pairs])

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """Sums in float64."""
        return exact_ops.add_low_rank(y, x, *_kept(layer))


def _keep(layer: Any, pairs: Sequence[Pair]) -> None:
    """Put every factor on the layer, as a parameter."""
    for part, (u, v) in enumerate(pairs):
        setattr(layer, f"lrq_low_rank_u{part}", Parameter(u.contiguous(), requires_grad=False))
        setattr(layer, f"lrq_low_rank_v{part}", Parameter(v.contiguous(), requires_grad=False))
    layer.lrq_low_rank_parts = len(pairs)


def _kept(layer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Every U, and every V."""
    parts = range(layer.lrq_low_rank_parts)
    u, v = ([getattr(layer, f"lrq_low_rank_{letter}{part}") for part in parts] for letter in "uv")
    return u, v
