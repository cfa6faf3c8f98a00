"""The CUDA C++ of the kernels for Hopper GPUs, compiled for them; that takes no GPU."""

from collections.abc import Iterable

import pytest
import torch

from lrq_vllm.kernels import hopper_table, low_rank, quantize_tokens, rotate_tokens, stream_linear, tile_linear
from lrq_vllm.kernels.arranged_weight import WeightShape
from lrq_vllm.kernels.cuda_kernel import Source, binary_of
from lrq_vllm.kernels.hopper_table import STREAM, Tile
from lrq_vllm.kernels.reference import InputKind
from tests.arranged_weights import GROUPED_KINDS, KINDS

HOPPER = (9, 0)
PROCESSORS = 132  # of an H100 and of an H200
LAYERS = [(6144, 4096), (4096, 14336)]


def assert_compile(sources: Iterable[Source]) -> None:
    """Without a remark: the compiler makes one where it cannot do what a kernel's speed rests on."""
    for source in set(sources):
        binary, remarks = binary_of(source, HOPPER)
        assert binary and not remarks, source.text[:200]


@pytest.mark.parametrize(
    ("bits", "integer", "grouped"), [*((*kind, False) for kind in KINDS), *((*kind, True) for kind in GROUPED_KINDS)]
)
def test_the_products_of_every_kind_of_weight_compile(bits: int, integer: bool, grouped: bool) -> None:
    sources = []
    for outputs, inputs in LAYERS:
        shape = WeightShape(bits, integer, outputs, inputs, grouped)
        for tokens in (1, 8, 16):
            plan = stream_linear.plan(tokens, shape, stream_linear.read_as(tokens, shape, InputKind.PER_TOKEN), PROCESSORS)
            sources += [plan.source()] if plan is not None else []
        tiles = [tile for _, tile in hopper_table.choices(shape, "NVIDIA H200") if tile is not STREAM]
        sources += [tile_linear.plan(bits, *tile, integer=integer, grouped=grouped).source() for tile in tiles]
    for tile in (Tile(64, blocks=2, even=2), Tile(128, share=2)):
        sources.append(tile_linear.plan(bits, *tile, integer=integer, grouped=grouped, corrected=True).source())
    assert_compile(sources)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_makes_integers_of_tokens_and_rotates_them_compiles(dtype: torch.dtype) -> None:
    assert_compile([
        *(source for kind in InputKind for _, inputs in LAYERS for source in quantize_tokens.sources(inputs, dtype, kind)),
        rotate_tokens.source(4096, 1, dtype), rotate_tokens.source(14336, 28, dtype),
    ])  # fmt: skip


@pytest.mark.parametrize("float16", [False, True])
def test_low_rank_corrections_of_few_tokens_compile(float16: bool) -> None:
    for widths, ranks in (((4096,), (410,)), ((4096, 1024, 1024), (410, 102, 102))):
        plan = low_rank.plan(1, 4096, widths, ranks, float16, PROCESSORS)
        assert_compile([plan.shrink, plan.expand])


def test_what_does_not_compile_is_refused_with_what_the_compiler_says() -> None:
    with pytest.raises(RuntimeError, match="nonsense does not compile: nonsense"):
        binary_of(Source("nonsense", 0, "this is no C++"), HOPPER)
