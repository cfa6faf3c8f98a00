"""What a server asks the processes that hold the model: vLLM adds this class's methods to its workers (--worker-extension-cls).

Answers travel between processes: they are dictionaries of plain values. Names begin with ``lrq_``: vLLM has none of those.
"""

from typing import Any

from lrq_vllm.kernel_choice import kernels_by_layer
from lrq_vllm.saturation import clipped_counts

__all__ = ["LrqWorkerExtension"]


class LrqWorkerExtension:
    """Mixed into vLLM's Worker, one for each rank."""

    get_model: Any  # vLLM's

    def lrq_kernels(self) -> dict[str, str]:
        """As kernel_choice.kernels_by_layer, of this rank."""
        return kernels_by_layer(self.get_model())

    def lrq_clipped_counts(self) -> dict[str, tuple[int, int]]:
        """As saturation.clipped_counts, of this rank."""
        return clipped_counts(self.get_model())
