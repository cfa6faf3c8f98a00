"""A float model's folder that reads as if the model had been rotated: same interface, tensor by tensor."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lrq_offline.decoder_blocks import HEAD
from lrq_offline.rotation import Rotation
from lrq_offline.source_model import SourceModel, model_config
from lrq_vllm.checkpoint.schema import TensorSpec

__all__ = ["RotatedSource"]


@dataclass(frozen=True)
class RotatedSource(SourceModel):
    """tied: whether the model ties its output head to the embedding. The rotated one does not: the head's share of the final
    norm's gains differs.
    """

    rotation: Rotation
    tied: bool

    @classmethod
    def of(cls, source: SourceModel, rotation: Rotation) -> "RotatedSource":
        """``source`` rotated."""
        own = {field.name: getattr(source, field.name) for field in fields(SourceModel)}
        own["raw_config"] = source.raw_config | {"tie_word_embeddings": False}
        own["config"] = model_config(own["raw_config"], source.folder)
        return cls(**own, rotation=rotation, tied=bool(source.config.tie_word_embeddings))

    def names(self) -> list[str]:
        """With an output head of its own."""
        names = super().names()
        return names if f"{HEAD}.weight" in names else [*names, f"{HEAD}.weight"]

    def spec_of(self, name: str) -> TensorSpec:
        """As stored; an untied head is like the embedding."""
        return super().spec_of(self._stored_name(name))

    def read(self, name: str) -> Tensor:
        """One tensor, rotated: float32 if it is going to be quantized, else in the dtype in which it is stored."""
        stored = super().read(self._stored_name(name))
        module, _, parameter = name.rpartition(".")
        if not module.startswith(f"{self.family.blocks}."):
            return self._outside(module, stored).to(stored.dtype)
        index, _, inner = module.removeprefix(f"{self.family.blocks}.").partition(".")
        block = f"{self.family.blocks}.{index}"
        if parameter == "bias" or inner not in self.family.linears:
            return self._beside(inner, stored).to(stored.dtype)
        return self._weight(block, inner, stored.float())

    def _stored_name(self, name: str) -> str:
        return f"{self.family.embedding}.weight" if self.tied and name == f"{HEAD}.weight" else name

    def _outside(self, module: str, stored: Tensor) -> Tensor:
        family = self.family
        if module == family.embedding:
            return self.rotation.reads_stream(stored)
        if module == family.final_norm:
            return self._no_gain(stored)
        if module == HEAD:
            return self.rotation.reads_stream(stored, self._gain(family.final_norm))
        return stored

    def _beside(self, inner: str, stored: Tensor) -> Tensor:
        """Norms and biases of a block."""
        family = self.family
        if inner in [reader for reader, _ in family.residual]:
            return self._no_gain(stored)
        if inner in family.cut_along_inputs:
            return self.rotation.writes_stream(stored)
        return self._values(stored) if inner == self._values_from else stored

    def _weight(self, block: str, inner: str, weight: Tensor) -> Tensor:
        family, rotation = self.family, self.rotation
        producer = next(p for group, p in zip(family.linear_groups, family.producers, strict=True) if inner in group)
        if inner not in family.cut_along_inputs:
            weight = rotation.reads_stream(weight, self._gain(f"{block}.{producer}"))
            return self._values(weight) if inner == self._values_from else weight
        read = rotation.head if inner == family.attention_output else rotation.inner
        return rotation.writes_stream(read.rows(weight))

    @property
    def _values_from(self) -> str:
        """The layer whose last outputs are the values."""
        groups = zip(self.family.linear_groups, self.family.producers, strict=True)
        return str(next(producer for group, producer in groups if self.family.attention_output in group))

    def _values(self, stored: Tensor) -> Tensor:
        """The rows, or the bias, of a layer that puts out values last, and perhaps queries and keys before them."""
        heads = self.config.num_attention_heads
        count = (getattr(self.config, "num_key_value_heads", None) or heads) * self.rotation.head.block
        before, values = stored.float().split([len(stored) - count, count])
        return torch.cat([before, self.rotation.head.columns(values)])

    def _gain(self, norm: str) -> Tensor:
        return super().read(f"{norm}.weight").float() + self.family.gain_offset

    def _no_gain(self, stored: Tensor) -> Tensor:
        return torch.full_like(stored, 1 - self.family.gain_offset)
