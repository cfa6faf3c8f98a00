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


class InPlace:
    """A GPU, as one opaque op: y is read and written once more, and no sum of both products is ever stored apart."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """Fill ranks up with zeros to what tensor cores take at a time: products of other sizes are several times slower."""
        ranks = [-(-u.shape[1] // _RANK_UNIT) * _RANK_UNIT for u, _ in pairs]

        def wide(factor: Tensor, rank: int) -> Tensor:
            return pad(factor, (0, rank - factor.shape[1])).to(dtype)

        _keep(layer, [(wide(u, rank), wide(v, rank)) for (u, v), rank in zip(pairs, ranks, strict=True)])

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """Two products in 16 bits with float32 sums."""
        from lrq_vllm.kernels import ops

        ops.add_low_rank_(y, x, layer.lrq_low_rank_v, _u_of(layer))
        return y


class Composed:
    """A CPU: rounded exactly where the reference rounds, which takes float32 factors, twice the memory."""

    def prepare(self, layer: Any, pairs: Sequence[Pair], dtype: torch.dtype) -> None:
        """The factors are rounded to 16 bits, and then kept in float32."""
        _keep(layer, [(u.to(dtype).float(), v.to(dtype).float()) for u, v in pairs])

    def add(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """torch's own products."""
        shrunk = (x.float() @ layer.lrq_low_rank_v).to(x.dtype).float().split(layer.lrq_ranks, dim=1)
        added = torch.cat([part @ u for part, u in zip(shrunk, _u_of(layer), strict=True)], dim=1)
        return (y.float() + added).to(y.dtype)


def _keep(layer: Any, pairs: Sequence[Pair]) -> None:
    """On the layer: V of all parts side by side, as one product reads x once; U^T [k, out] of each, read row by row."""
    layer.lrq_ranks = [u.shape[1] for u, _ in pairs]
    layer.lrq_low_rank_v = Parameter(torch.cat([v for _, v in pairs], dim=1), requires_grad=False)
    for part, (u, _) in enumerate(pairs):
        setattr(layer, f"lrq_low_rank_u{part}", Parameter(u.t().contiguous(), requires_grad=False))


def _u_of(layer: Any) -> list[Tensor]:
    return [getattr(layer, f"lrq_low_rank_u{part}") for part in range(len(layer.lrq_ranks))]
