"""Who multiplies tokens with the experts that they were sent to. The arithmetic is that of kernels/reference_experts.py."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lrq_vllm.expert_stack import ExpertStack, Routing
from lrq_vllm.integer_backends import LayerInput, choose_integer_backend
from lrq_vllm.kernel_choice import REFERENCE, TRITON, first_that_can, why_not_reference
from lrq_vllm.kernels import exact, reference, reference_experts
from lrq_vllm.kernels.reference import PER_TOKEN, IntegerWeight, QuantizedTokens, integer_weight, static_grid
from lrq_vllm.opaque_experts import OpaqueExperts
from lrq_vllm.weight_only_backends import PackedWeight, choose_weight_only_backend

__all__ = ["ExpertBackend", "ExpertLinear", "choose_expert_backend", "expert_candidates", "reference_linear"]


class ExpertLinear(Protocol):
    """One layer of all experts, ready to multiply."""

    def __call__(self, x: Tensor, slots_per_row: int, routing: Routing) -> Tensor:
        """y [S, out] in x's dtype: row s // slots_per_row of x [S / slots_per_row, in], times the weight of slot s's expert.

        y is 0 where no expert of this rank takes the slot.
        """


class ExpertBackend(Protocol):
    """A way to multiply. integers: whether activations are quantized to 8 bits."""

    name: str

    def why_not(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> str | None:
        """The reason why it cannot run with these weights and activations of ``dtype``, or None if it can."""

    def linear(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> ExpertLinear:
        """Bring the weights into this backend's layout."""


def choose_expert_backend(stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> ExpertBackend:
    """The first backend that can run, or the one that LRQ_KERNEL names.

    Raises SettingsError with every backend's reason if none can.
    """
    return first_that_can(expert_candidates(stack, dtype, integers=integers), stack.q.device)


def expert_candidates(stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> list[tuple[ExpertBackend, str | None]]:
    """Every backend, the best first, and the reason why it cannot run, or None if it can."""
    backends: tuple[ExpertBackend, ...] = (GroupedBackend(), OneByOneBackend(), ReferenceBackend())
    return [(backend, backend.why_not(stack, dtype, integers=integers)) for backend in backends]


def reference_linear(stack: ExpertStack, *, integers: bool) -> ExpertLinear:
    """The definition: plain torch."""
    return _composed(stack, reference.weight_only_linear, integers=integers)


class GroupedBackend:
    """Our Triton kernels, one launch for all experts: no host in between, so it goes into CUDA graphs."""

    name = TRITON

    def why_not(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> str | None:
        """Needs CUDA, and 16-bit activations."""
        if not stack.q.is_cuda:
            return "needs a CUDA device"
        return None if dtype in (torch.bfloat16, torch.float16) else f"takes 16-bit activations, not {dtype}"

    def linear(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> ExpertLinear:
        """Keeps the checkpoint's words."""
        from lrq_vllm.kernels import activation_quant, grouped_gemm

        def launch(routing: Routing) -> grouped_gemm.Launch | None:
            return grouped_gemm.SAME_FOR_ALL if routing.of_all_ranks else None

        if not integers:
            return lambda x, slots_per_row, routing: grouped_gemm.grouped_weight_only_linear(
                x, slots_per_row, stack.q, stack.step, stack.zero_point, stack.bits, routing.routes, launch=launch(routing)
            )
        return _in_integers(
            stack, activation_quant,
            lambda tokens, slots_per_row, routing, weight, dtype: grouped_gemm.grouped_integer_linear(
                tokens, slots_per_row, weight, routing.routes, dtype, launch=launch(routing)
            ),
        )  # fmt: skip


class OneByOneBackend:
    """The CPU: each expert as a linear layer of its own, on the backends of linear layers."""

    name = "one by one"

    def why_not(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> str | None:
        """Needs the CPU: the host has to know which expert got what."""
        return None if stack.q.device.type == "cpu" else "needs the CPU"

    def linear(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> ExpertLinear:
        """A prepared layer for each expert."""
        one = _integer_expert if integers else _weight_only_expert
        layers = [one(stack, expert, dtype) for expert in range(len(stack.q))]

        def linear(x: Tensor, slots_per_row: int, routing: Routing) -> Tensor:
            expert_of = routing.expert_of
            y = torch.zeros((len(expert_of), stack.step.shape[1]), dtype=x.dtype)
            for expert, layer in enumerate(layers):
                slots = (expert_of == expert).nonzero().flatten()
                if len(slots):
                    y[slots] = layer(x[slots // slots_per_row])
            return y

        return OpaqueExperts(linear, stack.step.shape[1])


class ReferenceBackend:
    """Any device: the definition itself, with sums in float64 (kernels/exact.py)."""

    name = REFERENCE

    def why_not(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> str | None:
        """Has to be asked for."""
        return why_not_reference()

    def linear(self, stack: ExpertStack, dtype: torch.dtype, *, integers: bool) -> ExpertLinear:
        """Keeps the checkpoint's words."""
        return OpaqueExperts(_composed(stack, exact.weight_only_linear, integers=integers), stack.step.shape[1])


def _composed(stack: ExpertStack, weight_only_linear: Callable[..., Tensor], *, integers: bool) -> ExpertLinear:
    """Expert by expert."""
    if not integers:
        weights = stack.q, stack.step, stack.zero_point, stack.bits
        return lambda x, slots_per_row, routing: reference_experts.experts_weight_only_linear(
            x, slots_per_row, routing.expert_of, *weights, weight_only_linear
        )
    return _in_integers(
        stack, reference,
        lambda tokens, slots_per_row, routing, weight, dtype: reference_experts.experts_integer_linear(
            tokens, slots_per_row, routing.expert_of, weight, dtype
        ),
    )  # fmt: skip


def _weight_only_expert(stack: ExpertStack, expert: int, dtype: torch.dtype) -> Any:
    packed = PackedWeight(stack.q[expert], stack.step[expert], stack.zero_point[expert], stack.bits, stack.in_features, dtype)
    backend, layer = choose_weight_only_backend(packed), torch.nn.Module()
    backend.prepare(layer, packed)
    return lambda x: backend.linear(layer, x, None)


def _integer_expert(stack: ExpertStack, expert: int, dtype: torch.dtype) -> Any:
    weight = integer_weight(stack.q[expert], stack.step[expert], stack.zero_point[expert], stack.bits, stack.in_features)
    grid = PER_TOKEN if stack.static is None else static_grid(stack.static[0][expert], stack.static[1][expert])
    given = LayerInput(stack.in_features, dtype, grid.kind)
    backend, layer = choose_integer_backend(weight, given), torch.nn.Module()
    backend.prepare(layer, weight, given)
    return lambda x: backend.linear(layer, x, grid, None)


def _in_integers(stack: ExpertStack, kernels: Any, product: Callable[..., Tensor]) -> ExpertLinear:
    """Quantize x by ``kernels``' quantize_per_token and so on, then multiply by ``product``."""
    weight, quantized = _integer_stack(stack), _quantizer(stack, kernels)

    def linear(x: Tensor, slots_per_row: int, routing: Routing) -> Tensor:
        tokens, slots_per_row = quantized(x, slots_per_row, routing)
        return product(tokens, slots_per_row, routing, weight, x.dtype)

    return linear


def _integer_stack(stack: ExpertStack) -> IntegerWeight:
    """Every expert's :class:`IntegerWeight`, one above the other."""
    parts = zip(stack.q, stack.step, stack.zero_point, strict=True)
    weights = [integer_weight(q, step, zero_point, stack.bits, stack.in_features) for q, step, zero_point in parts]
    step, zero_point, total = (
        torch.stack([getattr(weight, name) for weight in weights]) for name in ("step", "zero_point", "total")
    )
    return IntegerWeight(stack.q, step, zero_point, total, stack.bits)


def _quantizer(stack: ExpertStack, kernels: Any) -> Callable[[Tensor, int, Routing], tuple[QuantizedTokens, int]]:
    """x in 8 bits, and how many slots share one of its rows then. kernels: whose quantize_per_token and so on."""
    if stack.static is None:
        return lambda x, slots_per_row, _: (kernels.quantize_per_token(x), slots_per_row)
    step, zero_point = stack.static
    if (step == step[:1]).all() and (zero_point == zero_point[:1]).all():
        shared = step[0].clone(), zero_point[0].clone()
        return lambda x, slots_per_row, _: (kernels.quantize_static(x, *shared), slots_per_row)

    def by_expert(x: Tensor, slots_per_row: int, routing: Routing) -> tuple[QuantizedTokens, int]:
        expert = routing.expert_of.clamp(min=0)
        rows = x if slots_per_row == 1 else x.repeat_interleave(slots_per_row, dim=0)
        return kernels.quantize_rows(rows, step[expert], zero_point[expert]), 1

    return by_expert
