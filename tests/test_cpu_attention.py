"""The reference path's attention as vLLM has it on CPUs: near the definition on any machine, and vLLM's own to the bit."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lrq_offline.attention import plain_attention
from lrq_offline.cpu_attention import AMX, AVX2, AVX512, Instructions, cpu_attention
from lrq_offline.served_precision import _instructions, _upper_half, _vllm_truncates

BLOCK = 128  # tokens of a block of vLLM's cache


class Shape(NamedTuple):
    tokens: int
    heads: int
    shared: int  # key-value heads
    width: int
    softcap: float | None = None
    window: int | None = None  # how many tokens a token sees, itself included

    def inputs(self, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """q, k, v [tokens, heads, width], with scores up to about 20."""
        heads = (self.heads, self.shared, self.shared)
        q, k, v = (torch.randn(self.tokens, number, self.width) for number in heads)
        return [x.to(dtype) for x in (q * 4, k, v)]

    def mask(self) -> Tensor | None:
        if self.window is None:
            return None
        seen = torch.ones(self.tokens, self.tokens, dtype=torch.bool).tril()
        return seen.triu(1 - self.window)[None, None]

    def scaling(self) -> float:
        return float(self.width**-0.5)


SHAPES = {
    "half of a tile": Shape(90, 4, 2, 32),
    "grouped heads": Shape(96, 8, 2, 64),
    "tokens of two blocks": Shape(130, 2, 2, 128),
    "uneven scaling": Shape(70, 3, 1, 96),
    "capped": Shape(100, 4, 2, 64, softcap=30.0),
    "windows": Shape(200, 4, 2, 64, window=40),
}
ANY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def by_head(x: Tensor) -> Tensor:
    return x.float().transpose(0, 1)[None]


def ours(shape: Shape, inputs: list[Tensor], instructions: Instructions, exact_sums: bool = False) -> Tensor:
    q, k, v = map(by_head, inputs)
    options: dict[str, Any] = {"instructions": instructions, "exact_sums": exact_sums}
    return cpu_attention(q, k, v, shape.mask(), shape.scaling(), shape.softcap, **options)[0]


@ANY_SHAPE
@pytest.mark.parametrize("instructions", [AMX, AVX512, AVX2], ids=["AMX", "AVX512", "AVX2"])
def test_it_is_attention(shape: Shape, instructions: Instructions) -> None:
    inputs = shape.inputs()
    expected = plain_attention(*(by_head(x).double() for x in inputs), shape.mask(), shape.scaling(), shape.softcap)[0]
    bound = (2e-3 if instructions is AMX else 1e-6) * expected.norm()
    for exact_sums in (False, True):
        assert (ours(shape, inputs, instructions, exact_sums) - expected).norm() <= bound


def test_tiles_round_the_weights_and_nothing_else_as_much() -> None:
    shape = SHAPES["grouped heads"]
    inputs = shape.inputs()
    one, other = (ours(shape, inputs, AMX, exact_sums) for exact_sums in (False, True))
    assert 0 < (one - other).norm() < 1e-4 * one.norm() < (one - ours(shape, inputs, AVX512)).norm()


@pytest.mark.vllm
@pytest.mark.skipif(_instructions(torch.float16, 64) is None, reason="needs an x86 CPU, and no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ANY_SHAPE
def test_it_is_vllm_s_to_the_bit(shape: Shape, dtype: torch.dtype) -> None:
    pytest.importorskip("vllm")
    inputs = shape.inputs(dtype)
    # A machine with AMX has both, and vLLM takes the other one in float16.
    for instructions in {_instructions(dtype, shape.width), _instructions(torch.float16, shape.width)} - {None}:
        if instructions is AVX2 and shape.softcap:
            pytest.skip("the C library's tanh is followed but for its last bit")
        found = ours(shape, inputs, instructions)
        rounded = _upper_half(found) if dtype == torch.bfloat16 and _vllm_truncates() else found
        assert torch.equal(vllm_attention(shape, inputs, "amx" if instructions is AMX else "vec"), rounded.to(dtype))


def vllm_attention(shape: Shape, inputs: list[Tensor], instructions: str) -> Tensor:
    """Of one text, whose keys and values fill blocks 1, 2, ... of a cache."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if instructions == "amx":
        torch.cpu._init_amx()
    q, k, v = inputs
    blocks = -(-shape.tokens // BLOCK)
    cache = torch.zeros(1 + blocks, shape.shared, 2 * BLOCK, shape.width, dtype=q.dtype)
    keys, values = cache.chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(k, v, keys, values, torch.arange(shape.tokens) + BLOCK, instructions)
    starts, lengths = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, shape.tokens], [shape.tokens]))
    table = torch.arange(1, 1 + blocks, dtype=torch.int32)[None]
    window = shape.window or -1
    plan = _custom_ops.cpu_attn_get_scheduler_metadata(
        1, shape.heads, shape.shared, shape.width, lengths, q.dtype, starts, True, window, instructions, True
    )
    output = torch.empty_like(q)
    _custom_ops.cpu_attention_with_kv_cache(
        q, keys, values, output, starts, lengths, shape.scaling(), True, None, window, table, shape.softcap or 0.0, plan, None
    )
    return output
