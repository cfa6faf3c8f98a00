"""vLLM's attention on x86 CPUs, to the bit: its order of sums, its exponential, what it rounds to bfloat16.

Attention is where a server's numbers and another program's part first: both round the same sums, added up in another order,
and one in ten thousand goes the other way. Integer layers magnify that (served_precision.py). Three kinds of CPU differ:

- ``AMX``: bfloat16 values are multiplied in tiles of 32 terms, whose even and odd terms are summed up apart, in float32
  (Intel's Software Developer's Manual, TDPBF16PS). Attention weights are rounded to bfloat16 before they meet v.
- ``AVX512``: terms are added one after the other by fused multiply-adds, and the weights stay in float32.
- ``AVX2``: the same, but products are rounded before they are added, and the exponential is the C library's. So is the tanh of
  capped scores, which is not followed to its last bit.

Equal to the bit where a token's context fits one of vLLM's tiles, whose size depends on the CPU's second-level cache; longer
ones may be rescaled on the way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrq_offline.attention import seen_by, shared_heads

__all__ = ["AMX", "AVX2", "AVX512", "Instructions", "cpu_attention"]

_TERMS = 32  # of a row of an AMX tile
_LANES = 16  # of vLLM's vectors

# exp(r) for |r| <= ln(2) / 2 in vLLM's own exponential: the factors of r^5 down to r^0.
_FACTORS: list[float] = torch.tensor([0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0]).tolist()
_LOG2_E, _LN_2 = 1.44269502162933349609375, 0.693147182464599609375  # as float32 has them
_LN_SMALLEST = -87.3365478515625  # of the smallest normal float32; below, that exponential is 0


@dataclass(frozen=True)
class Instructions:
    """What vLLM computes attention with. products: a [..., m, k] @ b [..., k, n]. lanes: the sum [..., 1] of [..., 16].

    tiles: whether products are of bfloat16 values, so that scores are scaled after them, and weights rounded before.
    """

    products: Callable[[Tensor, Tensor], Tensor]
    exp: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]
    lanes: Callable[[Tensor], Tensor]
    tiles: bool


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None,
    *, instructions: Instructions, exact_sums: bool = False,
) -> Tensor:  # fmt: skip
    """As :func:`~lrq_offline.attention.plain_attention`, of float32 tensors that hold 16-bit values.

    exact_sums: add up the products in float64 instead, to see what the order does.
    """
    cpu = instructions
    products = _exact_products if exact_sums else cpu.products
    k, v = shared_heads(q, k, v)
    scores = products(q, k.transpose(-1, -2)) * scaling if cpu.tiles else products(q * scaling, k.transpose(-1, -2))
    if softcap is not None:
        scores = cpu.tanh(scores * (1 / softcap)) * softcap
    scores = scores.masked_fill(~seen_by(q, mask), float("-inf"))
    weights = cpu.exp(scores - scores.amax(-1, keepdim=True))
    output = products(weights.bfloat16().float() if cpu.tiles else weights, v) * (1 / cpu.lanes(_lanes_of(weights)))
    return output.transpose(1, 2).contiguous()


def _exact_products(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


def _products_on_tiles(a: Tensor, b: Tensor) -> Tensor:
    """Of bfloat16 values, whose products are exact in float32."""
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


def _products_in_turn(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """One term after the other. add: two factors and a sum to the next sum."""

    def products(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), device=a.device)
        for i in range(a.shape[-1]):
            total = add(a[..., i : i + 1], b[..., i : i + 1, :], total)
        return total

    return products


def _vectors_exp(x: Tensor) -> Tensor:
    """2^n of a polynomial of the rest, each step a fused multiply-add."""
    within = x.clamp(min=_LN_SMALLEST)
    n = _fused(within, _LOG2_E, 0.5).floor()
    rest = _fused(n, -_LN_2, within)
    result = torch.full_like(rest, _FACTORS[0])
    for factor in _FACTORS[1:]:
        result = _fused(rest, result, factor)
    return torch.where(x < _LN_SMALLEST, 0, torch.ldexp(result, n.int()))


def _vectors_tanh(x: Tensor) -> Tensor:
    grown = _vectors_exp(x)
    return (grown - 1 / grown) / (grown + 1 / grown)


def _library_exp(x: Tensor) -> Tensor:
    return x.double().exp().float()


def _library_tanh(x: Tensor) -> Tensor:
    return x.double().tanh().float()


def _fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32 values, rounded once: float64 has their product whole."""
    return torch.addcmul(_double(c), a.double(), _double(b)).float()


def _apart(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, the product rounded first."""
    return a * b + c


def _double(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _lanes_of(x: Tensor) -> Tensor:
    """[..., n] to [..., 16]: the sums of every 16th term."""
    lanes = pad(x, (0, -x.shape[-1] % _LANES)).unflatten(-1, (-1, _LANES))
    return _in_turn(lanes.transpose(-1, -2)).squeeze(-1)


def _in_turn(x: Tensor) -> Tensor:
    """The sum [..., 1] of [..., n], one after the other."""
    total = x[..., :1]
    for i in range(1, x.shape[-1]):
        total = total + x[..., i : i + 1]
    return total


def _by_halves(lanes: Tensor) -> Tensor:
    while lanes.shape[-1] > 1:
        first, second = lanes.chunk(2, dim=-1)
        lanes = first + second
    return lanes


def _by_registers(lanes: Tensor) -> Tensor:
    """Two registers of 8 lanes, each in turn."""
    first, second = lanes.chunk(2, dim=-1)
    return _in_turn(first) + _in_turn(second)


AMX = Instructions(_products_on_tiles, _vectors_exp, _vectors_tanh, _by_halves, tiles=True)
AVX512 = Instructions(_products_in_turn(_fused), _vectors_exp, _vectors_tanh, _by_halves, tiles=False)
AVX2 = Instructions(_products_in_turn(_apart), _library_exp, _library_tanh, _by_registers, tiles=False)
