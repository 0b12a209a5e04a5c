"""Advantages against slow sums, exact expectations over an enumerated policy, and the tabular instance of RePO."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from enumerated_policy import every_response, random_logits, random_scores

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

RAGGED = torch.tensor([2, 2, 2, 0, 1, 1, 1, 1, 1, 3, 3])


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def brute_force_leave_one_out(rewards, sequence, group):
    """Rewards to go less those of the other responses at that position; behind the end their last reward."""
    to_go = {}
    for name in range(len(group)):
        own = rewards[sequence == name]
        to_go[name] = [float(own[t:].sum()) for t in range(len(own))]
    advantages, seen = [], dict.fromkeys(to_go, 0)
    for name in sequence.tolist():
        t = seen[name]
        seen[name] += 1
        others = [j for j in range(len(group)) if group[j] == group[name] and j != name]
        baseline = [to_go[j][min(t, len(to_go[j]) - 1)] for j in others]
        advantages.append(to_go[name][t] - sum(baseline) / len(baseline) if baseline else 0.0)
    return f64(*advantages)


def brute_force_gae(rewards, values, sequence, gae_lambda, discount):
    advantages = torch.zeros_like(values)
    for t in range(len(values)):
        same = [u for u in range(t, len(values)) if sequence[u] == sequence[t]]
        for u in same:
            following = values[u + 1] if u + 1 in same else 0.0
            delta = rewards[u] + discount * following - values[u]
            advantages[t] += (discount * gae_lambda) ** (u - t) * delta
    return advantages


def test_both_estimates_have_the_exact_divergence_as_their_mean():
    responses, logits, reference = every_response(), random_logits(0), random_logits(1)
    k1, k3 = kl_estimates(responses.token_logps(logits), responses.token_logps(reference))
    p = responses.probabilities(logits)
    exact = responses.kl(logits, reference)
    assert exact > 0.1
    for estimate in (k1, k3):
        mean = (p * segment_sum(estimate, responses.sequence, responses.num)).sum()
        torch.testing.assert_close(mean, exact, rtol=0, atol=1e-12)
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


def test_k3_keeps_its_digits_when_the_two_nearly_agree():
    k1, k3 = kl_estimates(f64(-2.0), f64(-2.0 - 1e-7))
    torch.testing.assert_close(k3, 0.5 * k1**2, rtol=1e-6, atol=0)


def test_sequence_scores_by_hand():
    kl = f64(0.1, 0.2, 0.3, 1.0, 0, 0, 0, 0, 0.5, 2.0, 2.0)
    scores = sequence_scores(f64(1.0, -2.0, 80.0, 0.0), kl, RAGGED, beta=0.5, score_clip=50.0)
    torch.testing.assert_close(scores, f64(1.0 - 0.5, -2.0 - 0.25, 50.0 - 0.3, -2.0))


def test_token_rewards_by_hand():
    at_end = rewards_at_end(f64(1.0, -2.0, 80.0, 0.5), RAGGED)
    torch.testing.assert_close(at_end, f64(0, 0, 80.0, 1.0, 0, 0, 0, 0, -2.0, 0, 0.5))
    kl = f64(0.1, -0.2, 0.3, 1.0, 0, 0, 0, 0, 0.5, 200.0, 2.0)
    expected = f64(-0.05, 0.1, 50.0, 0.5, 0, 0, 0, 0, -2.25, -50.0, -0.5)
    torch.testing.assert_close(token_rewards(at_end, kl, beta=0.5, score_clip=50.0), expected)


def test_unclipped_token_rewards_add_up_to_the_sequence_score():
    reward, kl = random_scores(0, 4), random_scores(1, 11)
    tokens = token_rewards(rewards_at_end(reward, RAGGED), kl, beta=0.3, score_clip=math.inf)
    torch.testing.assert_close(segment_sum(tokens, RAGGED, 4), sequence_scores(reward, kl, RAGGED, beta=0.3))


@pytest.mark.parametrize("sequence", [[0, 0, 2, 2], [0, 0, 1, 1], [0, 1, 0, 2]], ids=["empty", "short", "gap"])
def test_a_reward_without_its_own_last_token_is_refused(sequence):
    with pytest.raises(ShapeError, match=r"every response needs a token|one after another"):
        rewards_at_end(f64(1, 2, 3), torch.tensor(sequence))


def test_leave_one_out_by_hand_with_groups_of_any_size_and_order():
    score = f64(1.0, 10.0, 2.0, 7.0, 6.0)
    group = torch.tensor([4, -1, 4, 9, 4])
    expected = f64(1.0 - 4.0, 0.0, 2.0 - 3.5, 0.0, 6.0 - 1.5)
    torch.testing.assert_close(group_advantages(score, group), expected)
    std = math.sqrt((2**2 + 1**2 + 3**2) / 2)  # scores 1, 2, 6 have mean 3
    torch.testing.assert_close(group_advantages(score, group, scale="std"), expected / (std + 1e-4))


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_scores_give_exactly_no_advantage(scale):
    score, group = torch.tensor([0.1, 0.1, 0.1, 1e6 + 0.1, 1e6 + 0.1]), torch.tensor([0, 0, 0, 1, 1])
    assert group_advantages(score, group, scale=scale).tolist() == [0.0] * 5


@pytest.mark.parametrize("scale", ["none", "std"])
def test_advantages_ignore_a_constant_and_follow_their_responses(scale):
    score, group = random_scores(0, 9), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    advantage = group_advantages(score, group, scale=scale)
    torch.testing.assert_close(group_advantages(score + 100 * group, group, scale=scale), advantage)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(score[order], group[order], scale=scale), advantage[order])


def test_token_advantages_by_hand():
    """Responses 1 + 2 + 3 and 10 of one prompt, -5 of another: 10 counts at every position of the first."""
    rewards, sequence = f64(1.0, 2.0, 3.0, 10.0, -5.0), torch.tensor([0, 0, 0, 1, 2])
    found = token_group_advantages(rewards, sequence, torch.tensor([8, 8, 3]))
    torch.testing.assert_close(found, f64(6.0 - 10, 5.0 - 10, 3.0 - 10, 10.0 - 6, 0.0))
    scaled = token_group_advantages(rewards, sequence, torch.tensor([8, 8, 3]), scale="std")
    std = math.sqrt(2 * 2**2) + 1e-4  # of the sums 6 and 10, n - 1 = 1 in the denominator
    torch.testing.assert_close(scaled, f64(-4.0, -5.0, -7.0, 4.0, 0.0) / std)


@pytest.mark.parametrize("group", [[0, 0, 0, 0], [7, -1, 7, -1], [5, 5, 5, 2]], ids=str)
def test_token_advantages_equal_the_slow_sum(group):
    rewards, group = random_scores(0, 11), torch.tensor(group)
    found = token_group_advantages(rewards, RAGGED, group)
    torch.testing.assert_close(found, brute_force_leave_one_out(rewards, RAGGED, group), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", ["none", "std"])
def test_a_reward_at_the_end_gives_every_token_the_advantage_of_its_response(scale):
    reward, group = random_scores(0, 4), torch.tensor([0, 0, 1, 0])
    found = token_group_advantages(rewards_at_end(reward, RAGGED), RAGGED, group, scale=scale)
    assert torch.equal(found, group_advantages(reward, group, scale=scale)[RAGGED])


def test_penalised_scores_enter_from_outside():
    """S = R - lambda P is a score like any other; the advantage is linear in it."""
    reward, penalty, group = random_scores(0, 8), random_scores(1, 8).clamp(min=0), torch.arange(8) // 4
    joint = group_advantages(reward - 5 * penalty, group)
    torch.testing.assert_close(joint, group_advantages(reward, group) - 5 * group_advantages(penalty, group))


@pytest.mark.parametrize(("gae_lambda", "discount"), [(0.95, 1.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.9), (1.0, 0.0)])
def test_gae_equals_the_brute_force_sum(gae_lambda, discount):
    rewards, values = random_scores(0, 11), random_scores(1, 11)
    advantages, returns = gae(rewards, values, RAGGED, gae_lambda=gae_lambda, discount=discount)
    expected = brute_force_gae(rewards, values, RAGGED.tolist(), gae_lambda, discount)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, expected + values, rtol=0, atol=1e-12)


def test_gae_at_its_ends():
    rewards, values = random_scores(0, 11), random_scores(1, 11)
    to_go = f64(*(sum(r for r, s in zip(rewards[t:], RAGGED[t:], strict=True) if s == RAGGED[t]) for t in range(11)))
    torch.testing.assert_close(gae(rewards, values, RAGGED, gae_lambda=1.0)[0], to_go - values)
    following = f64(values[1], values[2], 0, 0, *values[5:9], 0, values[10], 0)
    torch.testing.assert_close(gae(rewards, values, RAGGED, gae_lambda=0.0)[0], rewards + following - values)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 1000, 1025])
def test_gae_reaches_over_long_responses(length):
    """A reward at the end of a response reaches every token with its decay, at and beside powers of two."""
    rewards = torch.cat([torch.zeros(length - 1, dtype=torch.float64), f64(1.0), f64(7.0)])
    sequence = torch.tensor([0] * length + [1])
    advantages, _ = gae(rewards, torch.zeros_like(rewards), sequence, gae_lambda=0.99)
    expected = f64(*(0.99 ** (length - 1 - t) for t in range(length)), 7.0)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=0)


def test_gae_of_a_response_does_not_depend_on_the_others():
    rewards, values = random_scores(0, 11), random_scores(1, 11)
    together = gae(rewards, values, RAGGED, gae_lambda=0.9)
    for response in RAGGED.unique():
        mine = response == RAGGED
        alone = gae(rewards[mine], values[mine], RAGGED[mine], gae_lambda=0.9)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[mine], part)
    with pytest.raises(ShapeError, match="one after another"):
        gae(rewards, values, torch.arange(11) % 4, gae_lambda=0.9)


def test_nothing_here_carries_a_gradient():
    logps, values, reward = (random_scores(i, n).requires_grad_() for i, n in enumerate((11, 11, 4)))
    k1, k3 = kl_estimates(logps, random_scores(3, 11))
    scores = sequence_scores(reward, logps, RAGGED, beta=0.1)
    tokens = token_rewards(rewards_at_end(reward, RAGGED), logps, beta=0.1, score_clip=50.0)
    results = [k1, k3, scores, tokens, group_advantages(reward, torch.zeros(4).long())]
    results += gae(logps, values, RAGGED, gae_lambda=0.95)
    results.append(token_group_advantages(logps, RAGGED, torch.zeros(4).long()))
    assert not any(result.requires_grad for result in results)


def test_empty_batch():
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert sequence_scores(none, none, index, beta=0.1).shape == (0,)
    assert group_advantages(none, index, scale="std").shape == (0,)
    assert token_group_advantages(none, index, index, scale="std").shape == (0,)
    tokens = token_rewards(rewards_at_end(none, index), none, beta=0.1, score_clip=1.0)
    assert [part.shape for part in gae(tokens, none, index, gae_lambda=0.9)] == [(0,), (0,)]


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ShapeError, match=r"logps_old \(3,\), reference_logps \(1,\)"):
        kl_estimates(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ShapeError, match=r"reward \(4, 1\)"):
        sequence_scores(torch.zeros(4, 1), torch.zeros(11), RAGGED, beta=0.1)
    with pytest.raises(ShapeError, match=r"group \(1,\)"):
        group_advantages(torch.zeros(4), torch.zeros(1).long())
    with pytest.raises(ShapeError, match=r"values \(1,\)"):
        gae(torch.zeros(11), torch.zeros(1), RAGGED, gae_lambda=0.9)
    with pytest.raises(ShapeError, match=r"rewards \(1,\)"):
        token_group_advantages(torch.zeros(1), RAGGED, torch.zeros(4).long())
    with pytest.raises(ShapeError, match="every response needs a token"):
        token_group_advantages(torch.zeros(11), RAGGED, torch.zeros(5).long())
    with pytest.raises(ConfigError, match=r"policy_gradient\.group_scale"):
        group_advantages(torch.zeros(4), torch.zeros(4).long(), scale="rms")


def tabular_instance() -> tuple[np.ndarray, np.ndarray]:
    """Rewards and costs of 64 prompts x 8 answers, with the check values of their construction."""
    rng = np.random.default_rng(0)
    cost = rng.normal(0, 1.5, (64, 8))
    cost += rng.normal(0, 1, (64, 1))
    reward = 0.8 * cost + rng.normal(0, 1, (64, 8))
    cost[:, 0] = -np.abs(cost[:, 0]) - 0.2
    assert round(cost.sum(), 6) == -68.088984
    assert round(reward.sum(), 6) == -17.433567
    assert round(cost[0, 1], 6) == -0.742115
    assert round(reward[63, 7], 6) == 2.350930
    assert (cost > 0).sum() == 234
    return reward, cost


def group_gradient(policy: torch.Tensor, score: torch.Tensor, num_samples: int, advantages) -> torch.Tensor:
    """Exact mean of (1/K) sum_i A_i grad log pi(y_i) in the logits, by all V^K groups of each prompt, (X, V)."""
    num_prompts, num_answers = score.shape
    tuples = torch.tensor(list(itertools.product(range(num_answers), repeat=num_samples)))
    groups = torch.arange(num_prompts * len(tuples)).repeat_interleave(num_samples)
    advantage = advantages(score[:, tuples].reshape(-1), groups).view(num_prompts, len(tuples), num_samples)
    weight = policy[:, tuples].prod(2, keepdim=True) * advantage / num_samples
    gradient = torch.zeros_like(score)
    for prompt in range(num_prompts):
        gradient[prompt].index_add_(0, tuples.reshape(-1), weight[prompt].reshape(-1))
    return gradient - weight.sum((1, 2))[:, None] * policy  # grad log pi(y) = onehot(y) - pi


def test_group_estimator_on_the_tabular_instance():
    """Cosine and scale against the exact gradient of R - 5 max(C, 0) at the reward-only policy, K = 4."""
    reward, cost = (torch.from_numpy(table) for table in tabular_instance())
    policy = torch.softmax(reward / 0.5, dim=1)
    score = reward - 5 * cost.clamp(min=0)
    exact = policy * (score - (policy * score).sum(1, keepdim=True))

    def cosine_and_scale(advantages) -> tuple[float, float]:
        estimate = group_gradient(policy, score, 4, advantages)
        inner, square = (estimate * exact).sum(), exact.square().sum()
        return float(inner / (estimate.norm() * exact.norm())), float(inner / square)

    def group_mean(score_M, group_M):
        mean = segment_sum(score_M, group_M, int(group_M[-1]) + 1) / 4
        return score_M - mean[group_M]

    assert cosine_and_scale(group_advantages) == pytest.approx((1.0, 1.0), abs=1e-10)
    assert cosine_and_scale(group_mean) == pytest.approx((1.0, 0.75), abs=1e-10)
    cosine, _ = cosine_and_scale(lambda s, g: group_advantages(s, g, scale="std"))
    assert cosine == pytest.approx(0.81, abs=0.02)
