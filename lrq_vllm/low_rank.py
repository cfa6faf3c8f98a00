"""Who adds the low-rank correction U (V^T x) to a layer's output. The arithmetic is that of reference.add_low_rank."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

__all__ = ["LowRank", "Pair", "choose_low_rank"]

_RANK_UNIT = 16

Pair = tuple[Tensor, Tensor]
"""U [out, k] and V [in, k] of one of the modules that are fused into a layer."""


class LowRank(Protocol):
    """Prepares the pairs of a layer, and adds what they give."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Put U and V on the layer, as parameters in ``dtype``, that of activations."""

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """y [tokens, out] + U (V^T x) for x [tokens, in]. y may be overwritten."""


def choose_low_rank(device: torch.device) -> LowRank:
    """By device: cuBLAS adds where y stands already; on a CPU torch.compile fuses what it can."""
    return InPlace() if device.type == "cuda" else Composed()


class _Factors:
    """V of all parts side by side, as one product reads x once; U of each."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Fill ranks up with zeros to what tensor cores take at a time: products of other sizes are several times slower."""
        ranks = [-(-u.shape[1] // _RANK_UNIT) * _RANK_UNIT for u, _ in pairs]

        def wide(factor: Tensor, rank: int) -> Tensor:
            return pad(factor, (0, rank - factor.shape[1])).to(dtype)

        layer.lrq_ranks = ranks
        v = torch.cat([wide(v, rank) for (_, v), rank in zip(pairs, ranks, strict=True)], dim=1)
        layer.lrq_low_rank_v = Parameter(v, requires_grad=False)
        for part, ((u, _), rank) in enumerate(zip(pairs, ranks, strict=True)):
            # Transposed, [k, out]: a product of few tokens reads it row by row.
            setattr(layer, f"lrq_low_rank_u{part}", Parameter(wide(u, rank).t().contiguous(), requires_grad=False))

    def _u(self, layer: Any) -> list[Tensor]:
        return [getattr(layer, f"lrq_low_rank_u{part}") for part in range(len(layer.lrq_ranks))]


class InPlace(_Factors):
    """A GPU, as one opaque op: y is read and written once more, and no sum of both products is ever stored apart."""

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """Two products in 16 bits with float32 sums."""
        from lrq_vllm.kernels import ops

        ops.add_low_rank_(y, x, layer.lrq_low_rank_v, self._u(layer))
        return y


class Composed(_Factors):
    """A CPU: torch's own products."""

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """V^T x is rounded to x's dtype, and so is what is added."""
        shrunk = (x @ layer.lrq_low_rank_v).split(layer.lrq_ranks, dim=1)
        added = torch.cat([part @ u for part, u in zip(shrunk, self._u(layer), strict=True)], dim=1)
        return (y.float() + added.float()).to(y.dtype)
