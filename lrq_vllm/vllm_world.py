"""What vLLM's layers need around them when no engine builds them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["vllm_world"]


@contextmanager
def vllm_world(config: Any, dtype: torch.dtype, rank: int = 0, size: int = 1, store: Path | None = None) -> Iterator[None]:
    """vLLM's configuration, default dtype and process groups: one rank of ``size`` tensor-parallel processes that meet at the
    file ``store``; on the CPU. Once in a process at a time.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

    before = torch.get_default_dtype()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        torch.set_default_dtype(dtype)
        try:
            method = f"file://{store or Path(folder, 'store')}"
            init_distributed_environment(size, rank, distributed_init_method=method, local_rank=rank, backend="gloo")
            initialize_model_parallel(size, 1)
            yield
        finally:  # also for a model that is refused: another one may follow in this process
            cleanup_dist_env_and_memory()
            torch.set_default_dtype(before)
