"""What costs do to rewards and advantages: truth table, bitwise identities, and exact gradients of small policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from constraint_table import constraint_table, gibbs
from enumerated_policy import Responses, every_response, random_logits, random_scores

from raylign.constraints.rectified import (
    Variant,
    combine,
    constrained_rewards,
    constrained_token_rewards,
    cost_token_rewards,
    is_unsafe,
    part_weights,
    rectified_cost,
    weighed_cost,
)
from raylign.errors import ShapeError
from raylign.losses.advantages import (
    gae,
    group_advantages,
    kl_estimates,
    rewards_at_end,
    sequence_scores,
    token_rewards,
)
from raylign.losses.logprobs import segment_sum
from raylign.losses.policy_gradient import clipped_surrogate

BETA, LAMBDA = 0.3, 1.7
KINDS = ("rectified", "split", "expected", "rectified_mean", "fixed_penalty")
VARIANTS = [*(Variant(kind=kind) for kind in KINDS), Variant(kind="split", split_normalise="none")]


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_truth_table():
    cost = f64(-1.0, 0.0, 1e-6)
    assert is_unsafe(cost).tolist() == [False, False, True]
    assert rectified_cost(cost).tolist() == [0.0, 0.0, 1e-6]
    for variant in VARIANTS:
        weighed = [0.0, 0.0, 1e-6] if variant.kind in ("rectified", "fixed_penalty") else [-1.0, 0.0, 1e-6]
        assert weighed_cost(cost, variant).tolist() == weighed
        # decided on the raw cost, whatever the bound of scores
        reward = constrained_rewards(f64(1, 1, 1), cost, multiplier=1e7, variant=variant, score_clip=1e-7)
        assert float(reward[2]) < 0 <= float(reward[1])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_table_of_variants_by_hand(variant: Variant):
    reward, cost = f64(2.0, 2.0, 2.0), f64(-3.0, 0.0, 0.5)
    penalised = [2 + 3 * LAMBDA, 2.0, 2 - 0.5 * LAMBDA]
    expected = {
        "rectified": [2.0, 2.0, penalised[2]],
        "fixed_penalty": [2.0, 2.0, penalised[2]],
        "split": [2.0, 2.0, penalised[2] / (1 + LAMBDA) if variant.is_divided else penalised[2]],
        "expected": [value / (1 + LAMBDA) for value in penalised],
        "rectified_mean": [value / (1 + LAMBDA) for value in penalised],
    }[variant.kind]
    found = constrained_rewards(reward, cost, multiplier=LAMBDA, variant=variant, score_clip=50.0)
    torch.testing.assert_close(found, f64(*expected), rtol=0, atol=1e-14)
    # reward and cost are bounded each for itself
    bounded = constrained_rewards(
        100 * reward, 100 * cost, multiplier=1.0, variant=Variant(kind="rectified"), score_clip=20
    )
    assert bounded.tolist() == [20.0, 20.0, 0.0]


def test_a_division_bounds_the_penalty_and_rectified_does_not():
    reward, cost = f64(5.0), f64(0.3)
    for variant in VARIANTS:
        found = constrained_rewards(reward, cost, multiplier=1e9, variant=variant, score_clip=50.0)
        assert float(found) == pytest.approx(-0.3 if variant.is_divided else -3e8, rel=1e-6)


@pytest.mark.parametrize("multiplier", [0.0, 0.3, 20.0, 1e6])
def test_safe_responses_are_left_alone_and_unsafe_ones_alike_to_the_bit(multiplier: float):
    generator = torch.Generator().manual_seed(0)
    reward, cost = (torch.randn(200, generator=generator) for _ in range(2))
    options = {"multiplier": multiplier, "score_clip": 1.5}
    split, rectified, expected = (Variant(kind=kind) for kind in ("split", "rectified", "expected"))
    for variant in (split, rectified):
        safe = constrained_rewards(reward, -cost.abs(), variant=variant, **options)
        assert torch.equal(safe, reward.clamp(-1.5, 1.5))
    unsafe = cost.abs() + 0.1
    assert torch.equal(
        constrained_rewards(reward, unsafe, variant=split, **options),
        constrained_rewards(reward, unsafe, variant=expected, **options),
    )
    assert multiplier == 0 or not torch.equal(
        constrained_rewards(reward, cost, variant=split, **options),
        constrained_rewards(reward, cost, variant=expected, **options),
    )


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_safe_batch_with_critics_is_plain_only_when_the_cost_critic_is_zero(value: float):
    responses = every_response()
    reward, cost = random_scores(0, responses.num), -random_scores(1, responses.num).abs()
    kl, values = random_scores(2, len(responses.token)), random_scores(3, len(responses.token))
    plain, _ = gae(
        token_rewards(rewards_at_end(reward, responses.sequence), kl, beta=BETA, score_clip=50.0),
        values,
        responses.sequence,
        gae_lambda=0.95,
    )
    advantages = {
        variant.kind: mixed_advantages(responses, reward, cost, kl, values, torch.full_like(kl, value), variant, 0.95)
        for variant in VARIANTS[:2]
    }
    assert torch.equal(advantages["split"], plain)
    assert torch.equal(advantages["rectified"], plain) == (value == 0)


def mixed_advantages(
    responses: Responses,
    reward: torch.Tensor,
    cost: torch.Tensor,
    kl: torch.Tensor,
    reward_values: torch.Tensor,
    cost_values: torch.Tensor,
    variant: Variant,
    gae_lambda: float,
) -> torch.Tensor:
    """As the trainer mixes them, (N,)."""
    sequence = responses.sequence
    per_token = token_rewards(rewards_at_end(reward, sequence), kl, beta=BETA, score_clip=50.0)
    of_reward, _ = gae(per_token, reward_values, sequence, gae_lambda=gae_lambda)
    costs = cost_token_rewards(cost, kl, sequence, beta=BETA, score_clip=50.0, variant=variant)
    of_cost, _ = gae(costs, cost_values, sequence, gae_lambda=gae_lambda)
    return combine(of_reward, of_cost, is_unsafe(cost)[sequence], multiplier=LAMBDA, variant=variant)


def surrogate_gradient(responses: Responses, logits: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Expected gradient of the surrogate at ratio 1, turned into one of ascent."""
    logits = logits.clone().requires_grad_()
    logps = responses.token_logps(logits)
    weight = responses.probabilities(logits).detach()[responses.sequence]
    (clipped_surrogate(logps, logps.detach(), advantages, clip=0.2) * weight).sum().backward()
    assert logits.grad is not None
    return -logits.grad


def expectation_gradient(responses: Responses, logits: torch.Tensor, reference: torch.Tensor, score) -> torch.Tensor:
    """Autograd of E[score] - beta KL with the expectation written out."""
    logits = logits.clone().requires_grad_()
    ((responses.probabilities(logits) * score).sum() - BETA * responses.kl(logits, reference)).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("max_length", [1, 3])  # three answers of one token, and fifteen of up to three
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_expected_gradient_with_critics(variant: Variant, max_length: int):
    """`rectified` and `expected` are exact whatever the critics say; `split` is so only without them."""
    responses = every_response(max_length)
    num_states = int(responses.state.max()) + 1
    logits, reference = random_logits(0)[:num_states], random_logits(1)[:num_states]
    reward, cost = random_scores(2, responses.num), random_scores(5, responses.num).abs()
    cost[::2] *= -1  # safe and unsafe ones
    kl, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    objective = {
        "rectified": reward - LAMBDA * cost.clamp(min=0),
        "fixed_penalty": reward - LAMBDA * cost.clamp(min=0),
        "expected": (reward - LAMBDA * cost) / (1 + LAMBDA),
        "rectified_mean": (reward - LAMBDA * cost) / (1 + LAMBDA),
        "split": torch.where(cost > 0, (reward - LAMBDA * cost) / (1 + LAMBDA if variant.is_divided else 1), reward),
    }[variant.kind]
    exact = expectation_gradient(responses, logits, reference, objective)
    for scale in (0.0, 1.0):
        values = (
            scale * random_scores(3, num_states)[responses.state],
            scale * random_scores(4, num_states)[responses.state],
        )
        found = surrogate_gradient(
            responses, logits, mixed_advantages(responses, reward, cost, kl, *values, variant, 1.0)
        )
        is_exact = variant.kind != "split" or scale == 0
        assert ((found - exact).abs().max() < 1e-10) == is_exact
        assert is_exact or (found - exact).abs().max() > 1e-2


def test_split_has_the_biased_gradient_that_theory_says():
    """A constant critic V_C adds V_C grad P(unsafe), and a divided V_R does so too."""
    responses = every_response(max_length=1)
    logits, reference = random_logits(0)[:1], random_logits(1)[:1]
    reward, cost = f64(1.0, -0.5, 2.0), f64(0.4, -1.0, 1.5)
    kl, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    value_r, value_c = 0.6, 0.9
    unsafe = (cost > 0).double()
    for normalise, divisor in (("none", 1.0), ("one_plus_multiplier", 1 + LAMBDA)):
        variant = Variant(kind="split", split_normalise=normalise)
        advantages = mixed_advantages(
            responses, reward, cost, kl, torch.full_like(kl, value_r), torch.full_like(kl, value_c), variant, 1.0
        )
        found = surrogate_gradient(responses, logits, advantages)
        score = torch.where(cost > 0, (reward - LAMBDA * cost) / divisor, reward)
        score = score + unsafe * (value_r * (1 - 1 / divisor) + LAMBDA * value_c / divisor)
        exact = expectation_gradient(responses, logits, reference, score)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    # the unsafe answer whose cost is below the critic's is made likelier by the cost term alone
    of_cost = combine(f64(0.0), f64(0.4) - value_c, torch.tensor([True]), multiplier=LAMBDA, variant=variant)
    assert of_cost > 0


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_token_pays_beta_for_its_divergence(variant: Variant):
    """Without rewards and costs the mixed advantage is that of -beta kl, for safe and unsafe responses."""
    responses = every_response()
    nothing, kl = torch.zeros(responses.num).double(), random_scores(1, len(responses.token))
    values = torch.zeros_like(kl)
    unpenalised, _ = gae(-BETA * kl, values, responses.sequence, gae_lambda=1.0)
    for tiny in (1e-13, -1e-13):  # decides safe or unsafe, and weighs nothing
        found = mixed_advantages(responses, nothing, nothing + tiny, kl, values, values, variant, 1.0)
        torch.testing.assert_close(found, unpenalised, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_leave_one_out_is_unbiased_for_every_variant(variant: Variant):
    """All 3^4 groups of three answers; with the group's own mean the gradient is (K - 1) / K of it."""
    num_samples, logits = 4, f64(0.3, -0.2, 1.0)
    reward, cost = f64(1.0, -1.0, 0.5), f64(0.4, -1.0, 1.5)
    p = torch.softmax(logits, 0)
    score = sequence_scores(
        constrained_rewards(reward, cost, multiplier=LAMBDA, variant=variant, score_clip=50.0),
        f64(0.2, -0.1, 0.05),
        torch.arange(3),
        beta=BETA,
    )
    tuples = torch.tensor(list(itertools.product(range(3), repeat=num_samples)))
    groups = torch.arange(len(tuples)).repeat_interleave(num_samples)
    advantages = group_advantages(score[tuples].reshape(-1), groups).view(tuples.shape)
    own_mean = score[tuples] - score[tuples].mean(1, keepdim=True)
    exact = p * (score - (p * score).sum())
    for found, scale in ((advantages, 1.0), (own_mean, 1 - 1 / num_samples)):
        weight = p[tuples].prod(1, keepdim=True) * found / num_samples
        gradient = torch.zeros(3).double().index_add_(0, tuples.reshape(-1), weight.reshape(-1)) - weight.sum() * p
        torch.testing.assert_close(gradient, scale * exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_expected_gradient_with_rewards_of_tokens(variant: Variant):
    """Exact for every variant, `split` among them, whose division would be forgotten by the tokens behind."""
    responses = every_response()
    logits, reference = random_logits(0), random_logits(1)
    own = random_scores(2, 21).view(7, 3)[responses.state, responses.token]  # reads no later token
    cost = random_scores(5, responses.num).abs()
    cost[::2] *= -1
    kl, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    options = {"multiplier": LAMBDA, "variant": variant, "score_clip": 50.0}
    tokens = constrained_token_rewards(own, cost, responses.sequence, **options)
    objective = constrained_rewards(segment_sum(own, responses.sequence, responses.num), cost, **options)
    torch.testing.assert_close(segment_sum(tokens, responses.sequence, responses.num), objective)
    exact = expectation_gradient(responses, logits, reference, objective)
    tokens = token_rewards(tokens, kl, beta=BETA, score_clip=50.0)
    to_go, _ = gae(tokens, torch.zeros_like(tokens), responses.sequence, gae_lambda=1.0)
    torch.testing.assert_close(surrogate_gradient(responses, logits, to_go), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_reward_at_the_end_is_constrained_as_that_of_its_response(variant: Variant):
    responses = every_response()
    reward, cost = random_scores(0, responses.num), random_scores(1, responses.num)
    options = {"multiplier": LAMBDA, "variant": variant, "score_clip": 1.0}
    found = constrained_token_rewards(rewards_at_end(reward, responses.sequence), cost, responses.sequence, **options)
    expected = rewards_at_end(constrained_rewards(reward, cost, **options), responses.sequence)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_group_estimators_on_the_table():
    """Cosine and scale against the exact gradient of R - 5 max(C, 0), over all 8^4 groups of each prompt.

    Group mean and deviation are in tests/losses/test_advantages.py.
    """
    reward, cost = (torch.from_numpy(table) for table in constraint_table())
    policy = torch.from_numpy(gibbs(reward.numpy()))
    score = constrained_rewards(
        reward.reshape(-1), cost.reshape(-1), multiplier=5.0, variant=Variant(kind="rectified"), score_clip=50.0
    ).view(reward.shape)
    exact = policy * (score - (policy * score).sum(1, keepdim=True))
    tuples = torch.tensor(list(itertools.product(range(8), repeat=4)))
    drawn, drawn_reward = score[:, tuples], reward[:, tuples]
    drawn_cost = cost.clamp(min=0)[:, tuples]
    groups = torch.arange(drawn.shape[0] * drawn.shape[1]).repeat_interleave(4)

    def standardised(values: torch.Tensor) -> torch.Tensor:
        return (values - values.mean(2, keepdim=True)) / (values.std(2, keepdim=True) + 1e-4)

    def cosine_and_scale(advantages: torch.Tensor) -> tuple[float, float]:
        weight = policy[:, tuples].prod(2, keepdim=True) * advantages / 4
        gradient = torch.zeros_like(exact)
        for prompt in range(len(exact)):
            gradient[prompt].index_add_(0, tuples.reshape(-1), weight[prompt].reshape(-1))
        gradient = gradient - weight.sum((1, 2))[:, None] * policy
        inner = float((gradient * exact).sum())
        return inner / float(gradient.norm() * exact.norm()), inner / float(exact.square().sum())

    found = {
        "leave one out": cosine_and_scale(group_advantages(drawn.reshape(-1), groups).view(drawn.shape)),
        "apart": cosine_and_scale(standardised(drawn_reward) - 5 * standardised(drawn_cost)),
    }

    assert found["leave one out"] == pytest.approx((1.0, 1.0), abs=1e-10)
    assert found["apart"][0] == pytest.approx(0.83, abs=0.02)


def test_part_weights_add_up_to_the_means_of_the_parts():
    unsafe, size = torch.tensor([True, False, False, True, False]), torch.tensor([3, 1, 4, 2, 5])
    loss = f64(1.0, 2.0, -1.0, 0.5, 3.0)  # sums of the responses' tokens
    total = (part_weights(unsafe, size) * loss).sum() / size.sum()
    torch.testing.assert_close(total, (1.0 + 0.5) / f64(5.0)[0] + (2.0 - 1.0 + 3.0) / f64(10.0)[0])
    for alone in (True, False):
        assert part_weights(torch.full((5,), alone), size).tolist() == [1.0] * 5
    assert part_weights(unsafe[:0], size[:0]).shape == (0,)


def test_nothing_carries_a_gradient_and_nothing_broadcasts():
    reward, cost, kl = (random_scores(i, 3).requires_grad_() for i in range(3))
    for variant in VARIANTS:
        assert not constrained_rewards(reward, cost, multiplier=1.0, variant=variant, score_clip=1.0).requires_grad
        assert not combine(reward, cost, is_unsafe(cost), multiplier=1.0, variant=variant).requires_grad
        costs = cost_token_rewards(cost, kl, torch.arange(3), beta=1.0, score_clip=1.0, variant=variant)
        assert not costs.requires_grad
        tokens = constrained_token_rewards(
            reward, cost, torch.arange(3), multiplier=1.0, variant=variant, score_clip=1.0
        )
        assert not tokens.requires_grad
    with pytest.raises(ShapeError, match=r"cost \(1,\)"):
        combine(reward, cost[:1], is_unsafe(cost), multiplier=1.0, variant=variant)
    with pytest.raises(ShapeError, match=r"cost \(3, 1\)"):
        constrained_rewards(reward, cost[:, None], multiplier=1.0, variant=variant, score_clip=1.0)


def test_extreme_costs_are_finite():
    cost = f64(1e30, -1e30, 0.0)
    for variant in VARIANTS:
        found = constrained_rewards(f64(1e30, -1e30, 0.0), cost, multiplier=1e6, variant=variant, score_clip=50.0)
        assert bool(np.isfinite(found.numpy()).all())
