"""The layout of weights for Hopper GPUs, and which kernel takes which layer."""

import itertools

import pytest
import torch
from torch import Tensor

from lrq_vllm import arranged_layer
from lrq_vllm.input_fusion import Fusion, fusion_of
from lrq_vllm.integer_backends import HopperBackend
from lrq_vllm.kernels import arranged_linear, cuda_kernel, hopper_table, low_rank, reference, stream_linear, tile_linear
from lrq_vllm.kernels.arranged_weight import CHUNK, STRIPE, ArrangedWeight, WeightShape, arranged_integers, no_flags
from lrq_vllm.kernels.hopper_table import STREAM, Tile
from lrq_vllm.kernels.reference import InputKind
from lrq_vllm.kernels.stream_linear import Input, plan
from lrq_vllm.low_rank_factors import put_factors
from tests.arranged_weights import GROUPED_KINDS, KINDS, Weight, grids

# N and K: whole chunks, and parts of them; more outputs than are arranged at a time.
SHAPES = [(16, 64), (40, 208), (96, 128), (1040, 80)]


# --- the layout ---


def unpacked(weight: ArrangedWeight) -> Tensor:
    """Integers [N, K]: weight_chunk.cuh again, operand by operand."""
    bits, integer, rows, columns, *_ = weight.shape
    stripes, chunks, _ = weight.q.shape
    out = torch.zeros(stripes, STRIPE, chunks, CHUNK, dtype=torch.long)
    words = weight.q.view(torch.int32).long() & 0xFFFFFFFF
    lanes = torch.arange(32)
    g, t = lanes // 4, lanes % 4
    for step, i, byte in itertools.product(range(2 if integer else 4), range(4), range(4 if integer else 2)):
        half, late = i % 2, i // 2
        if bits == 8:
            unit = 2 * step + late
            at, shift = 128 * half + 16 * g + 4 * (unit ^ (g // 2)) + t, 8 * byte
        elif integer:
            at, shift = 4 * lanes + 2 * step + late, 8 * byte + 4 * half
        elif bits == 4:
            at, shift = 4 * lanes + step, 16 * byte + 4 * i
        elif step < 3:
            at, shift = lanes + 32 * step, 16 * byte + 6 * late + 3 * half
        else:
            at, shift = lanes + 32 * (late * (1 + half)), 16 * byte + 12
        value = (
            sum((words[:, :, lanes + 32 * bit] >> (16 * byte + 15) & 1) << bit for bit in range(3))
            if bits == 3 and (step, half, late) == (3, 1, 0)
            else words[:, :, at] >> shift & (2**bits - 1)
        )
        k = 32 * step + 16 * late + 4 * t + byte if integer else 16 * step + 8 * late + 2 * t + byte
        out[:, g + 8 * half, :, k] = value.permute(2, 0, 1)
    if bits == 8:
        out = (out + 128) % 256 - 128
    return out.view(stripes * STRIPE, chunks * CHUNK)[:rows, :columns]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_an_arranged_weight_takes_its_bits_and_no_more(bits: int, integer: bool, rows: int, columns: int) -> None:
    weight = arranged_integers(torch.zeros(rows, columns), bits, integer=integer)
    assert weight.shape == (-(-rows // 16), -(-columns // 64), 128 * bits) and weight.dtype == torch.uint8


def groups_of(weight: ArrangedWeight) -> tuple[Tensor, Tensor]:
    """Of a weight below 8 bits, for each chunk: relative steps and zero-points [N, chunks]."""
    words = weight.q[..., 128 * weight.shape.bits :].contiguous().view(torch.int32).transpose(1, 2).flatten(0, 1)
    words = words[: weight.shape.out_features]
    return (words & ~15).view(torch.float32), words & 15


@pytest.mark.parametrize("integer", [False, True])
def test_a_group_has_its_step_and_zero_point_behind_each_of_its_chunks(integer: bool) -> None:
    weight = Weight(4, integer, 40, 384, torch.device("cpu"), group=128)
    _, step, zero_point = weight.stored
    relative, zeros = groups_of(weight.arranged)
    channel = weight.arranged.facts[:, 0].flatten().view(torch.float32)[:40]
    assert weight.arranged.q.shape[2] == weight.arranged.shape.chunk_bytes
    assert torch.equal(zeros, zero_point.int().repeat_interleave(2, dim=1))
    assert relative.max() == 1
    assert torch.allclose(relative * channel.unsqueeze(1), step.repeat_interleave(2, dim=1), rtol=2**-18, atol=0)


def test_groups_that_meet_integers_give_the_reference_s_product() -> None:
    weight, x = Weight(4, True, 40, 384, torch.device("cpu"), group=128), torch.randn(5, 384)
    relative, zeros = groups_of(weight.arranged)
    step, _, total = weight.arranged.facts.transpose(0, 1).flatten(1)[:, :40].contiguous().view(torch.float32)
    tokens = reference.quantize_per_token(x)
    centred = unpacked(weight.arranged).unflatten(1, (-1, CHUNK)) - zeros.unsqueeze(2)
    sums = torch.einsum("tgk,ngk,ng->tn", tokens.q.double().unflatten(1, (-1, CHUNK)), centred.double(), relative.double())
    found = (sums - tokens.zero_point * total.double()) * step * tokens.step
    torch.testing.assert_close(found.float(), weight.product(x, None), rtol=0, atol=2e-6 * float(found.abs().max()))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_unpacking_as_the_kernels_do_gives_back_what_was_arranged(bits: int, integer: bool, rows: int, columns: int) -> None:
    weight = Weight(bits, integer, rows, columns, torch.device("cpu"))
    assert torch.equal(unpacked(weight.arranged), weight.q.long())


# --- the streaming kernel's plans ---


@pytest.mark.parametrize("tokens", [1, 8, 9, 32])
@pytest.mark.parametrize(("rows", "columns"), [(6144, 4096), (28672, 4096), (4096, 14336), (512, 512), (8192, 28672)])
@pytest.mark.parametrize(("bits", "integer"), KINDS)
def test_a_plan_covers_all_inputs_and_stripes_with_the_memory_there_is(
    bits: int, integer: bool, rows: int, columns: int, tokens: int
) -> None:
    kinds = (Input.PER_TOKEN, Input.STATIC, Input.QUANTIZED) if integer else (Input.AS_IT_IS,)
    for kind in kinds:
        found = plan(tokens, WeightShape(bits, integer, rows, columns), kind, 132)
        if tokens > 4 and kind in (Input.PER_TOKEN, Input.STATIC):
            assert found is None  # a kernel of its own quantizes them
            continue
        if found is None:  # more inputs than the registers of a cluster hold
            assert columns > 14336
            continue
        assert 8 * found.tiles >= tokens
        assert found.cluster * found.warps * found.chunks * 64 >= columns
        assert found.turns * (132 * 3 // 4 // found.cluster) * 16 >= rows or found.cluster <= 2
        assert found.shared_bytes <= 227 * 1024 and found.stages >= 2


def test_more_tokens_than_a_kernel_takes_have_no_plan() -> None:
    assert plan(stream_linear.MOST_TOKENS + 1, WeightShape(4, True, 4096, 4096), Input.QUANTIZED, 132) is None


# --- which kernel ---


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"])
@pytest.mark.parametrize(
    ("bits", "integer", "grouped"), [*((*kind, False) for kind in KINDS), *((*kind, True) for kind in GROUPED_KINDS)]
)
def test_every_number_of_tokens_has_a_kernel_that_takes_it(bits: int, integer: bool, grouped: bool, gpu: str) -> None:
    for rows, columns in ((6144, 4096), (28672, 4096), (4096, 14336), (512, 512), (8192, 28672)):
        shape = WeightShape(bits, integer, rows, columns, grouped)
        limits = [most for most, _ in hopper_table.choices(shape, gpu)]
        assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1]))
        for tokens in (1, 2, 17, 33, 100, 1000, 100_000):
            tile = hopper_table.chosen(tokens, shape, gpu)
            if tile is STREAM:
                assert tokens <= stream_linear.MOST_TOKENS
            else:
                found = tile_linear.plan(bits, *tile, integer=integer, grouped=grouped)
                assert found.stages >= 2 and found.shared_bytes <= (227 * 1024) // tile.blocks


@pytest.mark.parametrize("tokens", [16, 64, 128, 256])
@pytest.mark.parametrize(
    ("bits", "integer", "grouped"), [*((*kind, False) for kind in KINDS), *((*kind, True) for kind in GROUPED_KINDS)]
)
def test_factors_of_a_correction_fit_a_stage_of_the_ring(bits: int, integer: bool, grouped: bool, tokens: int) -> None:
    if not (integer and grouped and tokens > 128):
        found = tile_linear.plan(bits, tokens, integer=integer, grouped=grouped, corrected=True)
        assert found.stages >= 2
        assert found.rank_bytes in (64, 128) and found.rank_bytes * (128 + tokens) <= found.shared_bytes // found.stages


def test_a_correction_is_added_apart_where_the_kernel_of_the_product_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernel, "gpu_name", lambda device: "NVIDIA H200")
    shape, one = WeightShape(4, False, 6144, 4096), low_rank.Parts((6144,), (416,))
    layer = next(
        layer
        for layer in hopper_table._table()
        if (layer["gpu"], layer["scheme"], layer["out_features"]) == ("NVIDIA H200", "w4a16", 6144)
    )
    monkeypatch.setitem(layer, "corrected", [[512, [64, 1, 1, 2]], [None, "apart"]])
    hopper_table.correcting_choices.cache_clear()

    def adds(tokens: int, shape: WeightShape, parts: low_rank.Parts) -> bool:
        return arranged_linear.adding_tile(tokens, shape, parts, torch.device("cuda")) == Tile(64, share=2)

    for tokens in (16, 300):
        assert adds(tokens, shape, one) and adds(tokens, shape, low_rank.Parts((4096, 1024, 1024), (416, 112, 112)))
        assert not adds(tokens, shape, low_rank.Parts((4096 - 128, 1024 + 128, 1024), (416, 112, 112)))  # ends within a cluster
        assert not adds(tokens, shape, low_rank.Parts((1536,) * 4, (64,) * 4))  # too many parts
        assert not adds(tokens, shape, low_rank.Parts((6144,), (0,)))  # nothing to add
        assert not adds(tokens, shape._replace(whole_outputs=6144), one)  # bits may not depend on how GPUs share the outputs
        assert not adds(tokens, WeightShape(3, False, 6144, 4096), one)  # not measured
    for tokens in (0, 1, 8, 513):
        assert not adds(tokens, shape, one)
    hopper_table.correcting_choices.cache_clear()


@pytest.mark.parametrize(
    ("bits", "integer", "group", "unit"),
    [(4, True, 128, None), (4, True, 64, 128), (4, False, 64, None), (3, False, 32, 64)],
)
def test_groups_that_no_kernel_takes_are_refused_with_the_reason(
    bits: int, integer: bool, group: int, unit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernel, "why_not", lambda device: None)
    shape = WeightShape(bits, integer, 512, 1024, grouped=True)
    reason = arranged_linear.why_not(torch.device("cuda"), shape, 1024 // group)
    refusal = f"takes groups of a multiple of {unit} inputs, not {group}"
    assert reason == (None if unit is None else refusal)


def test_a_layer_that_was_not_measured_takes_the_choices_of_the_most_similar_one() -> None:
    for near, known in (((6144, 4000), (6144, 4096)), ((30000, 5000), (28672, 4096)), ((5120, 27648), (4096, 14336))):
        for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
            expected = hopper_table.choices(WeightShape(4, True, *known), gpu)
            assert hopper_table.choices(WeightShape(4, True, *near), gpu) == expected


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "another"])
@pytest.mark.parametrize(
    ("bits", "integer", "grouped"), [*((*kind, False) for kind in KINDS), *((*kind, True) for kind in GROUPED_KINDS)]
)
def test_ranks_divide_sums_as_one_rank_does_where_their_number_may_not_matter(
    bits: int, integer: bool, grouped: bool, gpu: str
) -> None:
    for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        whole = WeightShape(bits, integer, rows, columns, grouped, whole_outputs=rows)
        tiles = hopper_table.choices(whole, gpu)
        assert not any(tile.even for _, tile in tiles if tile is not STREAM)  # its spans depend on the number of outputs
        for _, tile in tiles:
            if tile is not STREAM:
                assert tile_linear.plan(bits, *tile, integer=integer, grouped=grouped).stages >= 2
        for ranks in (2, 4, 8):
            share = whole._replace(out_features=rows // ranks)
            assert hopper_table.choices(share, gpu) == tiles
            for tokens in range(1, stream_linear.MOST_TOKENS + 1):
                x = stream_linear.read_as(tokens, share, InputKind.PER_TOKEN)
                assert stream_linear.plan(tokens, share, x, 132) == stream_linear.plan(tokens, whole, x, 132)


# --- a layer of a served model ---


class ArrangedLayer(torch.nn.Module):
    """What a backend leaves on a layer, without memory behind it."""

    def __init__(self, shape: WeightShape) -> None:
        super().__init__()
        stripes, chunks = -(-shape.out_features // STRIPE), -(-shape.in_features // CHUNK)
        q = torch.zeros(stripes, chunks, shape.chunk_bytes, dtype=torch.uint8, device="meta")
        facts = torch.zeros(stripes, 3, STRIPE, dtype=torch.int32, device="meta")
        tensors = q, facts, no_flags(q.device)
        self.lrq_q, self.lrq_facts, self.lrq_flags = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        self.lrq_weight_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return arranged_layer.arranged_linear(self, x.reshape(-1, x.shape[-1]), None).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("bits", "integer", "grouped"), [(4, False, False), *((*kind, True) for kind in GROUPED_KINDS)])
def test_a_layer_compiles_whole_and_for_any_number_of_tokens(bits: int, integer: bool, grouped: bool, corrected: bool) -> None:
    layer = ArrangedLayer(WeightShape(bits, integer, 96, 256, grouped))
    if corrected:
        v, u = (torch.zeros(32 * size, dtype=torch.bfloat16, device="meta") for size in (256, 96))
        put_factors(layer, low_rank.Factors(v.view(32, 256), u, (96,), (32,)))
    torch.compiler.reset()  # each layer counts as another compilation of the same code
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (1, 5, 300):
        assert compiled(torch.zeros(tokens, 256, dtype=torch.bfloat16, device="meta")).shape == (tokens, 96)


@pytest.mark.parametrize(
    ("module", "kind", "rotated", "exchanged", "wanted"),
    [
        ("model.layers.0.self_attn.q_proj", InputKind.STATIC, False, False, Fusion.INTEGERS_AND_TOTALS),
        ("model.layers.0.mlp.gate_proj", InputKind.STATIC, False, False, Fusion.INTEGERS_AND_TOTALS),
        ("model.layers.0.mlp.down_proj", InputKind.STATIC, False, False, Fusion.INTEGERS),
        ("model.layers.0.mlp.down_proj", InputKind.STATIC, True, False, Fusion.NOTHING),
        ("model.layers.0.mlp.down_proj", InputKind.STATIC, False, True, Fusion.NOTHING),
        ("model.layers.0.mlp.gate_proj", InputKind.STATIC, False, True, Fusion.INTEGERS_AND_TOTALS),
        ("model.layers.0.self_attn.o_proj", InputKind.STATIC, False, False, Fusion.NOTHING),
        ("model.layers.0.self_attn.q_proj", InputKind.PER_TOKEN, False, False, Fusion.NOTHING),
        ("model.layers.0.mlp.down_proj", InputKind.CLIPPED, False, False, Fusion.NOTHING),
    ],
)
def test_only_what_a_compiled_graph_makes_faster_is_quantized_there(
    module: str, kind: InputKind, rotated: bool, exchanged: bool, wanted: Fusion
) -> None:
    assert fusion_of(module, kind, rotated=rotated, exchanged=exchanged) is wanted


@pytest.mark.parametrize("fusion", Fusion)
def test_a_compiled_graph_holds_the_quantization_of_a_layer_that_fuses_it(fusion: Fusion) -> None:
    meta = torch.device("meta")
    layer = ArrangedLayer(WeightShape(8, True, 96, 256))
    layer.lrq_fusion = fusion
    grid = next(grid for grid in grids(meta, integer=True) if grid.kind is InputKind.STATIC)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=keep)
    def linear(x: Tensor) -> Tensor:
        return HopperBackend().linear(layer, x, grid, None)

    assert linear(torch.zeros(5, 256, dtype=torch.bfloat16, device=meta)).shape == (5, 96)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op in ("call_function", "call_method")]
    ours = [name.removesuffix(".default") for name in called if name.startswith("lrq.")]
    assert ours == ["lrq.arranged_linear" if fusion is Fusion.NOTHING else "lrq.arranged_product"]
    assert any("round" in name for name in called) == (fusion is not Fusion.NOTHING)
