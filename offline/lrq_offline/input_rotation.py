"""The rotation of layers' inputs that is left to do while serving, in a block that is being quantized."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lrq_vllm.checkpoint.hadamard import OnlineHadamard, rotate
from lrq_vllm.checkpoint.schema import Manifest

__all__ = ["InputRotation"]


@dataclass(frozen=True)
class InputRotation:
    """``names``: the layers of a block, by their names in it, whose input H_B rotates."""

    names: tuple[str, ...]
    matrix: OnlineHadamard

    @classmethod
    def of(cls, manifest: Manifest, block: str) -> "InputRotation | None":
        """That of the block called ``block``; None where a checkpoint has none."""
        hadamard = manifest.online_hadamard
        if hadamard is None:
            return None
        names = [name.removeprefix(f"{block}.") for name in hadamard.modules if name.startswith(f"{block}.")]
        return cls(tuple(names), hadamard)

    def install(self, block: nn.Module) -> None:
        """Rotate what these layers of ``block`` receive, before whoever looks at it from now on."""

        def rotated(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
            return (rotate(inputs[0], self.matrix.block, self.matrix.order).to(inputs[0].dtype),)

        for name in self.names:
            block.get_submodule(name).register_forward_pre_hook(rotated)
