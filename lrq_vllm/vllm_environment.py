"""Environment variables under which vLLM is started."""

import os

__all__ = ["serving_environment"]


def serving_environment() -> dict[str, str]:
    """This process's environment with offline defaults and, for a CPU, 1 GiB of KV cache; what is set already stays."""
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
    }
    return defaults | dict(os.environ)
