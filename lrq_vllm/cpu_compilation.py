"""On a CPU a compiled model rounds where vLLM's own operations round, as it does without compilation.

torch.compile fuses copies of vLLM's operations and keeps their intermediate results in float32. Where activations are
quantized that is not harmless: an activation that bfloat16 rounding moves across the border between two of 256 integers
moves by a whole step. Compiled so, single log-probabilities of a W8A8 model differ from the reference path's by as much as
quantization itself changes them; told to round, they are equal (tests/test_served.py).
"""

from typing import Any

from torch._inductor import config as inductor_config

__all__ = ["round_where_operations_do"]


def round_where_operations_do(compilation_config: Any) -> None:
    """Change vLLM's CompilationConfig in place, before the model's layers read it; what the user has chosen stays.

    A model that vLLM runs as transformers' own code has read its options for inductor by then: those are torch's defaults, in
    this process that runs no other model.
    """
    if compilation_config.custom_ops == ["none"]:  # vLLM's default when it compiles
        compilation_config.custom_ops[:] = ["all"]
    emulated = compilation_config.inductor_compile_config.setdefault("emulate_precision_casts", True)
    inductor_config.emulate_precision_casts = emulated
