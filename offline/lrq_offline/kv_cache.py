"""Fake-quantized keys and values: an asymmetric step for each token and head, as a quantized KV cache would hold them."""

import copy
from typing import Any

from torch import Tensor, nn

from lrq_offline.affine import fake_quantize_per_token
from lrq_offline.attention import attend, use_attention

__all__ = ["quantize_kv_cache"]


def quantize_kv_cache(model: nn.Module, bits: int) -> None:
    """Let every attention layer of a block or a model see keys (after rotary embedding) and values rounded to ``bits``.

    The layers get a config of their own: other blocks made from the same one stay as they are.
    """

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        k, v = (fake_quantize_per_token(x, bits, v.dtype) for x in (k, v))
        return attend(module, q.to(v.dtype), k, v, mask, **options)

    for module in model.modules():
        if hasattr(module, "config"):
            config: Any = copy.copy(module.config)
            use_attention(config, f"lrq_kv{bits}", attention)
            module.config = config
