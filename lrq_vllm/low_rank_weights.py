"""The low-rank pairs of a vLLM layer while they load: U is cut where the outputs are, V where the inputs are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter

from lrq_vllm.checkpoint.correction import LOW_RANK_SUFFIXES
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.fused_parts import part_of
from lrq_vllm.low_rank import Pair
from lrq_vllm.served_rank import served_rank

__all__ = ["LowRankWeights"]

Load = Callable[..., None]
"""(parameter, tensor of the checkpoint, shard...): puts this rank's share of the tensor where it belongs."""

_U, _V = LOW_RANK_SUFFIXES


class LowRankWeights:
    """The pairs of the modules that vLLM fused into one layer: each has its own rank k, 0 if the checkpoint has none for it.

    The parts stand one below the other, in parameters as wide as the largest k: low_rank_u [out, k] and low_rank_v
    [parts * in, k].
    """

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._dtype = torch.bfloat16 if manifest.correction is None else manifest.correction.dtype
        ranks = {} if manifest.correction is None else manifest.correction.rank
        self._ranks = [ranks.get(module, 0) for module in modules]
        self._rows: list[int] = []

    def create(
        self, layer: torch.nn.Module, inputs: int, output_sizes: list[int], load: Load, checked: Callable[[str, Load], Load]
    ) -> None:
        """Register the parameters, if there are any. inputs and output_sizes: of this rank; checked: wraps a loader."""
        if not any(self._ranks):
            return
        parts, width = len(self._ranks), max(self._ranks)
        self._rows = output_sizes if len(output_sizes) == parts else [sum(output_sizes)]

        def load_u(parameter: Tensor, loaded: Tensor, *shard: Any, **keywords: Any) -> None:
            load(parameter, _widened(loaded, width), *shard, **keywords)

        def load_v(parameter: Any, loaded: Tensor, *shard: Any, **keywords: Any) -> None:
            start = 0 if len(loaded) == inputs else parameter.tp_rank * inputs
            place = parameter.data.narrow(0, part_of(shard, keywords) * inputs, inputs)
            place.copy_(_widened(loaded.narrow(0, start, inputs), width))

        u, v = (torch.zeros(rows, width, dtype=self._dtype) for rows in (sum(output_sizes), parts * inputs))
        layer.register_parameter(_U, ChannelQuantScaleParameter(data=u, weight_loader=checked(_U, load_u), output_dim=0))
        layer.register_parameter(_V, BasevLLMParameter(data=v, weight_loader=checked(_V, load_v)))

    def take(self, layer: Any) -> list[Pair]:
        """U and V of each part as loaded, as many columns as are served; none if the layer has none, and it keeps none."""
        if not any(self._ranks):
            return []
        u, v = layer.low_rank_u.data.split(self._rows), layer.low_rank_v.data.chunk(len(self._ranks))
        delattr(layer, _U)
        delattr(layer, _V)
        most = served_rank()
        if most == 0:
            return []
        ranks = [rank if most is None else min(rank, most) for rank in self._ranks]
        return [(u[part][:, :rank], v[part][:, :rank]) for part, rank in enumerate(ranks)]


def _widened(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))
