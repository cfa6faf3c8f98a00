"""The vllm command, and the environment variables under which it is started."""

import os
import shutil
import sys
from pathlib import Path

__all__ = ["serving_environment", "vllm_executable"]


def vllm_executable() -> str | None:
    """The vllm command of this Python environment, else the one on PATH; None if there is none."""
    beside_python = Path(sys.executable).with_name("vllm")
    return str(beside_python) if beside_python.exists() else shutil.which("vllm")


def serving_environment(ranks: int = 1) -> dict[str, str]:
    """This process's environment with offline defaults and, for a CPU, 1 GiB of KV cache; what is set already stays.

    ranks: tensor parallel. On a CPU "auto" wants a NUMA node for each.
    """
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "auto" if ranks == 1 else "nobind",
    }
    return defaults | dict(os.environ)
