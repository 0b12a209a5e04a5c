"""The objective of AVA: a slow oracle, its stationary points, and the losses that it contains."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from raylign.errors import ShapeError
from raylign.losses.ava import AvaCounts, AvaShares, ava_shares, ava_sums
from raylign.losses.reward import bradley_terry

SEQUENCE = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])  # two pairs: lengths 3 and 1 against 2 and 4
COUNTS = AvaCounts(chosen_tokens=4, rejected_tokens=6, num_responses=2)
FORMS = {
    "discount": 0.9,
    "terminal": "zero",
    "likelihood_weight": 0.8,
    "negative": "unlikelihood",
    "cer": "log_sigmoid",
}
WEIGHTS = {"irl_weight": 0.7, "td_weight": 0.5, "cer_weight": 1.3}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values (log-probabilities), means and deviations of ten tokens."""
    parts = -noise(10).abs() - 0.1, noise(10, seed=1), noise(10, seed=2).abs() + 0.3
    return tuple(part.requires_grad_() for part in parts)


def shares(q, mu, sigma, sequence=SEQUENCE, counts=COUNTS, num_chosen=2, has_rejected=True, **changed) -> AvaShares:
    """The objective with FORMS and WEIGHTS, but for what is changed."""
    forms = FORMS | {key: value for key, value in changed.items() if key not in WEIGHTS}
    weights = WEIGHTS | {key: value for key, value in changed.items() if key in WEIGHTS}
    sums = ava_sums(q, mu, sigma, sequence, num_chosen, has_rejected=has_rejected, **forms)
    return ava_shares(sums, counts, terminal=forms["terminal"], **weights)


def values(part: AvaShares) -> dict[str, float]:
    return {field.name: getattr(part, field.name).item() for field in dataclasses.fields(part)}


def oracle(q, mu, sigma, *, terminal: str, negative: str, cer: str, td_std: float) -> dict[str, float]:
    """The objective of two pairs token by token, in floats."""
    tokens = {"chosen": [], "rejected": []}
    ends = []
    for response in range(4):
        own = [i for i in range(10) if SEQUENCE[i] == response]
        ends.append(mu[own[-1]].item())
        for place, i in enumerate(own):
            is_last = place == len(own) - 1
            following = 0.0 if is_last else q[i + 1].item()
            delta = (q[i].item() - FORMS["discount"] * following) / td_std
            m, s = mu[i].item(), sigma[i].item()
            tokens["chosen" if response < 2 else "rejected"].append(
                {
                    "q": q[i].item(),
                    "kl": 0.5 * (s**2 + m**2 - 1 - math.log(s**2)),
                    "td": None
                    if is_last and terminal == "drop"
                    else -((delta - m) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi),
                }
            )

    def mean(kind: str, term: str) -> float:
        found = [token[term] for token in tokens[kind] if token[term] is not None]
        return sum(found) / len(found)

    negatives = {
        "unlikelihood": [math.log(1 - math.exp(token["q"])) for token in tokens["rejected"]],
        "raw": [-FORMS["likelihood_weight"] * token["q"] for token in tokens["rejected"]],
        "none": [0.0],
    }[negative]
    contrasts = [1 / (1 + math.exp(ends[2 + pair] - ends[pair])) for pair in range(2)]
    if cer == "log_sigmoid":
        contrasts = [math.log(value) for value in contrasts]
    irl_weight = WEIGHTS["irl_weight"]
    return {
        "likelihood": FORMS["likelihood_weight"] * mean("chosen", "q"),
        "negative": sum(negatives) / len(negatives),
        "kl": -irl_weight * (mean("chosen", "kl") + mean("rejected", "kl")),
        "td": irl_weight * WEIGHTS["td_weight"] * (mean("chosen", "td") + mean("rejected", "td")),
        "cer": WEIGHTS["cer_weight"] * sum(contrasts) / 2,
    }


@pytest.mark.parametrize("terminal", ["zero", "drop"])
@pytest.mark.parametrize(
    ("negative", "cer"), [("unlikelihood", "log_sigmoid"), ("raw", "sigmoid"), ("none", "log_sigmoid")]
)
def test_terms_of_two_pairs_are_those_of_the_slow_oracle(terminal, negative, cer):
    forms = {"terminal": terminal, "negative": negative, "cer": cer, "td_std": 1.7}
    part = shares(*inputs(), **forms)
    assert values(part) == pytest.approx(oracle(*inputs(), **forms), abs=1e-12)
    assert part.loss.item() == pytest.approx(-sum(values(part).values()), abs=1e-12)


def test_gradient_is_right():
    assert torch.autograd.gradcheck(lambda *parts: shares(*parts).loss, inputs())


@pytest.mark.parametrize("terminal", ["zero", "drop"])
def test_shares_of_micro_batches_add_up_to_the_batch(terminal):
    """Pairs apart, in another order, with an empty part: sums and gradients are those of the batch."""
    q, mu, sigma = whole = inputs()
    expected = torch.autograd.grad(shares(*whole, terminal=terminal).loss, whole)
    parts = [torch.tensor([3, 6, 7, 8, 9]), torch.tensor([0, 1, 2, 4, 5]), torch.tensor([], dtype=torch.int64)]
    loss = 0.0
    for rows in parts:
        sequence, num_chosen = (SEQUENCE[rows] >= 2).long(), int(len(rows) > 0)
        loss = loss + shares(q[rows], mu[rows], sigma[rows], sequence, num_chosen=num_chosen, terminal=terminal).loss
    assert loss.item() == pytest.approx(shares(*whole, terminal=terminal).loss.item(), abs=1e-12)
    for actual, wanted in zip(torch.autograd.grad(loss, whole), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_sums_of_pairs_are_those_of_batches_of_one_pair():
    q, mu, sigma = inputs()
    per_pair = shares(q, mu, sigma, per_pair=True).loss
    for pair, rows in enumerate([torch.tensor([0, 1, 2, 4, 5]), torch.tensor([3, 6, 7, 8, 9])]):
        alone = shares(q[rows], mu[rows], sigma[rows], (SEQUENCE[rows] >= 2).long(), num_chosen=1).loss
        assert per_pair[pair].item() == pytest.approx(alone.item(), abs=1e-12)


def test_order_of_the_responses_does_not_matter():
    q, mu, sigma = inputs()
    rows = torch.tensor([6, 7, 8, 9, 3, 4, 5, 0, 1, 2])
    moved = shares(q[rows], mu[rows], sigma[rows], SEQUENCE[rows])
    assert values(moved) == pytest.approx(values(shares(q, mu, sigma)), abs=1e-12)


def token_table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits over five tokens at ten places, the tokens there, and their log-probabilities."""
    logits = noise(10, 5, seed=5).requires_grad_()
    labels = torch.arange(10) % 5
    return logits, labels, logits.log_softmax(-1)[torch.arange(10), labels]


def test_without_inverse_rl_demonstrations_are_supervised_fine_tuning():
    logits, labels, q = token_table()
    _, mu, sigma = inputs()
    counts = AvaCounts(chosen_tokens=10, rejected_tokens=0, num_responses=4)
    part = shares(q, mu, sigma, counts=counts, num_chosen=4, has_rejected=False, likelihood_weight=1.0, irl_weight=0.0)
    (actual,) = torch.autograd.grad(part.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert part.cer.item() == part.negative.item() == 0


def test_preferences_without_their_terms_are_supervised_fine_tuning_on_chosen():
    logits, labels, q = token_table()
    _, mu, sigma = inputs()
    part = shares(q, mu, sigma, negative="none", likelihood_weight=1.0, irl_weight=0.0, cer_weight=0.0)
    (actual,) = torch.autograd.grad(part.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits[:4], labels[:4]), logits)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_contrastive_term_alone_is_bradley_terry_on_last_rewards():
    q, mu, sigma = inputs()
    part = shares(q, mu, sigma, negative="none", likelihood_weight=0.0, irl_weight=0.0, cer_weight=1.0)
    plain = bradley_terry(mu[[2, 3]] - mu[[5, 9]]).mean()
    assert part.loss.item() == pytest.approx(plain.item(), abs=1e-15)
    torch.testing.assert_close(torch.autograd.grad(part.loss, mu), torch.autograd.grad(plain, mu), rtol=0, atol=1e-15)


def test_the_td_term_reaches_the_policy_unless_told_not_to():
    q, mu, sigma = inputs()
    for detach_q in (False, True):
        part = shares(q, mu, sigma, detach_q=detach_q, td_std=2.0)
        (slope,) = torch.autograd.grad(part.td, q, allow_unused=True)
        assert (slope is None) == detach_q
    part = shares(q, mu, sigma, likelihood_weight=1.0, negative="none", detach_q=True)
    chosen = (SEQUENCE < 2).double() / 4
    torch.testing.assert_close(torch.autograd.grad(-part.loss, q)[0], chosen, rtol=0, atol=1e-12)


def test_a_head_of_its_own_gives_the_value_and_the_policy_the_likelihood():
    logprob, mu, sigma = inputs()
    q = (3 * noise(10, seed=9)).requires_grad_()
    part, own = shares(q, mu, sigma, logprob_N=logprob), shares(logprob, mu, sigma)
    assert part.likelihood.item() == own.likelihood.item() and part.negative.item() == own.negative.item()
    assert part.td.item() == shares(q, mu, sigma, negative="none").td.item()
    assert torch.autograd.grad(part.likelihood, q, allow_unused=True) == (None,)


def test_counts_that_are_no_batch_are_named():
    part = ava_sums(*inputs(), SEQUENCE, 2, has_rejected=True, **FORMS)
    for counts in (
        AvaCounts(chosen_tokens=4, rejected_tokens=6, num_responses=0),
        AvaCounts(chosen_tokens=1, rejected_tokens=6, num_responses=2),
        AvaCounts(chosen_tokens=4, rejected_tokens=1, num_responses=2),
    ):
        with pytest.raises(ShapeError, match="counts of the whole batch"):
            ava_shares(part, counts, terminal="zero", **WEIGHTS)
    with pytest.raises(ShapeError, match="sigma"):
        ava_sums(noise(10), noise(10), noise(9), SEQUENCE, 2, has_rejected=True, **FORMS)
