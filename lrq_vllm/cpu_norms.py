"""On a CPU a compiled model's norms add up as they do uncompiled: by torch's own mean of squares, in an op that is left alone.

torch.compile would add the squares up in another order, and the last bit of a norm moves single activations across the border
between two integers (cpu_compilation.py).
"""

from typing import Any

import torch
from torch import Tensor
from vllm import ir

__all__ = ["offer_whole_norms", "take_whole_norms"]

_PROVIDER = "lrq"


@torch.library.custom_op("lrq::rms_norm", mutates_args=())
def _whole(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return ir.ops.rms_norm.impls["native"].impl_fn(x, weight, epsilon, variance_size)


@_whole.register_fake
def _(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lrq::fused_add_rms_norm", mutates_args=())
def _whole_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, x_residual, weight, epsilon, variance_size)


@_whole_sum.register_fake
def _(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return _whole(x, weight, epsilon, variance_size)


def _fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return _whole_sum(x, x_residual, weight, epsilon, variance_size)


_IMPLEMENTATIONS = {"rms_norm": _rms_norm, "fused_add_rms_norm": _fused_add_rms_norm}


def offer_whole_norms() -> None:
    """Make these ops known to vLLM in this process, before it decides on its norms. May be called repeatedly."""
    for name, implementation in _IMPLEMENTATIONS.items():
        operation = getattr(ir.ops, name)
        if _PROVIDER not in operation.impls:
            operation.register_impl(_PROVIDER)(implementation)


def take_whole_norms(kernel_config: Any) -> None:
    """Change vLLM's KernelConfig in place, and with it what this process computes norms by; what the user has chosen stays."""
    priority = kernel_config.ir_op_priority
    for name in _IMPLEMENTATIONS:
        if getattr(priority, name) == ["native"]:  # vLLM's default on a CPU
            getattr(priority, name)[:] = [_PROVIDER]
    priority.set_default()
