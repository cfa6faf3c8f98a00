"""The parameters of vLLM's layer of experts, and the loader that lets nothing wrong or missing slip through.

vLLM keeps the gate and up projection of all experts in one stack (w13: of each expert first the gate's rows, then up's) and
the down projections in another (w2). Under tensor parallelism a rank has some of the gate's and up's rows and down's inputs,
or down's rows (tp_invariance.py); under expert parallelism it has whole experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config

from lrq_vllm.checkpoint.packing import packed_width
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import CheckpointError
from lrq_vllm.expert_stack import ExpertStack
from lrq_vllm.stored_checks import check_arrived, check_cut, check_stored

__all__ = ["ExpertShape", "ExpertWeights"]

_NAMES = ({"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}, {name: name for name in ("w1", "w3", "w2")})


@dataclass(frozen=True)
class ExpertShape:
    """Of this rank: how many experts, their inputs and inner width, its place among the ranks that share each expert.

    by_outputs: whether they share down's outputs, not its inputs.
    """

    experts: int
    hidden: int
    inner: int
    rank: int
    ranks: int
    by_outputs: bool = False

    @property
    def down(self) -> tuple[int, int]:
        """Outputs and inputs of this rank's part of the down projection."""
        if self.by_outputs:
            return self.hidden // self.ranks, self.inner * self.ranks
        return self.hidden, self.inner


class ExpertWeights:
    """The tensors of a layer of experts while they load. ``prefix``: of the experts' modules in the checkpoint."""

    def __init__(self, manifest: Manifest, prefix: str) -> None:
        self._manifest = manifest
        self._names = _layer_names(manifest, prefix)
        self._prefix = prefix
        self._arrived: set[str] = set()
        self._here: list[str] = []
        self._down_inputs = 0
        self._nothing_will_arrive = False

    def create(self, layer: Any, shape: ExpertShape, local_index: Callable[[int], int]) -> None:
        """Register w13_qweight, w2_qweight and so on. local_index: of an expert of the model; negative if another rank has it.

        Raises CheckpointError if this rank's share of the inner width cuts through packed words or groups, or vLLM has
        widened the layer.
        """
        manifest, full_inner = self._manifest, shape.inner * shape.ranks
        expected = manifest.quantized[f"{self._prefix}.0.{self._names['w2']}"]
        if expected != (shape.hidden, full_inner):
            raise CheckpointError(
                f"{self._prefix}: vLLM builds experts of {shape.hidden} inputs and {full_inner} inside, the checkpoint's have "
                f"{expected[0]} and {expected[1]}. Serve it without the option that pads them (an all-to-all backend)."
            )
        down_rows, self._down_inputs = shape.down
        check_cut(manifest, f"{self._prefix}.0.{self._names['w2']}", self._down_inputs, full_inner)
        self._here = [name for name in manifest.quantized if self._is_expert(name) and local_index(self._expert(name)) >= 0]
        self._nothing_will_arrive = get_current_vllm_config().load_config.load_format == "dummy"
        for stack, rows, inputs in (("w13", 2 * shape.inner, shape.hidden), ("w2", down_rows, self._down_inputs)):
            part = "w1" if stack == "w13" else "w2"
            for suffix, spec in manifest.tensors_of(f"{self._prefix}.0.{self._names[part]}").items():
                if suffix.startswith("input_"):
                    size: tuple[int, ...] = (2 if stack == "w13" else 1,)
                elif suffix == "qweight":
                    size = (rows, packed_width(inputs, manifest.weight.bits))
                else:
                    size = (rows, manifest.weight.groups(inputs))
                parameter: Any = Parameter(torch.zeros((shape.experts, *size), dtype=spec.dtype), requires_grad=False)
                parameter.weight_loader = self._loader(suffix, shape, local_index)
                layer.register_parameter(f"{stack}_{suffix}", parameter)

    def take(self, layer: Any) -> tuple[ExpertStack, ExpertStack]:
        """w13 and w2 as loaded; the layer keeps nothing of them.

        Raises CheckpointError if a tensor of an expert of this rank has not been loaded (unless vLLM was told to load none).
        """
        if not self._nothing_will_arrive:
            check_arrived(self._manifest, self._here, self._arrived)
            self._arrived.clear()
        return self._stack(layer, "w13"), self._stack(layer, "w2")

    def _stack(self, layer: Any, name: str) -> ExpertStack:
        values = {}
        for suffix in ("qweight", "weight_step", "weight_zero_point", "input_step", "input_zero_point"):
            if hasattr(layer, f"{name}_{suffix}"):
                values[suffix] = getattr(layer, f"{name}_{suffix}").data
                delattr(layer, f"{name}_{suffix}")
        static = None
        if "input_step" in values:
            if self._nothing_will_arrive:  # and vLLM has put something there
                values["input_step"] = values["input_step"][:, :1].abs()
            elif any((values[part] != values[part][:, :1]).any() for part in ("input_step", "input_zero_point")):
                raise CheckpointError(
                    f"{self._prefix}: the gate and up projection of an expert read one input but carry different input_step or "
                    "input_zero_point. Quantize the model again: lrq-offline writes one value for both."
                )
            static = (values["input_step"][:, :1].clone(), values["input_zero_point"][:, :1].clone())
        hidden = self._manifest.quantized[f"{self._prefix}.0.{self._names['w1']}"][1]
        return ExpertStack(
            values["qweight"], values["weight_step"], values["weight_zero_point"], static,
            self._manifest.weight.bits, hidden if name == "w13" else self._down_inputs,
        )  # fmt: skip

    def _is_expert(self, module: str) -> bool:
        return module.startswith(f"{self._prefix}.")

    def _expert(self, module: str) -> int:
        return int(module.removeprefix(f"{self._prefix}.").partition(".")[0])

    def _loader(self, suffix: str, shape: ExpertShape, local_index: Callable[[int], int]) -> Callable[..., bool]:
        def load(
            param: Parameter, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
            return_success: bool = False,
        ) -> bool:  # fmt: skip
            local = local_index(expert_id)
            if local < 0:
                return False
            module = f"{self._prefix}.{expert_id}.{self._names[shard_id]}"
            check_stored(self._manifest, module, suffix, loaded_weight)
            place = param.data[local]
            if suffix.startswith("input_"):
                place[1 if shard_id == "w3" else 0].copy_(loaded_weight[0])
            elif shard_id == "w2" and shape.by_outputs:
                place.copy_(loaded_weight.chunk(shape.ranks)[shape.rank])
            elif shard_id == "w2":
                columns = place.shape[1]
                place.copy_(loaded_weight.narrow(1, 0 if loaded_weight.shape[1] == columns else shape.rank * columns, columns))
            else:
                half = place.narrow(0, shape.inner if shard_id == "w3" else 0, shape.inner)
                half.copy_(loaded_weight.narrow(0, shape.rank * shape.inner, shape.inner))
            self._arrived.add(f"{module}.{suffix}")
            return True

        return load


def _layer_names(manifest: Manifest, prefix: str) -> dict[str, str]:
    """vLLM's names of an expert's layers -> the checkpoint's."""
    for names in _NAMES:
        if all(f"{prefix}.0.{name}" in manifest.quantized for name in names.values()):
            return names
    raise CheckpointError(
        f"vLLM builds experts {prefix}, but the checkpoint does not list their gate, up and down projections as quantized. "
        "It was made for another architecture: quantize this model again with this version of lrq."
    )
