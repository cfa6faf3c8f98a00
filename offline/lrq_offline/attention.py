"""Attention as transformers' blocks call it: torch's own, or plain products where scores are capped, which torch's does not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["attend", "plain_attention", "seen_by", "shared_heads", "use_attention"]


def use_attention(config: PreTrainedConfig, name: str, attention: Callable[..., Any]) -> None:
    """Let the modules that hold ``config`` call ``attention``, with boolean masks or none, under a ``name`` of its own."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    config._attn_implementation = name


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    *, scaling: float, softcap: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Of a block that is computed as it is: shapes as for :func:`plain_attention`, the output in v's dtype.

    Capped scores are computed in float32, also under autocast.
    """
    if softcap is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **options)
        return output
    with torch.autocast(q.device.type, enabled=False):
        return plain_attention(q.float(), k.float(), v.float(), mask, scaling, softcap).to(v.dtype), None


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None = None
) -> Tensor:
    """q [batch, heads, tokens, dim]; k, v [batch, key-value heads, tokens, dim]; out [batch, tokens, heads, dim].

    mask: bool [batch, 1, tokens, tokens], what a token sees; None: all tokens before it. softcap: scores s become
    softcap * tanh(s / softcap).
    """
    k, v = shared_heads(q, k, v)
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_by(q, mask), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v, with as many heads as q: each serves a group of q's."""
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def seen_by(q: Tensor, mask: Tensor | None) -> Tensor:
    """bool [..., tokens, tokens], as ``mask`` says or, without one, all tokens up to each of q's."""
    tokens = q.shape[2]
    return torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril() if mask is None else mask
