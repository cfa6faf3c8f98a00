"""y = x W^T with an arranged weight, on a Hopper GPU: by the kernel that hopper_table.py knows to be the fastest.

Twins: reference.quantize_input with reference.integer_linear; reference.weight_only_linear.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from lrq_vllm.kernels import cuda_kernel, low_rank, quantize_tokens, stream_linear, tile_linear
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, WeightShape, group_unit
from lrq_vllm.kernels.hopper_table import APART, STREAM, Tile, choices, chosen, correcting, correcting_choices
from lrq_vllm.kernels.low_rank import Factors, Parts
from lrq_vllm.kernels.quantize_tokens import IntegerTokens
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind
from lrq_vllm.kernels.stream_linear import Input

__all__ = ["adding_tile", "arranged_linear", "arranged_product", "prepare", "prepare_correction", "why_not"]

_COMPILING_THREADS = 8
_MOST_INPUTS = 2**31 // (16 * 15 * 128)  # of 4-bit weights that meet integers without groups: 16 * q for half of the outputs


def why_not(device: torch.device, weight: WeightShape, groups: int) -> str | None:
    """The reason why these kernels do not take such a weight, or None if they do. groups: of inputs that share a step."""
    reason = cuda_kernel.why_not(device)
    if reason is not None:
        return reason
    if (weight.bits, weight.integer) not in ((8, True), (4, True), (4, False), (3, False)):
        return f"{weight.bits}-bit weights with {8 if weight.integer else 16}-bit activations have no such kernel"
    unit = group_unit(integer=weight.integer)
    if weight.grouped and weight.in_features // groups % unit:
        return f"takes groups of a multiple of {unit} inputs, not {weight.in_features // groups}"
    if weight.in_features % 16 or weight.out_features % 8:
        return f"{weight.in_features} inputs and {weight.out_features} outputs are no multiples of 16 and 8"
    if weight.bits == 4 and weight.integer and not weight.grouped and weight.in_features > _MOST_INPUTS:
        return f"sums over {weight.in_features} inputs do not fit 32 bits while some are 16 times as large"
    return None


def arranged_linear(
    x: Tensor, weight: ArrangedWeight, bias: Tensor | None, grid: InputGrid = PER_TOKEN, factors: Factors | None = None
) -> Tensor:
    """y [T, N] for x [T, K], bfloat16 or float16. grid: how x is quantized if ``weight.integer``.

    factors: of a low-rank correction. To many tokens the product's own kernel adds it, before it rounds.
    """
    if factors is not None:
        tile = adding_tile(len(x), weight.shape, factors.parts, x.device)
        if tile is not APART:
            correction = low_rank.shrink(x, factors), factors
            plan = _plan(tile, weight.shape, x.dtype, corrected=True)
            return tile_linear.tile_linear(_given(x, weight, grid), weight, bias, plan, correction)
    tile = _tile(len(x), weight.shape, x.device, stream_linear.read_as(len(x), weight.shape, grid.kind))
    if tile is STREAM:
        y = stream_linear.stream_linear(x, weight, bias, grid)
    else:
        y = tile_linear.tile_linear(_given(x, weight, grid), weight, bias, _plan(tile, weight.shape, x.dtype))
    return y if factors is None else low_rank.add_low_rank_(y, x, factors, hopper=True)


def arranged_product(x: IntegerTokens, weight: ArrangedWeight, bias: Tensor | None) -> Tensor:
    """y [T, N] of tokens that are integers already."""
    tile = _tile(len(x.q), weight.shape, x.q.device, Input.QUANTIZED)
    if tile is STREAM:
        return stream_linear.stream_linear(x, weight, bias)
    given = x if x.total is not None else x._replace(total=quantize_tokens.row_totals(x.q))
    return tile_linear.tile_linear(given, weight, bias, _plan(tile, weight.shape, x.dtype))


@cache
def prepare(weight: WeightShape, dtype: torch.dtype, device: torch.device, kind: InputKind) -> None:
    """Compile every kernel that :func:`arranged_linear` and :func:`arranged_product` may take for such a weight: a CUDA graph
    cannot record compiling.
    """
    sources = set(quantize_tokens.sources(weight.in_features, dtype, kind)) if weight.integer else set()
    limits = [most for most, _ in choices(weight, cuda_kernel.gpu_name(device)) if most is not None]
    for tokens in (*range(1, stream_linear.MOST_TOKENS + 1), *(most + 1 for most in limits)):
        for given in {stream_linear.read_as(tokens, weight, kind), Input.QUANTIZED if weight.integer else Input.AS_IT_IS}:
            tile = _tile(tokens, weight, device, given)
            if tile is STREAM:
                sources.add(stream_linear.source(tokens, weight, dtype, device, given))
            else:
                sources.add(_plan(tile, weight, dtype).source())
    _compile(sources, device)


def prepare_correction(weight: WeightShape, factors: Factors) -> None:
    """Compile what :func:`arranged_linear` takes besides, for such a weight with these factors."""
    low_rank.prepare(factors)
    _compile_adding(weight, factors.parts, factors.v.dtype, factors.v.device)


@cache
def _compile_adding(weight: WeightShape, parts: Parts, dtype: torch.dtype, device: torch.device) -> None:
    tiles = _all_adding_tiles(weight, parts, device)
    _compile({_plan(tile, weight, dtype, corrected=True).source() for tile in tiles}, device)


def _compile(sources: set[cuda_kernel.Source], device: torch.device) -> None:
    with ThreadPoolExecutor(min(_COMPILING_THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda one: cuda_kernel.compiled(one, device), sources))


def _given(x: Tensor, weight: ArrangedWeight, grid: InputGrid) -> IntegerTokens | Tensor:
    return quantize_tokens.quantize_tokens(x, grid) if weight.shape.integer else x


def adding_tile(tokens: int, weight: WeightShape, parts: Parts, device: torch.device) -> Tile | None:
    """The tile whose kernel adds a correction of these parts as it multiplies, or APART: for few tokens; and where nothing may
    depend on how many GPUs share the outputs, as it does whether tiles and parts end together.
    """
    if tokens <= low_rank.MOST_FEW or weight.whole_outputs:
        return APART
    tile = correcting(tokens, weight, cuda_kernel.gpu_name(device))
    return tile if tile is not APART and tile_linear.adds(parts, tile.share) else APART


def _all_adding_tiles(weight: WeightShape, parts: Parts, device: torch.device) -> set[Tile]:
    """Those of any number of tokens."""
    limits = [most for most, _ in correcting_choices(weight, cuda_kernel.gpu_name(device)) if most is not None]
    tiles = (adding_tile(tokens, weight, parts, device) for tokens in (*limits, max(limits, default=low_rank.MOST_FEW) + 1))
    return {tile for tile in tiles if tile is not APART}


def _plan(tile: Tile, weight: WeightShape, dtype: torch.dtype, *, corrected: bool = False) -> tile_linear.Plan:
    return tile_linear.plan(
        weight.bits, *tile, integer=weight.integer, float16=dtype == torch.float16, grouped=weight.grouped, corrected=corrected
    )


def _tile(tokens: int, weight: WeightShape, device: torch.device, x: Input) -> Tile | None:
    tile = chosen(tokens, weight, cuda_kernel.gpu_name(device))
    if tile is STREAM and not stream_linear.takes(tokens, weight, device, x):
        return Tile(16 if tokens <= 16 else 32, blocks=2)
    return tile
