"""Under Ray, the plugin's environment variables reach every worker of vLLM.

A worker has the environment of ``ray start`` on its machine, and of the server's what vLLM copies. Its newer executor copies
all; its older one and data-parallel engines (``--data-parallel-backend ray``) copy variables whose names begin as vLLM's own
do, and leave ``LRQ_CORRECTION_RANK`` or ``LRQ_KERNEL`` behind without a word.
"""

import os

__all__ = ["copy_variables_to_workers"]

_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # comma-separated, besides vLLM's own


def copy_variables_to_workers() -> None:
    """Let vLLM copy all variables that begin with ``LRQ_``; what a worker's machine sets itself still wins there."""
    prefixes = [prefix for prefix in os.environ.get(_PREFIXES, "").split(",") if prefix]
    if "LRQ_" not in prefixes:
        os.environ[_PREFIXES] = ",".join([*prefixes, "LRQ_"])
