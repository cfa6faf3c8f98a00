"""Experts that are learned together: what they compute, their gradients and what is learned are those of experts apart."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lrq_offline.affine import activation_quantizer
from lrq_offline.decoder_blocks import FAMILIES
from lrq_offline.experts import Experts
from lrq_offline.learned_experts import ExpertLayers, LearnedExperts
from lrq_offline.learned_scales import FixedRounding, FlexRoundScale, LearnedRounding, LrqScale, Rounding
from lrq_offline.quantized_block import FakeQuantizedLinear, fix_weights, held_weights
from lrq_offline.stage_rounding import nearest
from lrq_offline.step_search import search_steps
from lrq_vllm.checkpoint.affine import StepAndZeroPoint
from lrq_vllm.checkpoint.schema import SCHEMES, ActivationFormat

KINDS = (LrqScale, FlexRoundScale)
ACTIVATIONS = {name: SCHEMES[name].activation for name in ("w4a16", "w8a8", "w4a8")}
LEARNED, DECIDED, IDLE = (3, 0, 1), (2,), 1  # no token meets expert IDLE
WIDTH, INNER, RANK, BITS = 16, 24, 3, 4


class Block(nn.Module):
    """Four experts, all as they are stored, beside four that are learned together and begin with the same weights."""

    def __init__(self, kind: type[LearnedRounding], activation: ActivationFormat | None, device: torch.device) -> None:
        super().__init__()
        names = FAMILIES["mixtral"].experts
        assert names is not None
        shapes = SimpleNamespace(
            down_proj=torch.empty(0, device=device), hidden_dim=WIDTH, intermediate_dim=INNER, num_experts=4, act_fn=nn.SiLU()
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        apart = Experts(shapes, names)
        self.roundings: dict[str, LearnedRounding] = {}
        order = [*LEARNED, *DECIDED]
        static = activation is not None and activation.static

        def layers(kind_of_layer: str, out_features: int, in_features: int) -> ExpertLayers:
            weights = [0.3 * torch.randn(out_features, in_features, device=device) for _ in order]
            steps = [search_steps(weight, BITS) for weight in weights]
            ranges = [
                StepAndZeroPoint(torch.tensor([0.02 + 0.01 * expert], device=device), torch.tensor([128.0], device=device))
                for expert in order
            ]
            above = torch.cat(weights[: len(LEARNED)])
            their_steps = StepAndZeroPoint(*(torch.cat(parts) for parts in zip(*steps[: len(LEARNED)], strict=True)))
            together = scale_of(kind, above, their_steps, dtype, len(LEARNED))
            decided: list[Rounding] = []
            for place, expert in enumerate(order):
                rounding: Rounding = nearest(weights[place], steps[place], BITS, dtype)
                if place < len(LEARNED):
                    rounding = self.roundings[f"{expert}.{kind_of_layer}"] = part_of(together, weights, steps, place)
                else:
                    decided.append(rounding)
                quantizer = activation_quantizer(activation, ranges[place] if static else None)
                apart[expert].set_submodule(kind_of_layer, FakeQuantizedLinear(rounding, None, quantizer))
            of_layers = [f"experts.{expert}.{kind_of_layer}" for expert in order]
            return ExpertLayers(of_layers, together, decided, activation, ranges if static else ())

        gate, up, down = layers("w1", INNER, WIDTH), layers("w3", INNER, WIDTH), layers("w2", WIDTH, INNER)
        self.experts: nn.Module = LearnedExperts(apart, order, gate, up, down)
        self.apart = (apart,)


def scale_of(
    kind: type[LearnedRounding], weight: Tensor, steps: StepAndZeroPoint, dtype: torch.dtype, weights: int
) -> LearnedRounding:
    """Somewhere on its way."""
    if kind is FlexRoundScale:
        flexible = FlexRoundScale(weight, steps, BITS, dtype)
        nn.init.normal_(flexible.matrix, std=0.05)
        return flexible
    low_rank = LrqScale(weight, steps, BITS, RANK, torch.Generator().manual_seed(0), dtype, weights=weights)
    for parameter in (low_rank.left, low_rank.row, low_rank.column):
        nn.init.normal_(parameter, std=0.05)
    return low_rank


def part_of(together: LearnedRounding, weights: list[Tensor], steps: list[StepAndZeroPoint], place: int) -> LearnedRounding:
    """The scale of one of the weights that stand above each other, as one of its own."""
    own = scale_of(type(together), weights[place], steps[place], together.dtype, 1)
    own.load_state_dict({name: tensor.chunk(len(LEARNED))[place] for name, tensor in together.state_dict().items()})
    return own


def routes(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, WIDTH], which two experts each token meets, and their shares."""
    x = torch.randn(21, WIDTH, device=device)
    others = torch.tensor([expert for expert in range(4) if expert != IDLE], device=device)
    chosen = others[torch.rand(21, 3, device=device).argsort(dim=1)[:, :2]]
    return x, chosen, torch.rand(21, 2, device=device)


@pytest.mark.parametrize("scheme", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_together_compute_and_learn_what_they_do_apart(
    kind: type[LearnedRounding], scheme: str, device: torch.device
) -> None:
    torch.manual_seed(0)
    block = Block(kind, ACTIVATIONS[scheme], device)
    (apart,), together = block.apart, block.experts
    x, chosen, shares = routes(device)
    x = x.to(next(iter(block.roundings.values())).dtype)
    upstream = torch.randn_like(x)
    results = []
    for experts in (apart, together):
        of_x = x.clone().requires_grad_()
        out = experts(of_x, chosen, shares)
        out.backward(upstream)
        results.append((out, of_x.grad))
    close = {"rtol": 0.05, "atol": 0.05} if device.type == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(results[1], results[0], **close)
    assert isinstance(together, LearnedExperts)
    for layers in together.layers:
        for name, parameter in layers.learned.named_parameters():
            assert parameter.grad is not None
            for layer, gradient in zip(layers.names, parameter.grad.chunk(len(LEARNED)), strict=False):
                expected = dict(block.roundings[layer.removeprefix("experts.")].named_parameters())[name].grad
                if expected is None:
                    assert f".{IDLE}." in layer and not gradient.any(), "an expert that no token meets"
                else:
                    torch.testing.assert_close(gradient, expected, **close, msg=lambda text, of=(layer, name): f"{of}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_held_weights_are_those_that_it_computes_with(kind: type[LearnedRounding], device: torch.device) -> None:
    torch.manual_seed(0)
    block = Block(kind, None, device)
    arguments = routes(device)
    with torch.no_grad():
        expected = block.experts(*arguments)
        with held_weights(block):
            assert torch.equal(block.experts(*arguments), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_weights_are_those_that_were_learned_in_experts_apart(kind: type[LearnedRounding], device: torch.device) -> None:
    torch.manual_seed(0)
    block = Block(kind, None, device)
    (apart,), together = block.apart, block.experts
    assert isinstance(together, LearnedExperts)
    learned = {name: weight for of in together.layers for name, weight in zip(of.names, of().detach(), strict=True)}
    fix_weights(block, together.gate.learned.dtype)
    assert block.experts is apart
    for name, weight in learned.items():
        layer = block.get_submodule(name)
        assert isinstance(layer, FakeQuantizedLinear) and isinstance(layer.rounding, FixedRounding)
        assert torch.equal(layer.rounding(), weight), name


@pytest.mark.gpu
def test_a_cuda_graph_of_them_follows_the_tokens(device: torch.device) -> None:
    torch.manual_seed(0)
    block = Block(LrqScale, ACTIVATIONS["w4a8"], device)
    assert isinstance(block.experts, LearnedExperts) and not block.experts.asks_host
    x, chosen, shares = routes(device)
    x = x.bfloat16().requires_grad_()
    parameters = [x, *block.experts.parameters()]

    def step() -> list[Tensor]:
        out = block.experts(x, chosen, shares)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), parameters)]

    def take(tokens: Tensor, experts: Tensor) -> None:
        with torch.no_grad():
            x.copy_(tokens)
            chosen.copy_(experts)

    batches = [routes(device)[:2] for _ in range(3)]
    expected = []
    for batch in batches:
        take(*batch)
        expected.append(step())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for batch, of_batch in zip(batches, expected, strict=True):
        take(*batch)
        graph.replay()
        for got, want in zip(found, of_batch, strict=True):
            assert torch.equal(got, want)
