"""How closely a server's numbers follow the reference path, for texts that the server has read and continued."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrq_offline.reference_model import load_model

__all__ = ["Agreement", "agreement_with_reference", "of_tokens", "reference_noise", "rounding_noise"]


@dataclass(frozen=True)
class Agreement:
    """Absolute differences of the prompts' log-probabilities, and the share of greedy tokens that are the reference's.

    Where a server adds up as the reference path does, most differences are next to nothing. Then the median tells it from one
    that does not, whatever a single value that was rounded the other way does to the mean.

    A greedy token is compared at its place: with the reference's most likely token, given what the server generated up to
    there. (Two greedy texts part for good at the first near-tie.)
    """

    mean_difference: float
    median_difference: float
    max_difference: float
    greedy_agreement: float


@torch.inference_mode()
def agreement_with_reference(folder: Path, prompts: Tensor, log_probabilities: Tensor, continuations: Tensor) -> Agreement:
    """Compare a bfloat16 server of the model in ``folder`` with the reference path.

    prompts: token ids [texts, tokens]; log_probabilities [texts, tokens - 1] of all but their first; continuations: the
    greedy token ids [texts, new tokens] that followed.
    """
    expected = _log_probabilities(folder, torch.cat([prompts, continuations], dim=1))
    last = prompts.shape[1] - 1
    of_prompts = of_tokens(expected[:, :last], prompts)
    difference = (log_probabilities - of_prompts).abs()
    greedy = expected[:, last:-1].argmax(-1)
    same = (continuations == greedy).float().mean().item()
    return Agreement(difference.mean().item(), difference.median().item(), difference.max().item(), same)


@torch.inference_mode()
def reference_noise(folder: Path, prompts: Tensor) -> float:
    """Mean difference of the prompts' log-probabilities by the reference path from those with its attention in float64.

    That is what the order of sums changes. No server can be expected to be nearer, unless it adds up in the reference's order.
    """
    return _moved(folder, prompts, exact_attention=True)


@torch.inference_mode()
def rounding_noise(folder: Path, prompts: Tensor) -> float:
    """Mean difference of the prompts' log-probabilities by the reference path from those without a server's roundings.

    About as far is a server whose intermediate results are rounded elsewhere, such as one on a GPU.
    """
    return _moved(folder, prompts, served_in=None)


def of_tokens(log_probabilities: Tensor, texts: Tensor) -> Tensor:
    """[texts, tokens - 1]: of all tokens of ``texts`` [texts, tokens] but the first.

    log_probabilities: [texts, tokens - 1, vocabulary], of what follows each token but the last.
    """
    return log_probabilities.gather(2, texts[:, 1:, None]).squeeze(2)


def _moved(folder: Path, prompts: Tensor, **way: Any) -> float:
    """By how much ``way`` changes the log-probabilities on average."""
    found = [of_tokens(_log_probabilities(folder, prompts, **changed)[:, :-1], prompts) for changed in ({}, way)]
    return (found[0] - found[1]).abs().mean().item()


def _log_probabilities(folder: Path, texts: Tensor, **way: Any) -> Tensor:
    """[texts, tokens, vocabulary] of a bfloat16 server, or as ``way`` has it for load_model."""
    model = load_model(folder, **{"served_in": torch.bfloat16, **way})
    return torch.stack([model(input_ids=text[None], use_cache=False).logits[0] for text in texts]).log_softmax(-1)
