"""Whether a number of GPUs can serve a checkpoint by tensor parallelism."""

from collections.abc import Sequence

from lrq_vllm.checkpoint.schema import Manifest
from lrq_vllm.errors import SettingsError

__all__ = ["RANKS_OPTIONS", "check_ranks", "sizes_in_words"]

RANKS_OPTIONS = ("--tensor-parallel-size", "-tp")
"""Under which names vLLM's command line takes the number."""


def check_ranks(manifest: Manifest, ranks: int, *, expert_parallel: bool = False) -> None:
    """Raises SettingsError, which names the nearest sizes that can, if ``ranks`` cannot.

    expert_parallel: experts are not cut, for which alone a checkpoint may not list a size. What is cut is then left to vLLM,
    which counts heads, and to each layer (stored_checks.check_cut).
    """
    sizes = manifest.tensor_parallel_sizes
    if ranks in sizes or expert_parallel:
        return
    smaller, larger = [size for size in sizes if size < ranks], [size for size in sizes if size > ranks]
    nearest = " or ".join(map(str, (*smaller[-1:], *larger[:1])))
    raise SettingsError(
        f"{RANKS_OPTIONS[0]} {ranks} cannot serve this checkpoint: its heads, or the inputs of a layer's packed words and "
        f"groups, do not divide by it (config.json lists what does). Use {nearest}."
    )


def sizes_in_words(sizes: Sequence[int]) -> str:
    """For people: on how many GPUs a model can be served."""
    return f"{', '.join(map(str, sizes))} GPUs (tensor parallel)"
