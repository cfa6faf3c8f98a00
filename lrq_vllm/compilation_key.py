"""What tells two compiled models of one checkpoint apart.

vLLM keeps what it has compiled and finds it again by its configuration. What the environment changes in our layers it does not
know of: a model compiled with other kernels, counters or ranks would be taken for this one.
"""

import os
from typing import Any

from lrq_vllm import saturation, served_rank, tp_invariance
from lrq_vllm.kernel_choice import VARIABLE as KERNEL

__all__ = ["tell_apart"]

_VARIABLES = (KERNEL, saturation.VARIABLE, served_rank.VARIABLE, tp_invariance.VARIABLE)


def tell_apart(config: Any) -> None:
    """Write the variables into a VllmConfig, where its hash covers them. Before anything is compiled."""
    if isinstance(config.additional_config, dict):  # a platform's own kind of object would be none of ours to change
        config.additional_config["lrq"] = {name: os.environ.get(name, "") for name in _VARIABLES}
