"""Mixtures of experts in every scheme: gate and up projection, activation, down projection, and the weighted sum."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError
from lrq_vllm.expert_backends import ExpertLinear, choose_expert_backend, reference_linear
from lrq_vllm.expert_stack import ExpertStack, Routing
from lrq_vllm.expert_weights import ExpertShape, ExpertWeights
from lrq_vllm.layer_self_test import check_layer
from lrq_vllm.tp_invariance import VARIABLE, counted_once, from_all_ranks, invariant, own_outputs, sum_of_all_ranks

__all__ = ["LrqExpertsMethod"]

logger = logging.getLogger(f"vllm.{__name__}")


class LrqExpertsMethod(FusedMoEMethodBase):
    """Experts whose three layers are quantized like linear ones; routing, and what joins the ranks, are vLLM's."""

    def __init__(self, manifest: Manifest, prefix: str, moe: Any) -> None:
        super().__init__(moe)
        if manifest.scheme == "w4a4" or manifest.correction is not None or manifest.online_hadamard is not None:
            raise SettingsError(
                f"{prefix}: experts have no kernel for 4-bit activations, a low-rank correction or rotated inputs. Quantize "
                "this model with another scheme than w4a4, without --correction-rank and with --no-rotate."
            )
        self._manifest = manifest
        self._name = f"{manifest.scheme} {prefix}"
        self._weights = ExpertWeights(manifest, prefix)
        self._experts = 0
        self._inner: ExpertLinear | None = None
        self._outer: ExpertLinear | None = None
        self._by_outputs = invariant() and moe.tp_size > 1
        self._invariant = self._by_outputs or (invariant() and moe.ep_size > 1)
        self._of_all_ranks = moe.num_experts if invariant() else 0

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        """Register the parameters that the loader fills. Raises SettingsError for what these experts do not do."""
        activation = getattr(layer.activation, "value", layer.activation)
        if activation != "silu" or layer.apply_router_weight_on_input:
            raise SettingsError(
                f"{self._name}: vLLM builds experts with activation {activation}, or that weigh their input; lrq serves "
                "experts that multiply silu(gate) by up and weigh what comes out. Serve the float model instead."
            )
        ranks = self.moe.tp_size
        if self._invariant and self.moe.dp_size > 1:
            raise SettingsError(f"{self._name}: {VARIABLE}=1 is for one engine, not for data-parallel ones. Unset it.")
        if self._by_outputs:
            own_outputs(hidden_size, ranks, self._name)
        shape = ExpertShape(
            num_experts, hidden_size, intermediate_size_per_partition, self.moe.tp_rank, ranks, by_outputs=self._by_outputs
        )
        self._weights.create(layer, shape, layer._map_global_expert_id_to_local_expert_id)
        layer.lrq_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that everything came, and bring the weights into the layout of the kernel that will run.

        Raises SettingsError if they are loaded again: what serves holds on to the tensors of the first time.
        """
        if self._inner is not None:
            raise SettingsError(
                f"{self._name}: weights of experts cannot be loaded again while they serve. Start a new server."
            )
        stacks, dtype = self._weights.take(layer), layer.lrq_dtype
        self._experts = len(stacks[0].q)
        integers = self._manifest.activation is not None
        backend = choose_expert_backend(stacks[0], dtype, integers=integers)
        self._inner, self._outer = (backend.linear(stack, dtype, integers=integers) for stack in stacks)
        layer.lrq_kernel = backend.name
        logger.debug("%s runs on %s", self._name, backend.name)
        for linear, stack in zip((self._inner, self._outer), stacks, strict=True):
            check_layer(
                f"{self._name} on {backend.name}", partial(self._each_in_turn, linear),
                partial(self._reference, stack), stack.q, stack.in_features, dtype,
            )  # fmt: skip

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's multiplies here."""
        return None

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [tokens, hidden] to [tokens, hidden], in x's dtype; this rank's part of the sum, which vLLM takes."""
        assert self._inner is not None and self._outer is not None
        ids = topk_ids.long() if layer.expert_map is None else layer.expert_map[topk_ids.long()].long()
        routing = Routing(ids.flatten(), self._experts, self._of_all_ranks)
        between = _silu_and_mul(self._inner(x, ids.shape[1], routing))
        if self._by_outputs:
            total = from_all_ranks(_weighed(self._outer(from_all_ranks(between), 1, routing), topk_weights))
        else:
            y = self._outer(between, 1, routing)
            total = _weighed(sum_of_all_ranks(y) if self._invariant else y, topk_weights)  # each slot is one rank's
        return counted_once(total) if self._invariant else total

    def _each_in_turn(self, linear: ExpertLinear, x: Tensor) -> Tensor:
        """Token after token goes to one expert after the other."""
        return linear(x, 1, Routing(torch.arange(len(x), device=x.device) % self._experts, self._experts))

    def _reference(self, stack: ExpertStack, x: Tensor) -> Tensor:
        return self._each_in_turn(reference_linear(stack, integers=self._manifest.activation is not None), x)


def _weighed(y: Tensor, shares: Tensor) -> Tensor:
    """[tokens, out]: the sum of each token's slots in y [tokens * choices, out], each times its share [tokens, choices]."""
    return (y.view(*shares.shape, y.shape[-1]).float() * shares.float().unsqueeze(2)).sum(dim=1).to(y.dtype)


def _silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of x [slots, 2 * width], gate first."""
    gate, up = x.chunk(2, dim=1)
    if not x.is_cuda:
        return torch.nn.functional.silu(gate) * up
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    torch.ops._C.silu_and_mul(y, x)
    return y
