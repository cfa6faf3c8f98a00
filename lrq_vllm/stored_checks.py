"""What every loader of a layer checks: that a tensor is the one that the manifest implies, that all came, that a cut is whole.

vLLM checks neither that every tensor of a quantized model arrives, nor (under tensor parallelism) that it has the full
size: a wrong one can be sliced without an error.
"""

from collections.abc import Iterable

from torch import Tensor

from lrq_vllm.checkpoint.packing import values_per_group
from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import CheckpointError, one_paragraph

__all__ = ["check_arrived", "check_cut", "check_stored"]


def check_stored(manifest: Manifest, module: str, suffix: str, loaded: Tensor) -> None:
    """Raises CheckpointError if a tensor of a module has another dtype or shape than its manifest implies."""
    expected = manifest.tensors_of(module)[suffix]
    if (loaded.dtype, tuple(loaded.shape)) != (expected.dtype, expected.shape):
        raise CheckpointError(
            f"Tensor {module}.{suffix} is {loaded.dtype} {list(loaded.shape)} in the checkpoint, its config.json "
            f"implies {expected.dtype} {list(expected.shape)}. Quantize or copy the model again."
        )


def check_arrived(manifest: Manifest, modules: Iterable[str], arrived: set[str]) -> None:
    """Raises CheckpointError naming each tensor of the modules that is not among ``arrived``."""
    wanted = [f"{module}.{suffix}" for module in modules for suffix in manifest.tensors_of(module)]
    missing = [f"tensor {name} was not loaded" for name in wanted if name not in arrived]
    if missing:
        raise CheckpointError("The checkpoint is incomplete: " + one_paragraph(missing, "Quantize or copy it again."))


def check_cut(manifest: Manifest, module: str, per_partition: int, input_size: int) -> None:
    """Raises CheckpointError if a rank's share of a module's inputs cuts through packed words or groups."""
    weight = manifest.weight
    unit = weight.group_size or values_per_group(weight.bits)
    if per_partition != input_size and per_partition % unit:
        parts = input_size // per_partition
        raise CheckpointError(
            f"{module}: {input_size} inputs on {parts} GPUs give {per_partition} each, which is no multiple of "
            f"{unit} ({weight.bits}-bit weights{f', groups of {weight.group_size}' if weight.group_size else ''}). "
            "Use a smaller --tensor-parallel-size, or quantize with a scheme or group size that divides."
        )
