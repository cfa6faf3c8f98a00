"""Where and in which precision blocks are computed."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrq_vllm.errors import SettingsError

__all__ = ["Machine", "block_output", "choose_device", "device_name", "product_dtype", "products_in", "served_in"]


@dataclass(frozen=True)
class Machine:
    """Where a run computes: device ``auto``, ``cpu`` or ``cuda``; the memory of a GPU that cached hidden states may take.

    max_gpu_gb: None for half of what the GPU has free. gpus: how many to use, each by a process of its own (with device
    ``cpu``: processes). Raises SettingsError for an amount that is none.
    """

    device: str = "auto"
    max_gpu_gb: float | None = None
    gpus: int = 1

    def __post_init__(self) -> None:
        if self.max_gpu_gb is not None and not 0 <= self.max_gpu_gb < 1e6:
            raise SettingsError(
                f"max-gpu-gb is {self.max_gpu_gb}, which is no amount of memory. Give gigabytes, or leave it out."
            )

    def cache_bytes(self, device: torch.device) -> int:
        """The room for hidden states on ``device``, one of this machine's."""
        if self.max_gpu_gb is not None:
            return int(self.max_gpu_gb * 1e9)
        return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises SettingsError for a GPU that is not there."""
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise SettingsError(
            "There is no CUDA device that torch can use. Choose --device cpu, or install a CUDA build of torch."
        )
    device = torch.device("cuda" if present and name != "cpu" else "cpu")
    if device.type == "cuda":
        # The same bytes from the same seed: cuBLAS reads this at its first use, attention's backward asks torch.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def device_name(device: torch.device) -> str:
    """The processor's own name: results are the same bytes only on the same type of machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads"


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32. Quantizers compute in float32 throughout; a weight
    whose scales renew has 16 bits in between, if they are enough (learned_scales.py).
    """
    native = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def served_in(config: PreTrainedConfig) -> torch.dtype:
    """The 16-bit dtype in which a server runs a model: its own, or bfloat16 for a float32 model."""
    return torch.float16 if config.dtype == torch.float16 else torch.bfloat16


def block_output(block: nn.Module, x: Tensor, arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What ``block`` puts out for hidden states x [batch, seq_len, width], with its matrix products in ``dtype``."""
    with products_in(dtype, x.device):
        output: Tensor = block(x.float(), **arguments)
    return output


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Matrix products and attention in ``dtype``; everything else as its inputs are."""
    # Without autocast's cache: it would keep weights alive, and CUDA graphs must not capture it.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)
