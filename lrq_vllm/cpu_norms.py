"""On a CPU a compiled model's norms add up as they do uncompiled: by torch's own mean of squares, in an op that is left alone.

torch.compile would add the squares up in another order, and the last bit of a norm moves single activations across the border
between two integers (cpu_compilation.py).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from vllm import ir

__all__ = ["offer_whole_norms", "take_whole_norms"]

_PROVIDER = "lrq"


def _whole(name: str) -> Callable[..., Any]:
    """vLLM's own norm ``name`` as an op that torch.compile does not look into, with its signature."""
    native = getattr(ir.ops, name).impls["native"].impl_fn
    op = torch.library.custom_op(f"lrq::{name}", native, mutates_args=())
    op.register_fake(native)

    @wraps(native)
    def implementation(*inputs: Any) -> Any:
        return op(*inputs)

    return implementation


_NORMS = {name: _whole(name) for name in ("rms_norm", "fused_add_rms_norm")}


def offer_whole_norms() -> None:
    """Make these ops known to vLLM in this process, before it decides on its norms. May be called repeatedly."""
    for name, implementation in _NORMS.items():
        operation = getattr(ir.ops, name)
        if _PROVIDER not in operation.impls:
            operation.register_impl(_PROVIDER)(implementation)


def take_whole_norms(kernel_config: Any) -> None:
    """Change vLLM's KernelConfig in place, and with it what this process computes norms by; what the user has chosen stays."""
    priority = kernel_config.ir_op_priority
    unchosen = [name for name in _NORMS if getattr(priority, name) == ["native"]]  # vLLM's default on a CPU
    for name in unchosen:
        getattr(priority, name)[:] = [_PROVIDER]
    if unchosen:
        priority.set_default()
