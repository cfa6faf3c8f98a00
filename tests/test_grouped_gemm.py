"""The products of a mixture of experts: which slots go where, and each kernel against its twin in reference_experts.py.

Without a GPU the kernels run under Triton's interpreter (tests/conftest.py). The reference is always evaluated on the CPU.
Letters as there: E experts, S slots, N outputs, K inputs, G groups.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lrq_vllm.checkpoint.packing import pack, unpack
from lrq_vllm.expert_stack import Routing
from lrq_vllm.kernels import reference
from lrq_vllm.kernels.expert_routes import Routes, expert_routes, routes_in_torch
from lrq_vllm.kernels.expert_routes_kernel import routes_in_one_launch
from lrq_vllm.kernels.grouped_gemm import SAME_FOR_ALL, Launch, grouped_integer_linear, grouped_weight_only_linear
from lrq_vllm.kernels.reference import IntegerWeight, QuantizedTokens
from lrq_vllm.kernels.reference_experts import experts_integer_linear, experts_weight_only_linear
from tests.kernel_inputs import (
    DOT_DTYPES,
    assert_close_products,
    assert_equal_products,
    random_groups,
    random_weight,
    tokens_on,
    weight_on,
)

EXPERTS = 3
ROUTINGS = {
    "spread": [0, 2, 1, 1, 2, 0, 0, 2, 1, 2, 2, 2],
    "more than a block of one expert": [1] * 18,
    "an expert without slots": [2, 0, 0, 2],
    "slots without an expert": [-1, 2, EXPERTS, 0, -1, 1],
    "nobody's": [-1, EXPERTS],
    "one slot": [2, -1],
    "no slots": [],
}
INTEGER_SHAPES = [(33, 65), (65, 128), (7, 257)]  # N and K
WEIGHT_ONLY_SHAPES = [(33, 257, 1), (65, 96, 3), (7, 192, 2)]  # N, K and G; groups of 96: no block of 64 inputs divides them


def routing(name: str) -> Tensor:
    return torch.tensor(ROUTINGS[name], dtype=torch.int32)


# --- routes ---


@st.composite
def routings(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """The expert of each slot, the number of experts, and places per block."""
    experts = draw(st.integers(1, 9))
    favourites = draw(st.lists(st.integers(-1, experts), min_size=1, max_size=experts + 2))
    return draw(st.lists(st.sampled_from(favourites), max_size=150)), experts, draw(st.sampled_from([16, 32, 64]))


def routes_of(expert_of: list[int], experts: int, block: int) -> Routes:
    return expert_routes(torch.tensor(expert_of, dtype=torch.int32), experts, block)


@given(routings())
def test_each_slot_of_an_expert_has_one_place_among_its_experts_blocks_and_others_have_none(
    case: tuple[list[int], int, int],
) -> None:
    expert_of, experts, block = case
    routes = routes_of(*case)
    assert (routes.slots.dtype, routes.experts.dtype, routes.block) == (torch.int32, torch.int32, block)
    placed: dict[int, list[int]] = {expert: [] for expert in range(experts)}
    for expert, places in zip(routes.experts.tolist(), routes.slots.view(-1, block).tolist(), strict=True):
        slots = [slot for slot in places if slot != len(expert_of)]
        assert places == slots + [len(expert_of)] * (block - len(slots))
        assert bool(slots) == (expert >= 0)
        if slots:
            assert len(placed[expert]) % block == 0  # only an expert's last block has empty places
            placed[expert] += slots
    assert placed == {expert: [slot for slot, one in enumerate(expert_of) if one == expert] for expert in range(experts)}


@given(routings())
def test_blocks_stand_in_the_order_of_their_experts_and_those_of_nobody_come_last(case: tuple[list[int], int, int]) -> None:
    experts = routes_of(*case).experts.tolist()
    assert experts == sorted(experts, key=lambda expert: (expert < 0, expert))


@given(routings())
def test_the_number_of_blocks_is_the_most_that_so_many_slots_can_need(case: tuple[list[int], int, int]) -> None:
    expert_of, experts, block = case
    # One slot for each expert, and the others fill whole blocks of the first one.
    count = len(expert_of)
    worst = routes_of([max(slot - max(count - experts, 0), 0) if slot else 0 for slot in range(count)], experts, block)
    routes = routes_of(*case)
    assert routes.experts.shape == worst.experts.shape and routes.slots.shape == (len(routes.experts) * block,)
    needed = sum(-(-expert_of.count(expert) // block) for expert in range(experts))
    assert needed <= len(routes.experts) == blocks_needed_at_most(count, experts, block)


def blocks_needed_at_most(slots: int, experts: int, block: int) -> int:
    """By trying: how many experts have a block that is not full."""
    return max((1 + (slots - begun) // block) + begun - 1 for begun in range(1, min(experts, slots) + 1)) if slots else 0


def test_routes_take_any_integers_and_look_at_no_values() -> None:
    with FakeTensorMode():  # would refuse to tell a value, as a CUDA graph does
        for dtype in (torch.int32, torch.int64):
            routes = expert_routes(torch.empty(40, dtype=dtype), 4, 16)
            assert routes.experts.shape == (6,) and routes.slots.shape == (96,)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("slots", "experts"), [(0, 3), (1, 1), (18, 3), (64, 40), (1500, 4)])
def test_the_kernel_of_routes_equals_its_twin(
    device: torch.device, slots: int, experts: int, dtype: torch.dtype, block: int
) -> None:
    expert_of = torch.randint(-1, experts + 1, (slots,), dtype=dtype)
    actual, expected = routes_in_one_launch(expert_of.to(device), experts, block), routes_in_torch(expert_of, experts, block)
    assert torch.equal(actual.slots.cpu(), expected.slots) and torch.equal(actual.experts.cpu(), expected.experts)
    assert (actual.slots.dtype, actual.experts.dtype, actual.block) == (torch.int32, torch.int32, block)


@pytest.mark.gpu
def test_a_cuda_graph_records_routes_and_products(device: torch.device) -> None:
    x, weight = torch.randn(12, 96, device=device, dtype=torch.bfloat16), stacked_groups(4, 65, 96, 3)
    on_device = [tensor.to(device) for tensor in weight]
    expert_of = torch.zeros(12, dtype=torch.int32, device=device)

    def layer() -> Tensor:
        return grouped_weight_only_linear(x, 1, *on_device, 4, expert_routes(expert_of, EXPERTS, 16))

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for name in ("spread", "more than a block of one expert"):
        expert_of.copy_(routing(name)[:12])
        graph.replay()
        assert torch.equal(y, layer())


# --- the integer product ---


def stacked_integers(bits: int, out_features: int, in_features: int, groups: int = 1) -> IntegerWeight:
    weights = [random_weight(bits, out_features, in_features, groups) for _ in range(EXPERTS)]
    return IntegerWeight(*(torch.stack(tensors) for tensors in list(zip(*weights, strict=True))[:4]), bits)


def integer_product(
    device: torch.device, x: QuantizedTokens, choices: int, weight: IntegerWeight, expert_of: Tensor, dtype: torch.dtype,
    block: int = 16, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    routes = expert_routes(expert_of.to(device), EXPERTS, block)
    return grouped_integer_linear(tokens_on(device, x), choices, weight_on(device, weight), routes, dtype, launch=launch).cpu()


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ROUTINGS)
def test_integer_kernel_equals_its_twin_for_every_routing(device: torch.device, name: str, bits: int, choices: int) -> None:
    expert_of = routing(name)
    x = reference.quantize_per_token(torch.randn(len(expert_of) // choices, 65) + 0.3)
    weight = stacked_integers(bits, 33, 65)
    actual = integer_product(device, x, choices, weight, expert_of, torch.float32)
    expected = experts_integer_linear(x, choices, expert_of, weight, torch.float32)
    assert_equal_products(actual, expected, expected)
    assert not actual[(expert_of < 0) | (expert_of >= EXPERTS)].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("out_features", "in_features"), INTEGER_SHAPES)
def test_integer_kernel_equals_its_twin_in_every_shape(
    device: torch.device, out_features: int, in_features: int, bits: int, dtype: torch.dtype
) -> None:
    x, expert_of = reference.quantize_per_token(torch.randn(4, in_features)), routing("spread")
    weight = stacked_integers(bits, out_features, in_features)
    exact = experts_integer_linear(x, 3, expert_of, weight, torch.float32)
    expected = experts_integer_linear(x, 3, expert_of, weight, dtype)
    assert_equal_products(integer_product(device, x, 3, weight, expert_of, dtype), expected, exact)


@pytest.mark.parametrize("groups", [2, 6])
def test_integer_kernel_agrees_with_its_twin_on_steps_of_groups(device: torch.device, groups: int) -> None:
    x, expert_of = reference.quantize_per_token(torch.randn(4, 192)), routing("spread")
    weight = stacked_integers(4, 33, 192, groups)
    actual = integer_product(device, x, 3, weight, expert_of, torch.float32)
    expected = experts_integer_linear(x, 3, expert_of, weight, torch.float32)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_sums_are_exact_before_they_are_scaled(device: torch.device, bits: int) -> None:
    x, expert_of, weight = (
        reference.quantize_per_token(torch.randn(12, 128)),
        routing("spread"),
        stacked_integers(bits, 33, 128),
    )
    x, weight = x._replace(step=torch.ones_like(x.step)), weight._replace(step=torch.ones_like(weight.step))
    # 128 products below 255 * 255 sum up to less than 2^23: float32 holds them.
    q = weight.q.long() if bits == 8 else torch.stack([unpack(one, 4, 128) for one in weight.q]).long()
    differences = q - weight.zero_point.long().unsqueeze(2)
    expected = torch.einsum("sk,snk->sn", x.q.long() - x.zero_point, differences[expert_of.long()])
    assert torch.equal(integer_product(device, x, 1, weight, expert_of, torch.float32).long(), expected)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("launch", [Launch(32, 64, 4, 2), Launch(128, 128, 8, 3)], ids=str)
def test_the_division_of_work_does_not_change_integer_products(device: torch.device, launch: Launch, block: int) -> None:
    x, expert_of = reference.quantize_per_token(torch.randn(18, 257)), routing("more than a block of one expert")
    weight = stacked_integers(4, 65, 257)
    actual = integer_product(device, x, 1, weight, expert_of, torch.float32, block, launch)
    assert torch.equal(actual, experts_integer_linear(x, 1, expert_of, weight, torch.float32))


def test_weights_beyond_2_to_the_31_elements_are_found(device: torch.device) -> None:
    experts, outputs, inputs = 2**22 + 2, 16, 32
    # On a CPU, memory that nobody writes or reads is none: that of all experts but the last.
    q = torch.empty(experts, outputs, inputs, dtype=torch.int8, device=device)
    step = torch.empty(experts, outputs, device=device)
    zero_point, total = torch.empty(2, experts, outputs, dtype=torch.int32, device=device)
    q[-1], step[-1], zero_point[-1], total[-1] = 3, 0.5, 0, 3 * inputs
    x = reference.quantize_per_token(torch.arange(32.0).unsqueeze(0))
    routes = routes_in_torch(torch.tensor([experts - 1], device=device), experts, 16)
    y = grouped_integer_linear(tokens_on(device, x), 1, IntegerWeight(q, step, zero_point, total, 8), routes, torch.float32)
    torch.testing.assert_close(y.cpu(), torch.full((1, outputs), 1.5 * sum(range(32))), rtol=1e-3, atol=0)


# --- the weight-only product ---


def stacked_groups(bits: int, out_features: int, in_features: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The checkpoint's tensors, stacked."""
    weights = [random_groups(bits, out_features, in_features, groups) for _ in range(EXPERTS)]
    qweight = torch.stack([pack(q, bits) for q, _, _ in weights])
    return qweight, torch.stack([step for _, step, _ in weights]), torch.stack([zero for _, _, zero in weights])


def assert_close_weight_only(
    device: torch.device, x: Tensor, choices: int, expert_of: Tensor, weight: tuple[Tensor, Tensor, Tensor], bits: int
) -> None:
    routes = expert_routes(expert_of.to(device), EXPERTS, 16)
    on_device = (tensor.to(device) for tensor in weight)
    actual = grouped_weight_only_linear(x.to(device), choices, *on_device, bits, routes).cpu()
    expected = experts_weight_only_linear(x, choices, expert_of, *weight, bits)
    sizes = [reference.dequantize_weight(*one, bits, x.shape[1]).abs() for one in zip(*weight, strict=True)]
    owned = (expert_of >= 0) & (expert_of < EXPERTS)
    size = torch.einsum("sk,snk->sn", x.repeat_interleave(choices, 0).float().abs(), torch.stack(sizes)[expert_of % EXPERTS])
    assert_close_products(actual, expected, size * owned.unsqueeze(1))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("name", ROUTINGS)
def test_weight_only_kernel_is_close_to_its_twin_for_every_routing(
    device: torch.device, name: str, choices: int, dtype: torch.dtype
) -> None:
    expert_of = routing(name)
    x = torch.randn(len(expert_of) // choices, 96).to(dtype)
    assert_close_weight_only(device, x, choices, expert_of, stacked_groups(4, 33, 96, 3), 4)


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("out_features", "in_features", "groups"), WEIGHT_ONLY_SHAPES)
def test_weight_only_kernel_is_close_to_its_twin_in_every_shape(
    device: torch.device, out_features: int, in_features: int, groups: int, bits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(4, in_features).to(dtype)
    weight = stacked_groups(bits, out_features, in_features, groups)
    assert_close_weight_only(device, x, 3, routing("spread"), weight, bits)


def test_weight_only_kernel_takes_activations_of_any_strides(device: torch.device) -> None:
    x = torch.randn(96, 24, device=device).half().t()[::2]
    weight = [tensor.to(device) for tensor in stacked_groups(4, 33, 96, 3)]
    routes = expert_routes(routing("spread").to(device), EXPERTS, 16)
    actual = grouped_weight_only_linear(x, 1, *weight, 4, routes)
    assert torch.equal(actual, grouped_weight_only_linear(x.contiguous(), 1, *weight, 4, routes))


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("launch", [Launch(32, 128, 4, 2), Launch(128, 32, 8, 3)], ids=str)
def test_the_division_of_work_hardly_changes_weight_only_products(device: torch.device, launch: Launch, block: int) -> None:
    x, weight, expert_of = torch.randn(12, 257).half(), stacked_groups(3, 65, 257, 1), routing("spread")
    on_device = [tensor.to(device) for tensor in weight]
    routes = expert_routes(expert_of.to(device), EXPERTS, block)
    actual = grouped_weight_only_linear(x.to(device), 1, *on_device, 3, routes, launch=launch).cpu()
    expected = experts_weight_only_linear(x, 1, expert_of, *weight, 3)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


# --- shares of ranks ---


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("integer", [False, True])
def test_a_rank_gives_the_bits_of_all_ranks_where_their_number_may_not_matter(
    device: torch.device, integer: bool, block: int
) -> None:
    q, step, zero_point = stacked_groups(4, 128, 256, 4)
    x, expert_of = torch.randn(12, 256).half(), routing("spread")

    def product(outputs: slice, experts: slice) -> Tensor:
        of_rank = [tensor[experts, outputs].contiguous() for tensor in (q, step, zero_point)]
        mine = expert_of - experts.start
        routes = expert_routes(mine.where(mine < len(of_rank[0]), -1).to(device), len(of_rank[0]), block)
        if not integer:
            on_device = [tensor.to(device) for tensor in of_rank]
            return grouped_weight_only_linear(x.to(device), 1, *on_device, 4, routes, launch=SAME_FOR_ALL).cpu()
        weights = [reference.integer_weight(*one, 4, 256) for one in zip(*of_rank, strict=True)]
        stacked = IntegerWeight(*(torch.stack(tensors) for tensors in list(zip(*weights, strict=True))[:4]), 4)
        tokens = tokens_on(device, reference.quantize_per_token(x))
        return grouped_integer_linear(tokens, 1, weight_on(device, stacked), routes, x.dtype, launch=SAME_FOR_ALL).cpu()

    every, all_outputs = slice(0, EXPERTS), slice(0, 128)
    whole = product(all_outputs, every)
    assert torch.equal(torch.cat([product(slice(0, 64), every), product(slice(64, 128), every)], dim=1), whole)
    assert torch.equal(product(all_outputs, slice(0, 1)) + product(all_outputs, slice(1, EXPERTS)), whole)


def test_a_rank_with_some_of_the_experts_has_blocks_as_large_as_one_that_has_all() -> None:
    expert_of = torch.arange(80) % 4
    mine = expert_of.where(expert_of < 2, -1)
    assert Routing(expert_of, 4, of_all_ranks=4).routes.block == Routing(mine, 2, of_all_ranks=4).routes.block == 32
    assert Routing(mine, 2).routes.block == 64


# --- the twins ---


def test_the_twins_are_the_dense_products_of_each_slot() -> None:
    expert_of = routing("slots without an expert")
    x, weight, stored = torch.randn(3, 96), stacked_integers(4, 5, 96), stacked_groups(3, 5, 96, 3)
    tokens = reference.quantize_per_token(x)
    y = experts_integer_linear(tokens, 2, expert_of, weight, torch.float32)
    z = experts_weight_only_linear(x, 2, expert_of, *stored, 3)
    for slot, expert in enumerate(expert_of.tolist()):
        if 0 <= expert < EXPERTS:
            one = IntegerWeight(*(tensor[expert] for tensor in weight[:4]), 4)
            token = QuantizedTokens(*(tensor[slot // 2].unsqueeze(0) for tensor in tokens))
            assert torch.equal(y[slot], reference.integer_linear(token, one, None, torch.float32)[0])
            dense = reference.weight_only_linear(x[slot // 2].unsqueeze(0), *(tensor[expert] for tensor in stored), 3, None)
            torch.testing.assert_close(z[slot], dense[0])
        else:
            assert not y[slot].any() and not z[slot].any()
