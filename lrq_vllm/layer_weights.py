"""The parameters of a quantized vLLM layer, and the loader that lets nothing wrong or missing slip through.

Each parameter's loader is wrapped: it compares what comes from the file with the manifest, and remembers what has come
(stored_checks.py says why).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from lrq_vllm.checkpoint.packing import packed_width, storage_dtype
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import CheckpointError
from lrq_vllm.fused_parts import part_of
from lrq_vllm.low_rank import Pair
from lrq_vllm.low_rank_weights import LowRankWeights
from lrq_vllm.stored_checks import check_arrived, check_cut, check_stored

__all__ = ["LayerWeights"]


class LayerWeights:
    """The tensors of one layer while they load. ``modules`` are the checkpoint's modules that vLLM fused into it."""

    def __init__(self, manifest: Manifest, modules: Sequence[str]) -> None:
        self._manifest = manifest
        self._modules = list(modules)
        self._arrived: set[str] = set()
        self._nothing_will_arrive = False
        self._pairs = LowRankWeights(manifest, modules)

    def create(
        self, layer: torch.nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        weight_loader: Callable[..., None],
    ) -> None:  # fmt: skip
        """Register the weight's three tensors, what is calibrated of the input, and the low-rank pairs if there are any.

        Raises CheckpointError if this rank's share of the inputs cuts through packed words or groups.
        """
        weight, out_features = self._manifest.weight, sum(output_partition_sizes)
        check_cut(self._manifest, self._modules[0], input_size_per_partition, input_size)
        self._nothing_will_arrive = get_current_vllm_config().load_config.load_format == "dummy"
        groups = weight.groups(input_size_per_partition)

        def register(name: str, kind: type, shape: tuple[int, ...], dtype: torch.dtype, **dims: int) -> None:
            data = torch.zeros(shape, dtype=dtype)
            layer.register_parameter(name, kind(data=data, weight_loader=self._checked(name, weight_loader), **dims))

        width = packed_width(input_size_per_partition, weight.bits)
        dtype = storage_dtype(weight.bits)
        register("qweight", ModelWeightParameter, (out_features, width), dtype, input_dim=1, output_dim=0)
        for name, dtype in (("weight_step", torch.float32), ("weight_zero_point", torch.uint8)):
            if weight.group_size is None:
                register(name, ChannelQuantScaleParameter, (out_features, 1), dtype, output_dim=0)
            else:
                register(name, GroupQuantScaleParameter, (out_features, groups), dtype, input_dim=1, output_dim=0)
        parts = len(self._modules)  # vLLM may have more of them: it counts parts that the checkpoint has fused
        for name, spec in self._manifest.tensors_of(self._modules[0]).items():
            if name.startswith("input_"):
                register(name, PerTensorScaleParameter, (parts,), spec.dtype)
        self._pairs.create(layer, input_size_per_partition, output_partition_sizes, weight_loader, self._checked)

    def take(self, layer: Any) -> tuple[tuple[Tensor, Tensor, Tensor], list[Pair]]:
        """qweight, weight_step and weight_zero_point as loaded, and the low-rank pairs; the layer keeps none of them.

        Raises CheckpointError if a tensor of the layer has not been loaded (unless vLLM was told to load none).
        """
        if not self._nothing_will_arrive:
            check_arrived(self._manifest, self._modules, self._arrived)
            self._arrived.clear()  # if weights are loaded again, all have to come again
        names = ("qweight", "weight_step", "weight_zero_point")
        qweight, step, zero_point = (getattr(layer, name).data for name in names)
        for name in names:
            delattr(layer, name)
        return (qweight, step, zero_point), self._pairs.take(layer)

    def shared_value(self, parameter: Tensor, name: str) -> Tensor:
        """The one value [1] that every part of a fused layer carries.

        Raises CheckpointError if they differ, unless vLLM was told to load none: then it has put something there.
        """
        if self._nothing_will_arrive:
            return parameter[:1].abs()
        if not (parameter == parameter[0]).all():
            raise CheckpointError(
                f"{', '.join(self._modules)} read one input but carry different {name} ({parameter.tolist()}). "
                "Quantize the model again: lrq-offline writes one value for the layers that a server fuses."
            )
        return parameter[:1]

    def _checked(self, suffix: str, load: Callable[..., None]) -> Callable[..., None]:
        # "param" as in vLLM's own loaders: where weights are loaded again, it hands another one over by that name.
        def checked_load(param: Tensor, loaded: Tensor, *shard: Any, **keywords: Any) -> None:
            module = self._modules[part_of(shard, keywords)]
            check_stored(self._manifest, module, suffix, loaded)
            load(param, loaded, *shard, **keywords)
            self._arrived.add(f"{module}.{suffix}")

        return checked_load
