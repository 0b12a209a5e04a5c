"""The surrogate's gradient against exact policy gradients, its clip, its reductions, and the sampler's correction."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from enumerated_policy import Responses, every_group, every_response, random_logits, random_scores

from raylign.errors import ConfigError, ShapeError
from raylign.losses.advantages import (
    gae,
    group_advantages,
    kl_estimates,
    rewards_at_end,
    sequence_scores,
    token_group_advantages,
    token_rewards,
)
from raylign.losses.logprobs import segment_sum
from raylign.losses.policy_gradient import (
    clipped_surrogate,
    importance_stats,
    importance_weights,
    is_clipped,
    reduce_loss,
    value_loss,
)

CLIP = 0.2
BETA = 0.3


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def surrogate_gradient(
    responses: Responses,
    logits: torch.Tensor,
    advantages: torch.Tensor,
    weight: torch.Tensor,
    importance_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient at rho = 1 of the surrogate, with `weight` (M,) the probability that a response is sampled."""
    logits = logits.clone().requires_grad_()
    logps = responses.token_logps(logits)
    loss = clipped_surrogate(
        logps, logps.detach(), advantages, clip=CLIP, importance_weight=importance_weight
    ) * weight.detach().index_select(0, responses.sequence)
    reduce_loss(loss, reduction="sequence_sum", num_tokens=len(loss), num_sequences=1).backward()
    return logits.grad


def objective_gradient(
    responses: Responses, logits: torch.Tensor, reference: torch.Tensor, reward: torch.Tensor, beta: float
) -> torch.Tensor:
    """Autograd of E[R] - beta KL, the expectation written out."""
    logits = logits.clone().requires_grad_()
    objective = (responses.probabilities(logits) * reward).sum() - beta * responses.kl(logits, reference)
    objective.backward()
    return logits.grad


@pytest.fixture
def problem():
    responses = every_response()
    return responses, random_logits(0), random_logits(1), random_scores(2, responses.num)


def test_the_enumerated_responses_are_all_there(problem):
    responses, logits, _, _ = problem
    assert (responses.num, len(responses.token), int(responses.state.max()) + 1) == (15, 41, 7)
    torch.testing.assert_close(responses.probabilities(logits).sum(), f64(1.0)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_mean_gradient_with_sequence_scores_is_exact(problem, baseline):
    responses, logits, reference, reward = problem
    k1, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    score = sequence_scores(reward, k1, responses.sequence, beta=BETA) - baseline
    estimate = surrogate_gradient(responses, logits, score[responses.sequence], responses.probabilities(logits))
    exact = objective_gradient(responses, logits, reference, reward, BETA)
    torch.testing.assert_close(-estimate, exact, rtol=0, atol=1e-10)
    assert exact.abs().max() > 0.05


def test_mean_gradient_with_gae_is_exact_at_lambda_one_whatever_the_values(problem):
    responses, logits, reference, reward = problem
    k1, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    rewards = token_rewards(rewards_at_end(reward, responses.sequence), k1, beta=BETA, score_clip=50.0)
    values = random_scores(3, 7)[responses.state]
    p = responses.probabilities(logits)
    exact = objective_gradient(responses, logits, reference, reward, BETA)
    unbiased, _ = gae(rewards, values, responses.sequence, gae_lambda=1.0)
    torch.testing.assert_close(-surrogate_gradient(responses, logits, unbiased, p), exact, rtol=0, atol=1e-10)
    biased, _ = gae(rewards, values, responses.sequence, gae_lambda=0.5)
    assert (surrogate_gradient(responses, logits, biased, p) + exact).abs().max() > 1e-2


def test_one_token_answers_are_the_softmax_formula():
    """Three answers: the gradient in the logits is pi (S - E S), S = R - beta log(pi / pi_0)."""
    responses = every_response(max_length=1)
    logits, reference, reward = f64(0.3, -0.2, 1.0)[None], f64(0.0, 0.5, -0.5)[None], f64(1.0, -1.0, 0.5)
    pi, pi_0 = torch.softmax(logits[0], 0), torch.softmax(reference[0], 0)
    score = reward - BETA * (pi / pi_0).log()
    estimate = surrogate_gradient(responses, logits, score, pi)
    torch.testing.assert_close(-estimate[0], pi * (score - (pi * score).sum()), rtol=0, atol=1e-12)
    torch.testing.assert_close(-estimate, objective_gradient(responses, logits, reference, reward, BETA))


def test_leave_one_out_is_unbiased_over_all_groups():
    """All 3^3 groups of three one-token answers; the group mean as baseline shrinks the gradient to 2/3."""
    responses, num_samples = every_response(max_length=1), 3
    logits, reward = f64(0.3, -0.2, 1.0)[None], f64(1.0, -1.0, 0.5)
    p = responses.probabilities(logits)
    tuples = torch.tensor(list(itertools.product(range(3), repeat=num_samples)))
    sampled = tuples.reshape(-1)
    draws = Responses(torch.zeros_like(sampled), sampled, torch.arange(len(sampled)), len(sampled))
    weight = p[tuples].prod(1).repeat_interleave(num_samples) / num_samples
    groups = torch.arange(len(tuples)).repeat_interleave(num_samples)
    exact = objective_gradient(responses, logits, logits, reward, 0.0)
    estimate = surrogate_gradient(draws, logits, group_advantages(reward[sampled], groups), weight)
    torch.testing.assert_close(-estimate, exact, rtol=0, atol=1e-12)
    own_mean = (reward[tuples] - reward[tuples].mean(1, keepdim=True)).reshape(-1)
    torch.testing.assert_close(-surrogate_gradient(draws, logits, own_mean, weight), exact * 2 / 3, rtol=0, atol=1e-12)


def pair_gradients(problem, per_token, advantages) -> torch.Tensor:
    """Gradient of every ordered pair of responses by `advantages` (N,), weighed by its probability, (P, 7, 3)."""
    responses, logits, _, _ = problem
    pairs, drawn = every_group(responses, 2)
    rewards = per_token[row_of(responses, drawn)]
    groups = torch.arange(pairs.num) // 2
    pull = torch.nn.functional.one_hot(pairs.token, 3) - torch.softmax(logits, 1)[pairs.state]  # grad log pi
    pull = pull * advantages(rewards, pairs.sequence, groups)[:, None] / 2
    index = groups[pairs.sequence] * 7 + pairs.state
    return torch.zeros(len(groups) // 2 * 7, 3).double().index_add(0, index, pull).view(-1, 7, 3)


def row_of(responses: Responses, drawn: torch.Tensor) -> torch.Tensor:
    """Places of the tokens of drawn responses, (N,)."""
    return torch.cat([torch.nonzero(responses.sequence == index)[:, 0] for index in drawn.tolist()])


def mean_and_variance(problem, per_token, advantages) -> tuple[torch.Tensor, float]:
    """Of the gradient over all pairs of independent responses; the variance added up over the logits."""
    responses, logits, _, _ = problem
    p = responses.probabilities(logits)
    weight = (p[:, None] * p).reshape(-1, 1, 1)
    gradients = pair_gradients(problem, per_token, advantages)
    mean = (weight * gradients).sum(0)
    return mean, float((weight * (gradients - mean) ** 2).sum())


def whole_response(rewards, sequence, groups):
    """Leave-one-out on the responses' sums."""
    return group_advantages(segment_sum(rewards, sequence, len(groups)), groups)[sequence]


def test_rewards_to_go_with_leave_one_out_are_unbiased_over_all_pairs(problem):
    """Rewards of tokens that read no later token, over all 225 pairs."""
    responses, logits, reference, _ = problem
    own = random_scores(7, 21).view(7, 3)[responses.state, responses.token]
    k1, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    per_token = token_rewards(own, k1, beta=BETA, score_clip=math.inf)
    total = segment_sum(own, responses.sequence, responses.num)
    exact = objective_gradient(responses, logits, reference, total, BETA)
    for advantages in (token_group_advantages, whole_response):
        found, _ = mean_and_variance(problem, per_token, advantages)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_rewards_to_go_vary_less_than_those_of_whole_responses(problem):
    """Mean over tables of rewards; a single table may say otherwise."""
    responses, _, _, _ = problem
    variances = {token_group_advantages: 0.0, whole_response: 0.0}
    for seed in range(50, 62):
        own = random_scores(seed, 21).view(7, 3)[responses.state, responses.token]
        for advantages in variances:
            variances[advantages] += mean_and_variance(problem, own, advantages)[1]
    assert variances[token_group_advantages] < 0.9 * variances[whole_response]


def test_a_reward_at_the_end_has_the_gradient_of_the_sequence_estimator(problem):
    """The same estimate for every pair without a divergence, the same mean with one, whatever the lengths."""
    responses, logits, reference, reward = problem
    at_end = rewards_at_end(reward + 3, responses.sequence)
    assert torch.equal(
        pair_gradients(problem, at_end, token_group_advantages), pair_gradients(problem, at_end, whole_response)
    )
    k1, _ = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    per_token = token_rewards(at_end, k1, beta=BETA, score_clip=math.inf)
    found, _ = mean_and_variance(problem, per_token, token_group_advantages)
    exact = objective_gradient(responses, logits, reference, reward, BETA)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_differences_of_prefix_scores_have_the_gradient_of_the_score(problem):
    """They are a potential: what they add to rewards to go depends on the state alone. Not a reward of its own."""
    responses, logits, _, reward = problem
    potential = random_scores(9, 7)  # score of each prefix, the empty one among them
    is_last = torch.cat([responses.sequence[1:] != responses.sequence[:-1], torch.tensor([True])])
    after = torch.where(is_last, reward[responses.sequence], potential[responses.state.roll(-1)])
    differences = after - potential[responses.state]
    total = segment_sum(differences, responses.sequence, responses.num)
    torch.testing.assert_close(total, reward - potential[0])
    found, _ = mean_and_variance(problem, differences, token_group_advantages)
    exact = objective_gradient(responses, logits, logits, reward, 0.0)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_rewards_that_read_later_tokens_have_another_gradient(problem):
    """Shares of a response's reward, as attention gives them: the sum is the reward, its gradient is not."""
    responses, logits, _, reward = problem
    lengths = torch.bincount(responses.sequence)
    shares = (reward / lengths)[responses.sequence]
    exact = objective_gradient(responses, logits, logits, reward, 0.0)
    torch.testing.assert_close(segment_sum(shares, responses.sequence, responses.num), reward)
    of_sums, _ = mean_and_variance(problem, shares, whole_response)
    torch.testing.assert_close(of_sums, exact, rtol=0, atol=1e-10)
    to_go, _ = mean_and_variance(problem, shares, token_group_advantages)
    assert (to_go - exact).abs().max() > 0.02


def test_clip_closed_form_and_region_without_gradient():
    ratio = f64(0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0)
    for advantage in (2.0, -2.0):
        logps = ratio.log().requires_grad_()
        loss = clipped_surrogate(logps, torch.zeros_like(ratio), torch.full_like(ratio, advantage), clip=CLIP)
        closed = [-min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in ratio.tolist()]
        torch.testing.assert_close(loss, f64(*closed))
        loss.sum().backward()
        outside = ratio > 1.2 if advantage > 0 else ratio < 0.8
        torch.testing.assert_close(logps.grad, torch.where(outside, 0, -ratio * advantage))
        clipped = is_clipped(logps, torch.zeros_like(ratio), torch.full_like(ratio, advantage), clip=CLIP)
        assert clipped.tolist() == outside.tolist()


def test_surrogate_gradient_is_right():
    logps_old, advantages = random_scores(0, 6), f64(1, -1, 2, -2, 0.5, -0.5)
    logps = (logps_old + f64(0.1, -0.1, 0.4, 0.4, -0.4, -0.4)).requires_grad_()
    weight = f64(1.0, 0.5, 2.0, 1.0, 1.0, 0.0)

    def loss(x):
        return clipped_surrogate(x, logps_old, advantages, clip=CLIP, importance_weight=weight)

    assert torch.autograd.gradcheck(loss, (logps,))


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_logps_have_finite_loss_and_gradient(advantage):
    logps = torch.tensor([-1e6, 0.0, -1e6, 0.0, -90.0], requires_grad=True)
    logps_old = torch.tensor([0.0, -1e6, -1e6, 0.0, -1.0])
    loss = clipped_surrogate(logps, logps_old, torch.full((5,), advantage), clip=CLIP)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad.isfinite().all()


def test_only_the_policy_gets_a_gradient():
    logps, logps_old, advantages, weight = (random_scores(i, 4).requires_grad_() for i in range(4))
    clipped_surrogate(logps, logps_old, advantages, clip=CLIP, importance_weight=weight).sum().backward()
    assert logps.grad is not None
    assert (logps_old.grad, advantages.grad, weight.grad) == (None, None, None)
    values, values_old, returns = (random_scores(i, 4).requires_grad_() for i in range(3))
    value_loss(values, values_old, returns, value_clip=0.5).sum().backward()
    assert values.grad is not None
    assert (values_old.grad, returns.grad) == (None, None)


def test_value_loss_closed_form_and_clip_region():
    """A value beyond the clip counts at the clip where that is worse, and then has no gradient."""
    values = f64(0.3, 1.5, 1.5, -1.5, -1.5, 1.5).requires_grad_()
    returns = f64(1.0, 2.0, 0.0, -2.0, 0.0, 1.25)
    loss = value_loss(values, torch.zeros(6, dtype=torch.float64), returns, value_clip=1.0)
    # Held at +-1: nearer to the return than V only in the 3rd and 5th, equally far in the last.
    torch.testing.assert_close(loss, 0.5 * f64(0.7**2, 1.0, 1.5**2, 1.0, 1.5**2, 0.25**2))
    loss.sum().backward()
    torch.testing.assert_close(values.grad, f64(-0.7, 0, 1.5, 0, -1.5, 0.125))
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, torch.zeros_like(v), returns, value_clip=1.0)[:5], (values.detach().requires_grad_(),)
    )


def test_infinite_cap_makes_one_token_responses_unbiased():
    """E_q[w A grad log pi] is the gradient under pi; without the weight it is another, with a cap below max(w) too."""
    responses = every_response(max_length=1)
    logits, sampler_logits, reward = f64(0.3, -0.2, 1.0)[None], f64(1.0, 0.5, -0.8)[None], f64(1.0, -1.0, 0.5)
    q = responses.probabilities(sampler_logits)
    exact = objective_gradient(responses, logits, logits, reward, 0.0)

    def estimate(weight):
        return -surrogate_gradient(responses, logits, reward, q, weight)

    def weights(cap):
        return importance_weights(responses.token_logps(logits), responses.token_logps(sampler_logits), cap=cap)

    assert weights(math.inf).max() > 2
    torch.testing.assert_close(estimate(weights(math.inf)), exact, rtol=0, atol=1e-12)
    assert (estimate(None) - exact).abs().max() > 0.1
    assert (estimate(weights(1.5)) - exact).abs().max() > 0.05


def test_longer_responses_need_the_product_and_tokens_leave_an_error_of_the_sampler_s_size(problem):
    responses, logits, _, reward = problem
    exact = objective_gradient(responses, logits, logits, reward, 0.0)
    logps, advantages = responses.token_logps(logits), reward[responses.sequence]

    def error(scale: float, per_token: bool) -> float:
        sampler_logits = logits + random_logits(5, scale=scale)
        sampler_logps = responses.token_logps(sampler_logits)
        weight = importance_weights(logps, sampler_logps, cap=math.inf)
        if not per_token:
            weight = segment_sum(weight.log(), responses.sequence, responses.num).exp()[responses.sequence]
        q = responses.probabilities(sampler_logits)
        return float((surrogate_gradient(responses, logits, advantages, q, weight) + exact).norm() / exact.norm())

    assert error(0.1, per_token=False) < 1e-12
    assert 1e-3 < error(0.1, per_token=True) < 0.2
    assert error(0.01, per_token=True) == pytest.approx(error(0.1, per_token=True) / 10, rel=0.2)


def test_weights_are_one_where_the_sampler_agrees():
    logps = random_scores(0, 5) - 3
    weight = importance_weights(logps, logps.clone(), cap=2.0)
    assert weight.tolist() == [1.0] * 5
    args = (logps, logps, random_scores(1, 5))
    with_weight = clipped_surrogate(*args, clip=CLIP, importance_weight=weight)
    assert torch.equal(with_weight, clipped_surrogate(*args, clip=CLIP))
    extreme = importance_weights(torch.tensor([0.0, -1e6]), torch.tensor([-1e6, 0.0]), cap=2.0)
    assert extreme.tolist() == [2.0, 0.0]


def test_stats_by_hand_and_added_up():
    logps_old, sampler_logps = f64(0.5, 1.0, 0.25, 3.0).log(), f64(1.0, 0.5, 0.25, 1.0).log()
    whole = importance_stats(logps_old, sampler_logps, cap=2.5).summary()
    w = [0.5, 2.0, 1.0, 2.5]  # the last cut from 3
    log2, log3 = math.log(2), math.log(3)
    expected = {
        "weight_mean": 1.5,
        "truncated_share": 0.25,
        "difference_mean": (2 * log2 + log3) / 4,
        "difference_max": log3,
        "kl": ((0.5 - 1 + log2) + (2 - 1 - log2) + (3 - 1 - log3)) / 4,
        "effective_share": 36.0 / (4 * sum(x * x for x in w)),
    }
    assert whole == pytest.approx(expected)
    none = importance_stats(logps_old[:0], sampler_logps[:0], cap=2.5)
    parts = [importance_stats(logps_old[s], sampler_logps[s], cap=2.5) for s in (slice(0, 3), slice(3, 4))]
    assert (parts[0] + none + parts[1]).summary() == pytest.approx(expected)
    assert none.summary() == {**dict.fromkeys(expected, 0.0), "effective_share": 1.0}


def test_stats_estimate_the_divergence_from_sampler_to_trainer(problem):
    responses, logits, sampler_logits, _ = problem
    p, q = (responses.token_logps(x) for x in (logits, sampler_logits))
    weight = responses.probabilities(sampler_logits)[responses.sequence]
    total = sum(
        w * float(importance_stats(p[t : t + 1], q[t : t + 1], cap=2.0).kl_sum) for t, w in enumerate(weight.tolist())
    )
    assert total == pytest.approx(float(responses.kl(sampler_logits, logits)), abs=1e-10)


LENGTHS = [3, 1, 5, 2]


def batch_gradient(parts: list[torch.Tensor], reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the batch cut into parts, each a list of token numbers."""
    num = sum(LENGTHS)
    logps_old, advantages = random_scores(0, num), random_scores(1, num)
    logps = (logps_old + 0.3 * random_scores(2, num)).requires_grad_()
    weight = importance_weights(logps_old, logps_old + 0.2 * random_scores(3, num), cap=1.1)
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        loss = clipped_surrogate(
            logps[part], logps_old[part], advantages[part], clip=CLIP, importance_weight=weight[part]
        )
        share = reduce_loss(loss, reduction=reduction, num_tokens=num, num_sequences=len(LENGTHS))
        share.backward()
        total += share.detach()
    return total, logps.grad


@pytest.mark.parametrize("reduction", ["token_global", "sequence_sum"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("cuts", [[], [4], [3, 4, 9], [1, 2, 7], [0, 11, 11]], ids=str)
def test_any_order_and_any_cut_into_micro_batches_adds_up(reduction, order, cuts):
    """Cuts fall between responses, inside of them, and beside empty parts."""
    tokens = torch.arange(sum(LENGTHS)).split(LENGTHS)
    permuted = torch.cat([tokens[i] for i in order])
    parts = list(torch.tensor_split(permuted, cuts))
    loss, gradient = batch_gradient(parts, reduction)
    whole_loss, whole_gradient = batch_gradient([torch.arange(sum(LENGTHS))], reduction)
    torch.testing.assert_close(loss, whole_loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, whole_gradient, rtol=0, atol=1e-14)


def test_reductions_by_hand():
    loss = f64(1.0, 2.0, 3.0)
    assert float(reduce_loss(loss, reduction="token_global", num_tokens=12, num_sequences=4)) == 0.5
    assert float(reduce_loss(loss, reduction="sequence_sum", num_tokens=12, num_sequences=4)) == 1.5


@pytest.mark.parametrize("zero", ["weight", "advantage"])
def test_an_added_response_of_zero_weight_changes_nothing(zero):
    """Even one whose probability exploded."""
    logps_old, advantages = random_scores(0, 5), random_scores(1, 5)
    weight = torch.ones(8, dtype=torch.float64)
    more_old, more_advantages = torch.cat([logps_old, f64(-1e6, 0, -3)]), torch.cat([advantages, f64(9, -9, -9)])
    (weight if zero == "weight" else more_advantages)[5:] = 0
    logps = (logps_old + 0.1).requires_grad_()
    more = torch.cat([logps_old + 0.1, f64(0, -1e6, -1)]).requires_grad_()
    alone = clipped_surrogate(logps, logps_old, advantages, clip=CLIP).sum()
    both = clipped_surrogate(more, more_old, more_advantages, clip=CLIP, importance_weight=weight).sum()
    alone.backward()
    both.backward()
    assert torch.equal(both, alone)
    assert torch.equal(more.grad, torch.cat([logps.grad, torch.zeros(3, dtype=torch.float64)]))


def test_empty_part_has_a_zero_loss_and_a_gradient():
    logps = torch.zeros(0, requires_grad=True)
    none = torch.zeros(0)
    loss = clipped_surrogate(logps, none, none, clip=CLIP, importance_weight=importance_weights(none, none, cap=2.0))
    reduce_loss(loss, reduction="token_global", num_tokens=7, num_sequences=2).backward()
    assert logps.grad.shape == (0,)
    assert value_loss(none, none, none, value_clip=1.0).shape == (0,)


def test_misuse_is_refused():
    a, b = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ShapeError, match=r"advantages \(1,\)"):
        clipped_surrogate(a, a, b, clip=CLIP)
    with pytest.raises(ShapeError, match=r"importance_weight \(1,\)"):
        clipped_surrogate(a, a, a, clip=CLIP, importance_weight=b)
    with pytest.raises(ShapeError, match=r"sampler_logps \(1,\)"):
        importance_weights(a, b, cap=2.0)
    with pytest.raises(ShapeError, match=r"returns \(1,\)"):
        value_loss(a, a, b, value_clip=1.0)
    with pytest.raises(ShapeError, match="divides by 0"):
        reduce_loss(a, reduction="token_global", num_tokens=0, num_sequences=1)
    with pytest.raises(ConfigError, match=r"policy_gradient\.reduction"):
        reduce_loss(a, reduction="mean", num_tokens=3, num_sequences=1)
