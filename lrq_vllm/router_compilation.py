"""The numbers by which a router chooses experts stay side by side in a compiled model.

On a GPU torch.compile times a product with a number of outputs that is no multiple of 8 against one of padded outputs, and cuts
the padding off without copying. vLLM's kernel that picks the best experts takes such a row for a packed one, and tokens go to
wrong experts, in some runs and not in others (vLLM issue 56900; seen in 0.25.1 with 4 experts).
"""

from typing import Any

__all__ = ["keep_router_packed"]


def keep_router_packed(compilation_config: Any) -> None:
    """Change vLLM's CompilationConfig in place, before anything is compiled; what the user has chosen stays.

    Of the products in vLLM's graph only the router's is torch's own: the quantized layers are ops, which nothing pads.
    """
    compilation_config.inductor_compile_config.setdefault("shape_padding", False)
