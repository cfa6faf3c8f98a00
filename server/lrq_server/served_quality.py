"""Perplexity, recovery, KL divergence and top-1 agreement from the log-probabilities that servers report.

A server reports, at each place of a text, the token that stands there and its most likely ones: not the whole distribution. Of
two such reports the KL divergence has a least value, which :func:`least_kl` computes, and no greatest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrq_vllm.bootstrap import mean_interval

__all__ = ["Comparison", "Estimate", "Reported", "compare", "least_kl", "most_likely", "perplexity"]

# Servers compute in float32: a sum of its probabilities may be off by about this much.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reported:
    """What one server said of token windows.

    of_text: log-probabilities float64 [windows, places] of the text's own tokens. tokens: int64 [windows, places, reported],
    each id once, the text's own among them; -1 where there were fewer. log_p: float64, theirs, -inf where there is none.
    """

    of_text: Tensor
    tokens: Tensor
    log_p: Tensor


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, by bootstrap over windows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A model against its baseline on the same windows.

    recovery: the baseline's perplexity by the model's. kl_at_least: in nats, KL(baseline || model) is not smaller.
    kl_covers: the baseline's probability on tokens that both reported, on average over the places. top1: share of places where
    both have the same most likely token.
    """

    recovery: Estimate
    kl_at_least: Estimate
    kl_covers: float
    top1: Estimate


def perplexity(reported: Reported) -> Estimate:
    """exp of the mean negative log-probability of the text's tokens."""
    return _estimate(-reported.of_text.mean(dim=1), math.exp)


def compare(model: Reported, baseline: Reported) -> Comparison:
    """All that needs both; both have read the same windows."""
    kl, covered = least_kl(baseline.tokens, baseline.log_p, model.tokens, model.log_p)
    same = most_likely(model.tokens, model.log_p) == most_likely(baseline.tokens, baseline.log_p)
    return Comparison(
        # Window by window: what makes a window hard for both does not widen the interval.
        recovery=_estimate((model.of_text - baseline.of_text).mean(dim=1), math.exp),
        kl_at_least=_estimate(kl.mean(dim=1)),
        kl_covers=covered.mean().item(),
        top1=_estimate(same.double().mean(dim=1)),
    )


def least_kl(p_tokens: Tensor, log_p: Tensor, q_tokens: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The least KL(p || q) in nats of any two distributions that would be reported like this, and p's share in both reports.

    Tokens and log-probabilities as in :class:`Reported`, [..., reported]; returns float64 [...] twice.

    Tokens fall into those that both report (A), p alone (B), q alone (C), and none (R). The terms of A are known. Of the rest
    p has T = 1 - p(A), of which x on C; x is at most 1 - p(A) - p(B). q has q(C), and 1 - q(A) - q(C) on B and R together.
    Merging tokens never increases the divergence (log-sum inequality), hence at least

        sum over A of p log(p / q)  +  x log(x / q(C))  +  (T - x) log((T - x) / (1 - q(A) - q(C)))

    which is convex in x, and least where x is q's share of the rest, x = T q(C) / (1 - q(A)), or at its bound.
    It is exact once the reports hold the whole vocabulary. Merging all of B, C and R instead would call a model that ranks
    entirely different tokens first nearly perfect.
    """
    ascending, order = q_tokens.sort(dim=-1)
    place = torch.searchsorted(ascending, p_tokens.contiguous()).clamp(max=q_tokens.shape[-1] - 1)
    shared = (ascending.gather(-1, place) == p_tokens) & (p_tokens >= 0)
    log_q_there = log_q.gather(-1, order).gather(-1, place)
    p, q = log_p.exp(), log_q.exp()
    known = torch.where(shared, p * (log_p - log_q_there), 0).sum(dim=-1)
    p_shared = torch.where(shared, p, 0).sum(dim=-1)
    q_shared = torch.where(shared, log_q_there.exp(), 0).sum(dim=-1)
    p_unreported = (1 - p.sum(dim=-1)).clamp(min=0)
    # Too much rather than too little: the value stays a least one.
    q_unreported = (1 - q.sum(dim=-1)).clamp(min=0) + _ROUNDING
    p_rest = p.sum(dim=-1) - p_shared + p_unreported
    q_alone = (q.sum(dim=-1) - q_shared).clamp(min=0)
    x = torch.minimum(p_unreported, p_rest * q_alone / (q_alone + q_unreported))
    rest = _p_log_ratio(x, q_alone) + _p_log_ratio(p_rest - x, q_unreported)
    return (known + rest).clamp(min=0), p_shared


def most_likely(tokens: Tensor, log_p: Tensor) -> Tensor:
    """The most likely token [...] of [..., reported]; of equally likely ones that with the smallest id."""
    best = log_p == log_p.amax(dim=-1, keepdim=True)
    return torch.where(best, tokens, torch.iinfo(tokens.dtype).max).amin(dim=-1)


def _p_log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """p log(p / q), and 0 where p is 0."""
    return torch.xlogy(p, p) - torch.xlogy(p, q)


def _estimate(values: Tensor, of: Callable[[float], float] = float) -> Estimate:
    """``of`` the mean over windows; it must not decrease, so that it takes the interval's ends to the interval's ends."""
    low, high = mean_interval(values)
    return Estimate(of(values.mean().item()), of(low), of(high))
