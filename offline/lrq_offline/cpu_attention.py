"""vLLM's attention on x86 CPUs with AVX-512, to the bit: its order of sums, its exponential, what it rounds to bfloat16.

Attention is where a server's numbers and another program's part first: both round the same sums, added up in another order,
and one in ten thousand goes the other way. Integer layers magnify that (served_precision.py). Two kinds of CPU differ:

- With AMX (``tiles``) vLLM multiplies bfloat16 values in tiles of 32 terms, whose even and odd terms are summed up apart,
  in float32; attention weights are rounded to bfloat16 before they meet v.
- Without, terms are added one after the other by fused multiply-adds, and the weights stay in float32.

Equal to the bit where a token's context fits one of vLLM's tiles, whose size depends on the CPU's second-level cache; longer
ones may be rescaled on the way. What a tile adds up first: Intel's Software Developer's Manual, TDPBF16PS.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_offline.attention import seen_by, shared_heads

__all__ = ["cpu_attention"]

_TERMS = 32  # of a row of an AMX tile
_LANES = 16  # of a vector register

# exp(r) for |r| <= ln(2) / 2 in vLLM's exponential: the factors of r^5 down to r^0.
_FACTORS: list[float] = torch.tensor([0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0]).tolist()
_LOG2_E, _LN_2 = 1.44269502162933349609375, 0.693147182464599609375  # as float32 has them
_LN_SMALLEST = -87.3365478515625  # of the smallest normal float32; below, vLLM's exponential is 0


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None,
    *, tiles: bool, exact_sums: bool = False,
) -> Tensor:  # fmt: skip
    """As :func:`~lrq_offline.attention.plain_attention`, of float32 tensors that hold 16-bit values.

    tiles: vLLM multiplies by AMX. exact_sums: add up the products in float64 instead, to see what the order does.
    """
    products: Callable[[Tensor, Tensor], Tensor] = (
        _exact_products if exact_sums else _tile_products if tiles else _products_in_order
    )
    k, v = shared_heads(q, k, v)
    scores = products(q, k.transpose(-1, -2)) * scaling if tiles else products(q * scaling, k.transpose(-1, -2))
    if softcap is not None:
        grown = _exp(scores * (1 / softcap))
        scores = (grown - 1 / grown) / (grown + 1 / grown) * softcap
    scores = scores.masked_fill(~seen_by(q, mask), float("-inf"))
    weights = _exp(scores - scores.amax(-1, keepdim=True))
    output = products(weights.bfloat16().float() if tiles else weights, v) * (1 / _sum_by_lanes(weights))
    return output.transpose(1, 2).contiguous()


def _exact_products(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


def _products_in_order(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] @ b [..., k, n], each term by a fused multiply-add: products of a 16-bit value are exact in float64."""
    total = torch.zeros((), device=a.device)
    for i in range(a.shape[-1]):
        total = torch.addcmul(total.double(), a[..., i : i + 1].double(), b[..., i : i + 1, :].double()).float()
    return total


def _tile_products(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] @ b [..., k, n] of bfloat16 values, whose products are exact in float32."""
    rest = -a.shape[-1] % _TERMS
    a, b = pad(a, (0, rest)), pad(b, (0, 0, 0, rest))
    total = torch.zeros((), device=a.device)
    for start in range(0, a.shape[-1], _TERMS):
        even = odd = torch.zeros((), device=a.device)
        for i in range(start, start + _TERMS, 2):
            even = even + a[..., i : i + 1] * b[..., i : i + 1, :]
            odd = odd + a[..., i + 1 : i + 2] * b[..., i + 1 : i + 2, :]
        total = total + (even + odd)
    return total


def _exp(x: Tensor) -> Tensor:
    """As vLLM's vectors have it: 2^n of a polynomial of the rest, each step a fused multiply-add in float32."""
    within = x.clamp(min=_LN_SMALLEST)
    n = _fused(within, _LOG2_E, 0.5).floor()
    rest = _fused(n, -_LN_2, within)
    result = torch.full_like(rest, _FACTORS[0])
    for factor in _FACTORS[1:]:
        result = _fused(rest, result, factor)
    return torch.where(x < _LN_SMALLEST, 0, torch.ldexp(result, n.int()))


def _fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 values, rounded once: float64 has their product whole."""
    return torch.addcmul(_double(c), a.double(), _double(b)).float()


def _double(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _sum_by_lanes(x: Tensor) -> Tensor:
    """[..., n] to [..., 1]: the sums of every 16th term, which are then added up by halves."""
    lanes = pad(x, (0, -x.shape[-1] % _LANES)).unflatten(-1, (-1, _LANES))
    total = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    while total.shape[-1] > 1:
        total = sum(total.chunk(2, dim=-1))
    return total
