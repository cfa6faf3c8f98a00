"""The kernels for Hopper GPUs, against reference.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lrq_vllm.kernels import arranged_linear, reference, stream_linear, tile_linear
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, no_flags
from lrq_vllm.kernels.hopper_table import Tile
from lrq_vllm.kernels.quantize_tokens import IntegerTokens, quantize_tokens, row_totals
from lrq_vllm.kernels.reference import PER_TOKEN, InputGrid, InputKind
from tests.arranged_weights import GROUPED_KINDS, KINDS, Weight, assert_product, assert_sums_of_groups, grids


def integers_of(x: Tensor, grid: InputGrid) -> IntegerTokens:
    """What a compiled graph hands to the kernels: by the reference, a calibrated grid once for all tokens, and no totals."""
    tokens = reference.quantize_input(x, grid)
    step, zero_point = grid.calibrated if grid.kind is InputKind.STATIC else (tokens.step, tokens.zero_point)
    return IntegerTokens(tokens.q, grid.kind, step, zero_point, None, x.dtype)


GPU_SHAPES = [(512, 14336), (200, 4096), (48, 512), (1000, 1040)]


def hard_tokens(tokens: int, columns: int) -> Tensor:
    """Outliers; and rows that are all zero, all equal, all negative."""
    x = torch.randn(tokens, columns)
    x[:, ::7] *= 300
    for row, value in zip(range(tokens), (0.0, 3.5, -1e4), strict=False):
        x[row] = value
    return x


def inputs(
    tokens: int, columns: int, rows: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Activations and biases."""
    yield torch.randn(tokens, columns).to(device, dtype), None
    yield hard_tokens(tokens, columns).to(device, dtype), torch.randn(rows).to(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), GPU_SHAPES)
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_the_streaming_kernel_equals_the_reference(
    bits: int, integer: bool, rows: int, columns: int, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    weight = Weight(bits, integer, rows, columns, device)
    for tokens in (1, 3, 8, 16, 27, 32):
        for x, bias in inputs(tokens, columns, rows, dtype, device):
            for grid in grids(device, integer=integer):
                found = stream_linear.stream_linear(x, weight.arranged, bias, grid)
                assert_product(found, weight.product(x, bias, grid), integer=integer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), GPU_SHAPES)
def test_activations_become_the_integers_of_the_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    for x, _ in inputs(70, columns, rows, dtype, device):
        assert_integers_of_the_reference(x)
    nothing = quantize_tokens(x[:0])
    assert nothing.q.shape == (0, columns) and row_totals(nothing.q).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [4096, 1040])
def test_many_activations_become_the_integers_of_the_reference(columns: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    assert_integers_of_the_reference(hard_tokens(2**23 // columns + 9, columns).to(device, dtype))


def assert_integers_of_the_reference(x: Tensor) -> None:
    """However x is quantized, and the totals of integers that are there already too."""
    for grid in grids(x.device, integer=True):
        wanted, found = reference.quantize_input(x, grid), quantize_tokens(x, grid)
        assert torch.equal(found.q, wanted.q) and torch.equal(found.step, wanted.step.flatten())
        for name in ("zero_point", "total"):
            assert torch.equal(getattr(found, name), getattr(wanted, name).flatten())
        assert torch.equal(row_totals(wanted.q), wanted.total.flatten())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), GPU_SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_that_a_graph_has_made_give_the_same_product(bits: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    weight = Weight(bits, True, rows, columns, device)
    for tokens in (0, 1, 3, 8, 27, 64, 300):
        for x, bias in inputs(tokens, columns, rows, dtype, device):
            for grid in grids(device, integer=True):
                found = arranged_linear.arranged_product(integers_of(x, grid), weight.arranged, bias)
                assert_product(found, weight.product(x, bias, grid), integer=True)


@pytest.mark.gpu
def test_the_streaming_kernel_takes_strided_rows_and_no_rows() -> None:
    device = torch.device("cuda")
    weight = Weight(4, True, 96, 512, device)
    wide = torch.randn(5, 1030).to(device, torch.bfloat16)
    found = stream_linear.stream_linear(wide[:, 3:515], weight.arranged, None)
    assert torch.equal(found, weight.product(wide[:, 3:515], None))
    assert stream_linear.stream_linear(wide[:0, :512], weight.arranged, None).shape == (0, 96)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize(
    ("bits", "integer", "group"), [*((*kind, None) for kind in KINDS), *((*kind, 128) for kind in GROUPED_KINDS)]
)
def test_a_rank_gives_the_bits_of_the_whole_layer_where_their_number_may_not_matter(
    bits: int, integer: bool, group: int | None, rows: int, columns: int
) -> None:
    device = torch.device("cuda")
    weight = Weight(bits, integer, rows, columns, device, group)
    whole = weight.arranged._replace(shape=weight.arranged.shape._replace(whole_outputs=rows))
    for tokens in (3, 16, 64, 512):
        x = torch.randn(tokens, columns).to(device, torch.bfloat16)
        y = arranged_linear.arranged_linear(x, whole, None)
        for ranks in (2, 8):
            found = [arranged_linear.arranged_linear(x, share_of(whole, rank, ranks), None) for rank in range(ranks)]
            assert torch.equal(torch.cat(found, dim=1), y), (tokens, ranks)


def share_of(weight: ArrangedWeight, rank: int, ranks: int) -> ArrangedWeight:
    """One rank's outputs."""
    shape = weight.shape._replace(out_features=weight.shape.out_features // ranks)
    return ArrangedWeight(weight.q.chunk(ranks)[rank], weight.facts.chunk(ranks)[rank], no_flags(weight.q.device), shape)


def with_kinds(*tiles: Tile) -> list[Any]:
    """bits, integer, tile; named for pytest -k, which takes no equals sign."""
    kinds = [(bits, integer, tile) for bits, integer in KINDS for tile in tiles if tile.team == 2 or bits == 8]
    return [pytest.param(*kind, id=f"{kind[0]}-{kind[1]}-{'x'.join(map(str, kind[2]))}") for kind in kinds]


TILES = [
    Tile(16, blocks=2), Tile(32, split=2), Tile(64, blocks=2), Tile(64, split=4), Tile(128, split=2), Tile(192), Tile(256),
    Tile(96), Tile(256, share=2), Tile(128, share=2), Tile(128, team=1), Tile(64, share=2, team=1),
    Tile(160, team=1), Tile(16, even=8), Tile(64, blocks=2, even=2), Tile(128, share=2, even=4), Tile(256, even=2),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "integer", "tile"), with_kinds(*TILES))
def test_the_tile_kernel_equals_the_reference(bits: int, integer: bool, dtype: torch.dtype, tile: Tile) -> None:
    device = torch.device("cuda")
    chosen = tile_linear.plan(bits, *tile, integer=integer, float16=dtype == torch.float16)
    for rows, columns in GPU_SHAPES:
        weight = Weight(bits, integer, rows, columns, device)
        for tokens in (1, 7, 64, 100, 300):
            for x, bias in inputs(tokens, columns, rows, dtype, device):
                for grid in grids(device, integer=integer):
                    given = quantize_tokens(x, grid) if integer else x
                    found = tile_linear.tile_linear(given, weight.arranged, bias, chosen)
                    assert_product(found, weight.product(x, bias, grid), integer=integer)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "group"), [(512, 14336, 128), (200, 4096, 64), (1000, 1152, 128)])
@pytest.mark.parametrize("bits", [4, 3])
def test_steps_for_groups_of_inputs_that_meet_floats(
    bits: int, rows: int, columns: int, group: int, dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    weight = Weight(bits, False, rows, columns, device, group)
    for tokens in (1, 5, 16, 32, 100, 300):
        for x, bias in inputs(tokens, columns, rows, dtype, device):
            wanted = weight.product(x, bias)
            if tokens <= 32:
                found = stream_linear.stream_linear(x, weight.arranged, bias)
                assert_product(found, wanted, integer=False)
            for tile in (Tile(16, blocks=2), Tile(64, split=4), Tile(128), Tile(256, share=2), Tile(32, even=4)):
                chosen = tile_linear.plan(bits, *tile, integer=False, float16=dtype == torch.float16, grouped=True)
                assert_product(tile_linear.tile_linear(x, weight.arranged, bias, chosen), wanted, integer=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(512, 14336, 128), (200, 4096, 256), (1000, 1152, 128), (9000, 640, 128)]
)
def test_steps_for_groups_of_inputs_that_meet_integers(rows: int, columns: int, group: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    weight, clipped = Weight(4, True, rows, columns, device, group), reference.clipped_grid(torch.tensor([0.6], device=device))
    tiles = [
        Tile(16, blocks=2), Tile(64, split=4), Tile(128), Tile(96, split=2), Tile(128, share=2), Tile(32, even=4),
        Tile(64, blocks=2, even=2), Tile(128, share=2, even=4),
    ]  # fmt: skip
    for tokens in (1, 5, 16, 32, 100, 300):
        for x, bias in inputs(tokens, columns, rows, dtype, device):
            for grid in (PER_TOKEN, clipped):
                wanted, most, given = weight.product(x, bias, grid), weight.most(x, grid), quantize_tokens(x, grid)
                if tokens <= 32:
                    assert_sums_of_groups(stream_linear.stream_linear(x, weight.arranged, bias, grid), wanted, most)
                for tile in tiles:
                    chosen = tile_linear.plan(4, *tile, integer=True, float16=dtype == torch.float16, grouped=True)
                    assert_sums_of_groups(tile_linear.tile_linear(given, weight.arranged, bias, chosen), wanted, most)
    zeros = torch.zeros(40, columns).to(device, dtype)
    for tokens in (2, 8, 40):
        assert not arranged_linear.arranged_linear(zeros[:tokens], weight.arranged, None).any()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [208, 3008])  # a part of the ring, and several times around it
@pytest.mark.parametrize(
    ("bits", "integer", "tile"),
    with_kinds(
        Tile(128), Tile(64, blocks=2), Tile(96), Tile(128, share=2), Tile(128, team=1), Tile(96, share=2, team=1),
        Tile(160, share=2, team=1), Tile(128, even=2), Tile(64, blocks=2, even=2), Tile(192, share=2, even=2),
    ),
)  # fmt: skip
def test_a_block_goes_on_with_the_next_tile(bits: int, integer: bool, columns: int, tile: Tile) -> None:
    device = torch.device("cuda")
    weight, x = Weight(bits, integer, 9000, columns, device), torch.randn(1500, columns).to(device, torch.bfloat16)
    chosen = tile_linear.plan(bits, *tile, integer=integer)
    given = quantize_tokens(x) if integer else x
    found = tile_linear.tile_linear(given, weight.arranged, None, chosen)
    assert_product(found, weight.product(x, None), integer=integer)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_every_number_of_tokens_gives_the_same_product(bits: int, integer: bool) -> None:
    device = torch.device("cuda")
    weight, x = Weight(bits, integer, 512, 1024, device), torch.randn(600, 1024).to(device, torch.bfloat16)
    arranged_linear.prepare(weight.arranged.shape, x.dtype, device, InputKind.PER_TOKEN)
    for tokens in (0, 1, 5, 17, 33, 65, 150, 600):
        found = arranged_linear.arranged_linear(x[:tokens], weight.arranged, None)
        assert_product(found, weight.product(x[:tokens], None), integer=integer)
