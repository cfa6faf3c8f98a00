"""The numbers of lrq-server eval, against whole distributions and brute force."""

import math

import pytest
import torch
from torch import Tensor

from lrq_server.served_quality import Reported, compare, least_kl, most_likely, perplexity

VOCABULARY = 12


def distributions(*shape: int, spread: float = 2.0) -> Tensor:
    """Random log-probabilities float64 [*shape, VOCABULARY]."""
    return (torch.randn(*shape, VOCABULARY, dtype=torch.float64) * spread).log_softmax(-1)


def report(log_p: Tensor, text: Tensor, top: int) -> Reported:
    """As a server reports log-probabilities [windows, places, VOCABULARY] of a text [windows, places]: its tokens, the top."""
    tokens = torch.full((*text.shape, top + 1), -1)
    values = torch.full(tokens.shape, -torch.inf, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in text.shape)):
        index = tuple(place.tolist())
        said = dict.fromkeys([int(text[index]), *log_p[index].topk(top).indices.tolist()])
        tokens[index][: len(said)] = torch.tensor(list(said))
        values[index][: len(said)] = log_p[index][list(said)]
    return Reported(log_p.gather(-1, text[..., None])[..., 0], tokens, values)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("top", [1, 3, 8, VOCABULARY])
def test_no_divergence_is_smaller_than_the_least_and_with_all_tokens_it_is_exact(top: int) -> None:
    log_p, log_q = distributions(4, 50), distributions(4, 50)
    text = torch.randint(VOCABULARY, (4, 50))
    p, q = report(log_p, text, top), report(log_q, text, top)
    least, covered = least_kl(p.tokens, p.log_p, q.tokens, q.log_p)
    exact = kl(log_p, log_q)
    assert (least <= exact + 1e-9).all() and (least >= 0).all()
    if top == VOCABULARY:
        torch.testing.assert_close(least, exact, rtol=0, atol=1e-4)
        torch.testing.assert_close(covered, torch.ones_like(covered))
    else:
        # Something is seen: with the first token alone a little, with 8 of 12 nearly all.
        assert least.mean() / exact.mean() > {1: 0.1, 3: 0.4, 8: 0.8}[top] and (covered < 1).all()


# What p says of tokens 0, 1 and 2, and q of tokens 0, 3 and 4, of 7. In the second case p leaves hardly anything for 3 and 4.
@pytest.mark.parametrize(("p_known", "q_known"), [((0.3, 0.35, 0.1), (0.4, 0.2, 0.15)), ((0.3, 0.45, 0.2), (0.1, 0.45, 0.4))])
def test_the_least_divergence_is_that_of_the_nearest_distributions_with_these_reports(
    p_known: tuple[float, ...], q_known: tuple[float, ...]
) -> None:
    """Brute force: what was not reported is filled in, and moved downhill from there."""
    p_tokens, q_tokens = [0, 1, 2], [0, 3, 4]
    p_given, q_given = torch.tensor(p_known).double(), torch.tensor(q_known).double()
    least, covered = least_kl(torch.tensor(p_tokens), p_given.log(), torch.tensor(q_tokens), q_given.log())
    p_free, q_free = (torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    moving = torch.optim.Adam([p_free, q_free], lr=0.1)
    for _ in range(1500):
        p, q = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
        p[p_tokens], q[q_tokens] = p_given, q_given
        p[[3, 4, 5, 6]] = p_free.softmax(0) * (1 - p_given.sum())
        q[[1, 2, 5, 6]] = q_free.softmax(0) * (1 - q_given.sum())
        found = (p * (p / q).log()).sum()
        moving.zero_grad()
        found.backward()
        moving.step()
    assert covered == pytest.approx(p_known[0])
    assert least <= found + 1e-9
    assert least == pytest.approx(found.item(), rel=5e-3)


def test_a_model_that_expects_entirely_different_tokens_diverges() -> None:
    half = torch.tensor([0.5, 0.499999]).double().log()
    least, covered = least_kl(torch.tensor([0, 1]), half, torch.tensor([2, 3]), half)
    assert covered == 0 and least > 10


def test_equal_reports_diverge_by_nothing() -> None:
    log_p = distributions(2, 20)
    one = report(log_p, torch.randint(VOCABULARY, (2, 20)), 4)
    assert least_kl(one.tokens, one.log_p, one.tokens, one.log_p)[0].abs().max() < 1e-5


def test_of_equally_likely_tokens_the_first_id_counts() -> None:
    tokens = torch.tensor([[7, 3, 5], [4, 2, -1]])
    log_p = torch.tensor([[-1.0, -1.0, -2.0], [-0.1, -3.0, -torch.inf]])
    assert most_likely(tokens, log_p).tolist() == [3, 4]


def test_comparison_and_perplexity_are_the_formulas() -> None:
    text = torch.randint(VOCABULARY, (6, 10))
    log_p = distributions(6, 10)
    log_q = (log_p + 0.3 * torch.randn_like(log_p)).log_softmax(-1)
    model, baseline = report(log_q, text, VOCABULARY), report(log_p, text, VOCABULARY)
    nll = {name: -log.gather(-1, text[..., None]).mean().item() for name, log in (("model", log_q), ("baseline", log_p))}
    assert perplexity(model).value == pytest.approx(math.exp(nll["model"]))
    assert perplexity(model).low < perplexity(model).value < perplexity(model).high
    found = compare(model, baseline)
    assert found.recovery.value == pytest.approx(math.exp(nll["baseline"]) / math.exp(nll["model"]))
    assert found.kl_at_least.value == pytest.approx(kl(log_p, log_q).mean().item(), abs=1e-4)
    assert found.top1.value == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    # Drawn window by window from both: what they have in common cancels.
    apart = perplexity(baseline).high / perplexity(model).low - perplexity(baseline).low / perplexity(model).high
    assert 0 < found.recovery.high - found.recovery.low < apart
