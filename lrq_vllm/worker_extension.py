"""What a server asks the processes that hold the model: vLLM adds this class's methods to its workers (--worker-extension-cls).

Answers travel between processes: they are dictionaries of plain values. Names begin with ``lrq_``: vLLM has none of those.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lrq_vllm.kernel_choice import kernels_by_layer

__all__ = ["LrqWorkerExtension"]

_SATURATION = "lrq_vllm.saturation"  # the part of the plugin that counts, where there is one


class LrqWorkerExtension:
    """Mixed into vLLM's Worker, one for each rank."""

    get_model: Any  # vLLM's

    def lrq_kernels(self) -> dict[str, str]:
        """As kernel_choice.kernels_by_layer, of this rank."""
        return kernels_by_layer(self.get_model())

    def lrq_clipped_counts(self) -> dict[str, tuple[int, int]] | None:
        """Module name -> (values clipped, values seen) when this rank quantized activations; None if nothing counts them."""
        if find_spec(_SATURATION) is None:
            return None
        counts: dict[str, tuple[int, int]] = import_module(_SATURATION).clipped_counts(self.get_model())
        return counts
