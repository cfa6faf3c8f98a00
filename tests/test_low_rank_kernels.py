"""The product of a low-rank correction as a GPU takes it, against reference.py."""

import pytest
import torch
from torch import Tensor

from lrq_vllm.kernel_choice import TRITON
from lrq_vllm.kernels import arranged_linear, low_rank, reference, tile_linear
from lrq_vllm.kernels.hopper_table import Tile
from lrq_vllm.kernels.quantize_tokens import quantize_tokens
from lrq_vllm.kernels.reference import InputKind
from lrq_vllm.low_rank import choose_low_rank
from tests.arranged_weights import GROUPED_KINDS, KINDS, Weight, assert_product

# Of layers of one, two and three parts: widths, and ranks that are no multiples of 16; a part may have none.
PARTS = [([200], [33]), ([512, 512], [60, 60]), ([1024, 256, 256], [410, 103, 0]), ([96], [700])]


def pairs_of(widths: list[int], ranks: list[int], inputs: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """U and V that keep the size of activations."""
    return [
        ((torch.randn(width, rank) * max(rank, 1) ** -0.5).to(dtype), (torch.randn(inputs, rank) * inputs**-0.5).to(dtype))
        for width, rank in zip(widths, ranks, strict=True)
    ]


def assert_added(
    widths: list[int], ranks: list[int], inputs: int, tokens: int, dtype: torch.dtype, device: str, *, hopper: bool = False
) -> None:
    """Within a rounding of y, and what one of V^T x makes when it falls to the other side."""
    pairs = pairs_of(widths, ranks, inputs, dtype)
    x, y = torch.randn(tokens, 2 * inputs).to(dtype)[:, :inputs], torch.randn(tokens, sum(widths)).to(dtype)
    factors = low_rank.arrange([(u.to(device), v.to(device)) for u, v in pairs], dtype)
    found = y.to(device).clone()
    low_rank.add_low_rank_(found, x.to(device), factors, hopper=hopper)
    ulp = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(found.cpu().float(), reference.add_low_rank(y, x, pairs).float(), rtol=2 * ulp, atol=4 * ulp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("widths", "ranks"), PARTS)
def test_what_is_added_in_place_is_the_reference_product(
    widths: list[int], ranks: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    for tokens in (0, 1, 40):
        assert_added(widths, ranks, 96, tokens, dtype, device.type)


def test_a_layer_that_does_not_run_on_our_kernels_is_corrected_without_them() -> None:
    pairs, layer = pairs_of([48, 16], [10, 3], 64, torch.bfloat16), torch.nn.Module()
    x, y = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    correction = choose_low_rank(torch.device("cuda"), TRITON)
    correction.prepare(layer, pairs, torch.bfloat16)
    found = correction.add(layer, y.clone(), x)
    torch.testing.assert_close(found, reference.add_low_rank(y, x, pairs), rtol=2**-7, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [512, 4096, 14336, 1032])
@pytest.mark.parametrize(("widths", "ranks"), [*PARTS, ([4096], [1229])])
def test_few_tokens_give_the_reference_product(widths: list[int], ranks: list[int], inputs: int, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 7, 8, 9, 16):
        assert_added(widths, ranks, inputs, tokens, dtype, "cuda", hopper=True)


class Corrected:
    """A random layer whose correction is as large as its product: the weight, the factors, and what they make of x."""

    def __init__(
        self,
        bits: int,
        integer: bool,
        widths: list[int],
        ranks: list[int],
        inputs: int,
        dtype: torch.dtype,
        group: int | None = None,
    ) -> None:
        self.weight = Weight(bits, integer, sum(widths), inputs, torch.device("cuda"), group)
        self.inputs, self.dtype = inputs, dtype
        size = self.weight.product(self.tokens(8), None).float().std().cpu()
        pairs = pairs_of(widths, ranks, inputs, dtype)
        self.pairs = [((u.float() * size).to("cuda", dtype), v.to("cuda")) for u, v in pairs]
        self.factors = low_rank.arrange(self.pairs, dtype)
        self.size = size.item()

    def tokens(self, count: int) -> Tensor:
        return torch.randn(count, self.inputs).to("cuda", self.dtype)

    def assert_right(self, found: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """The float32 product and correction, rounded once, give or take another place of a sum, and what of V^T x fell to the
        other side.
        """
        weight = self.weight
        if weight.integer is None:
            product = reference.weight_only_linear(x, *weight.stored, weight.bits, bias).float()
        else:
            product = reference.integer_linear(
                reference.quantize_input(x, reference.PER_TOKEN), weight.integer, bias, torch.float32
            )
        wanted = reference.add_low_rank(product, x, self.pairs)
        ulp = torch.finfo(self.dtype).eps
        torch.testing.assert_close(found.float(), wanted, rtol=2 * ulp, atol=4 * ulp * self.size)


TILES = [
    Tile(16, blocks=2), Tile(64, blocks=2), Tile(96), Tile(192), Tile(256), Tile(128, share=2), Tile(256, share=2),
    Tile(16, even=8), Tile(64, blocks=2, even=2), Tile(128, share=2, even=4), Tile(256, even=2),
]  # fmt: skip
GROUPED_TILES = [Tile(16, even=8), Tile(64, blocks=2), Tile(128), Tile(128, share=2)]
CASES = [
    *((bits, integer, None, tile) for bits, integer in KINDS for tile in TILES),
    *((bits, integer, 128, tile) for bits, integer in GROUPED_KINDS for tile in GROUPED_TILES),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "integer", "group", "tile"), CASES)
def test_the_kernel_of_the_product_adds_a_correction(
    bits: int, integer: bool, group: int | None, tile: Tile, dtype: torch.dtype
) -> None:
    chosen = tile_linear.plan(
        bits, *tile, integer=integer, float16=dtype == torch.float16, grouped=group is not None, corrected=True
    )
    for widths, ranks in ([200], [33]), ([512, 512], [60, 60]), ([1024, 256, 256], [410, 103, 0]), ([4608, 4392], [0, 130]):
        layer = Corrected(bits, integer, widths, ranks, 1152, dtype, group)
        assert tile_linear.adds(layer.factors.parts, tile.share)
        for tokens in (1, 100, 1500):
            x, bias = layer.tokens(tokens), torch.randn(sum(widths)).to("cuda", dtype)
            given = quantize_tokens(x) if integer else x
            found = tile_linear.tile_linear(
                given, layer.weight.arranged, bias, chosen, (low_rank.shrink(x, layer.factors), layer.factors)
            )
            layer.assert_right(found, x, bias)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_a_correction_by_zeros_leaves_the_product_as_it_is(bits: int, integer: bool) -> None:
    layer = Corrected(bits, integer, [512, 256], [40, 70], 2048, torch.bfloat16)
    layer.factors.u.zero_()
    for tokens in (16, 300):
        x = layer.tokens(tokens)
        found = arranged_linear.arranged_linear(x, layer.weight.arranged, None, factors=layer.factors)
        assert_product(found, layer.weight.product(x, None), integer=integer)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "integer"), KINDS)
@pytest.mark.parametrize(("widths", "ranks"), [([4096], [410]), ([1024, 256, 256], [103, 26, 26]), ([200, 120], [33, 20])])
def test_every_number_of_tokens_is_corrected_alike(bits: int, integer: bool, widths: list[int], ranks: list[int]) -> None:
    layer = Corrected(bits, integer, widths, ranks, 4096, torch.bfloat16)
    shape, x = layer.weight.arranged.shape, layer.tokens(600)
    arranged_linear.prepare(shape, x.dtype, x.device, InputKind.PER_TOKEN)
    arranged_linear.prepare_correction(shape, layer.factors)
    for tokens in (0, 1, 8, 9, 17, 33, 65, 150, 600):
        found = arranged_linear.arranged_linear(x[:tokens], layer.weight.arranged, None, factors=layer.factors)
        layer.assert_right(found, x[:tokens], None)
