"""The layout of weights for Hopper GPUs, and the kernels that read it, against reference.py."""

import pytest
import torch
from torch import Tensor

from lrq_vllm.checkpoint.packing import pack
from lrq_vllm.kernels import arranged_linear, arranged_tiles, reference, stream_linear
from lrq_vllm.kernels.arranged_weight import ArrangedWeight, arrange, arranged_integers
from lrq_vllm.kernels.stream_linear import Input, plan

# Bits, and whether activations are integers.
KINDS = [(8, True), (4, True), (4, False), (3, False)]
# N and K: whole chunks, and parts of them; more outputs than are arranged at a time.
SHAPES = [(16, 64), (40, 208), (96, 128), (1040, 80)]
STATIC = (torch.tensor([0.03]), torch.tensor([117], dtype=torch.uint8))


class Weight:
    """A random weight over the whole grid: arranged, and as the reference takes it."""

    def __init__(self, bits: int, integer: bool, rows: int, columns: int, device: torch.device) -> None:
        unsigned = torch.randint(0, 2**bits, (rows, columns))
        zero_point = torch.randint(0, 2**bits, (rows, 1)).to(torch.uint8)
        zero_point[0], zero_point[-1] = 0, 2**bits - 1
        self.step = torch.rand(rows, 1) * 0.1 + 1e-3
        self.stored = pack(unsigned, bits), self.step, zero_point
        self.bits, self.columns = bits, columns
        self.q = unsigned - (128 if bits == 8 else 0)
        self.integer = reference.integer_weight(*self.stored, bits, columns) if integer else None
        zero = zero_point.flatten().int() - (128 if bits == 8 else 0)
        total = None if self.integer is None else self.integer.total.to(device)
        q, step = self.q.to(device), self.step.flatten().to(device)
        self.arranged: ArrangedWeight = arrange(q, step, zero.to(device), total, bits, integer=integer)

    def product(self, x: Tensor, bias: Tensor | None, *, static: bool) -> Tensor:
        """What reference.py computes."""
        if self.integer is None:
            return reference.weight_only_linear(x, *self.stored, self.bits, bias)
        tokens = reference.quantize_static(x, *STATIC) if static else reference.quantize_per_token(x)
        return reference.integer_linear(tokens, self.integer, bias, x.dtype)


def on(device: torch.device, tensors: tuple[Tensor, Tensor], *, static: bool) -> tuple[Tensor, Tensor] | None:
    return (tensors[0].to(device), tensors[1].to(device)) if static else None


# --- the layout ---


def test_a_chunk_holds_for_each_lane_16_inputs_of_two_outputs() -> None:
    q = torch.arange(16 * 64).view(16, 64) % 256 - 128
    lanes = arranged_integers(q, 8, integer=True).view(torch.int8).view(2, 32, 16)
    for half, lane in ((0, 0), (1, 0), (0, 5), (1, 31)):
        g, t = divmod(lane, 4)
        assert torch.equal(lanes[half, lane].int(), q[g + 8 * half, 16 * t : 16 * t + 16].int())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_an_arranged_weight_takes_its_bits_and_no_more(bits: int, integer: bool, rows: int, columns: int) -> None:
    weight = arranged_integers(torch.zeros(rows, columns), bits, integer=integer)
    assert weight.shape == (-(-rows // 16), -(-columns // 64), 128 * bits) and weight.dtype == torch.uint8


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_unpacking_gives_back_what_was_arranged(
    device: torch.device, bits: int, integer: bool, rows: int, columns: int
) -> None:
    weight = Weight(bits, integer, rows, columns, device)
    if integer:
        assert torch.equal(arranged_tiles.unpacked_integers(weight.arranged).cpu().int(), weight.q.int())
    else:
        found = arranged_tiles.unpacked_weight(weight.arranged, torch.float32).cpu()
        assert torch.equal(found, reference.dequantize_weight(*weight.stored, bits, columns))


# --- products of the unpacked weight ---


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(20, 40, 208), (33, 96, 128)])
@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_the_unpacked_weight_equal_the_reference(
    device: torch.device, bits: int, tokens: int, rows: int, columns: int, static: bool
) -> None:
    weight = Weight(bits, True, rows, columns, device)
    x, bias = torch.randn(tokens, columns) * torch.logspace(-2, 1, tokens).unsqueeze(1), torch.randn(rows)
    for added in (None, bias):
        found = arranged_linear.unpacked_linear(
            x.to(device), weight.arranged, None if added is None else added.to(device), on(device, STATIC, static=static)
        )
        assert torch.equal(found.cpu(), weight.product(x, added, static=static))


@pytest.mark.parametrize("bits", [4, 3])
def test_products_of_the_unpacked_16_bit_weight_are_close_to_the_reference(device: torch.device, bits: int) -> None:
    weight, x = Weight(bits, False, 40, 208, device), torch.randn(20, 208).half()
    found = arranged_linear.unpacked_linear(x.to(device), weight.arranged, None)
    torch.testing.assert_close(found.cpu(), weight.product(x, None, static=False), rtol=2e-3, atol=2e-3)


# --- the streaming kernel's plans ---


@pytest.mark.parametrize("tokens", [1, 8, 9, 32])
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (28672, 4096), (4096, 14336), (512, 512), (8192, 28672)])
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_a_plan_covers_all_inputs_and_stripes_with_the_memory_there_is(
    bits: int, integer: bool, rows: int, columns: int, tokens: int
) -> None:
    kinds = (Input.PER_TOKEN, Input.STATIC, Input.QUANTIZED) if integer else (Input.AS_IT_IS,)
    for kind in kinds:
        found = plan(tokens, (bits, rows, columns, integer), kind, 132)
        if found is None:  # more inputs than the registers of a cluster hold
            assert columns > 14336
            continue
        assert 8 * found.tiles >= tokens
        assert found.cluster * found.warps * found.chunks * 64 >= columns
        assert found.turns * (132 * 3 // 4 // found.cluster) * 16 >= rows or found.cluster <= 2
        assert found.shared_bytes <= 227 * 1024 and found.stages >= 2


def test_more_tokens_than_a_kernel_takes_have_no_plan() -> None:
    assert plan(stream_linear.MOST_TOKENS + 1, (4, 4096, 4096, True), Input.QUANTIZED, 132) is None


# --- the streaming kernel, on a GPU ---

GPU_SHAPES = [(512, 14336), (200, 4096), (48, 512), (1000, 1040)]


def hard_tokens(tokens: int, columns: int) -> Tensor:
    """Outliers; and rows that are all zero, all equal, all negative."""
    x = torch.randn(tokens, columns)
    x[:, ::7] *= 300
    for row, value in zip(range(tokens), (0.0, 3.5, -1e4), strict=False):
        x[row] = value
    return x


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
        for x, bias in ((torch.randn(tokens, columns), None), (hard_tokens(tokens, columns), torch.randn(rows).to(dtype))):
            x = x.to(dtype)
            for static in (False, True) if integer else (False,):
                found = stream_linear.stream_linear(
                    x.to(device), weight.arranged, None if bias is None else bias.to(device), on(device, STATIC, static=static)
                ).cpu()
                wanted = weight.product(x, bias, static=static)
                if integer:
                    assert torch.equal(found, wanted)
                elif wanted.isfinite().all():
                    assert (found.double() - wanted.double()).norm() < 6e-3 * wanted.double().norm()


@pytest.mark.gpu
def test_the_streaming_kernel_takes_strided_rows_and_no_rows() -> None:
    device = torch.device("cuda")
    weight = Weight(4, True, 96, 512, device)
    wide = torch.randn(5, 1030).bfloat16()
    found = stream_linear.stream_linear(wide.to(device)[:, 3:515], weight.arranged, None)
    assert torch.equal(found.cpu(), weight.product(wide[:, 3:515], None, static=False))
    assert stream_linear.stream_linear(wide.to(device)[:0, :512], weight.arranged, None).shape == (0, 96)


@pytest.mark.gpu
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_few_and_many_tokens_give_the_same_product(bits: int, integer: bool) -> None:
    device = torch.device("cuda")
    weight, x = Weight(bits, integer, 512, 1024, device), torch.randn(150, 1024).bfloat16()
    for tokens in (33, 64, 65, 150):
        found = arranged_linear.arranged_linear(x[:tokens].to(device), weight.arranged, None).cpu()
        wanted = weight.product(x[:tokens], None, static=False)
        assert torch.equal(found, wanted) if integer else (found - wanted).float().norm() < 6e-3 * wanted.float().norm()
