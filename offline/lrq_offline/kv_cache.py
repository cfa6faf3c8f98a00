"""Fake-quantized keys and values: an asymmetric step for each token and head, as a quantized KV cache would hold them."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lrq_offline.affine import fake_quantize_per_token

__all__ = ["quantize_kv_cache"]


def quantize_kv_cache(model: nn.Module, bits: int) -> None:
    """Let every attention layer of a block or a model see keys (after rotary embedding) and values rounded to ``bits``.

    The layers get a config of their own: other blocks made from the same one stay as they are.
    """
    name = f"lrq_kv{bits}"

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        k, v = (fake_quantize_per_token(x, bits, v.dtype) for x in (k, v))
        return sdpa_attention_forward(module, q.to(v.dtype), k, v, mask, **options)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    for module in model.modules():
        if hasattr(module, "config"):
            config: Any = copy.copy(module.config)
            config._attn_implementation = name
            module.config = config
