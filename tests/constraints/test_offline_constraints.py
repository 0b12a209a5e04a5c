"""Constraints over stored pairs: labels, the dual loop, and the policies that the label-confidence loss ends at."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from constraint_table import constraint_table, gibbs, table_violations

from raylign.constraints.offline import (
    StoredResponses,
    constrained_margin,
    dual_ascent,
    pair_labels,
    stepwise_beta,
    tilted_policy,
    weighed_belief,
)
from raylign.errors import ConfigError, DataError, ShapeError
from raylign.losses.preference import label_confidence as confidence_loss
from raylign.rewards.confidence import label_confidence
from raylign.rewards.posterior import MarginPosterior, RewardPosterior, ensemble_posterior, margin_posterior

BETA = 0.5
STAR = 0.385034  # multiplier at which the expected constraint of the table is tight
FIRST, SECOND = np.triu_indices(8, 1)


def table_responses(kind: str = "expected") -> StoredResponses:
    """All answers of the table; the reference is uniform."""
    reward, cost = (torch.from_numpy(table).reshape(-1) for table in constraint_table())
    weighed = cost if kind == "expected" else cost.clamp(min=0)
    return StoredResponses(reward=reward, weighed=weighed, prompt=torch.arange(64).repeat_interleave(8))


def confidences(score: np.ndarray, **options: object) -> torch.Tensor:
    """(X, 28) gamma of all pairs of answers to a prompt."""
    score = torch.from_numpy(score)
    settings = {"alpha": 1.0, "center": 0.0, "squash": "none", "temperature": 1.0} | options
    first, second = score[:, FIRST].reshape(-1), score[:, SECOND].reshape(-1)
    return label_confidence(first, second, floor=0.0, level="pair", **settings).reshape(len(score), -1)


def fixed_point(gamma: torch.Tensor, beta: float, weight: torch.Tensor | None = None) -> np.ndarray:
    """Policy (X, 8) that Newton's method reaches from the uniform reference on the exact expectation of the loss.

    Pairs of weight 0 are not stored; answers that no chain of pairs connects keep their order of the reference.
    """
    weight = torch.ones_like(gamma) if weight is None else weight
    logits = torch.zeros(len(gamma), 8, dtype=torch.float64, requires_grad=True)
    incidence = torch.zeros(28, 8, dtype=torch.float64)
    incidence[range(28), FIRST], incidence[range(28), SECOND] = 1.0, -1.0

    def losses(values: torch.Tensor) -> torch.Tensor:
        margin = values @ incidence.T
        loss = confidence_loss(margin.reshape(-1), gamma.reshape(-1), beta=beta)
        return (weight * loss.reshape(gamma.shape)).mean(1)

    for _ in range(200):
        before = losses(logits)
        (gradient,) = torch.autograd.grad(before.sum(), logits)
        if float(gradient.abs().max()) < 1e-12:
            break
        slope = torch.sigmoid(beta * (logits.detach() @ incidence.T))
        curvature = weight * beta**2 * slope * (1 - slope) / 28
        hessian = torch.einsum("pi,xp,pj->xij", incidence, curvature, incidence)
        hessian = hessian + torch.diag_embed(1e-13 + 1e-3 * gradient.norm(dim=1, keepdim=True).expand(-1, 8))
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones(len(gamma), 1, dtype=torch.float64)
        for _ in range(30):
            grows = losses((logits - size * step).detach()) > before.detach()
            if not bool(grows.any()):
                break
            size = torch.where(grows[:, None], size / 2, size)
        logits = (logits - size * step).detach().requires_grad_()
    return torch.softmax(logits.detach(), 1).numpy()


@pytest.mark.parametrize(
    ("kind", "multiplier"),
    [("expected", 0.0), ("expected", STAR), ("rectified", 1.0), ("rectified", 5.0), ("rectified", 20.0)],
)
def test_fixed_point_of_the_loss_is_the_constrained_optimum(kind: str, multiplier: float) -> None:
    """Re-ranked label confidence with the rectified cost ends at the policy of RePO, with the cost at PPO-Lagrangian's.

    Published numbers of the exact optima: mean R, mean C, safety rate.
    """
    reward, cost = constraint_table()
    weighed = cost if kind == "expected" else np.maximum(cost, 0)
    policy = fixed_point(confidences(reward - multiplier * weighed), BETA)
    np.testing.assert_allclose(policy, gibbs(reward - multiplier * weighed), atol=1e-6)
    found = table_violations(policy, cost)
    rows = {
        ("expected", 0.0): (1.938, 1.039, 0.271),
        ("expected", STAR): (1.674, 0.000, 0.506),
        ("rectified", 1.0): (1.409, -0.419, 0.599),
        ("rectified", 5.0): (0.810, -1.130, 0.898),
        ("rectified", 20.0): (0.702, -1.208, 0.976),
    }
    row = ((policy * reward).sum(1).mean(), found.mean_cost, found.safety_rate)
    assert row == pytest.approx(rows[kind, multiplier], abs=5.1e-4)


def test_few_pairs_per_prompt_end_between_the_reference_and_the_optimum() -> None:
    """One stored pair fixes one ratio: most of what a constraint could do needs more answers per prompt."""
    reward, cost = constraint_table()
    gamma = confidences(reward - 5 * np.maximum(cost, 0))
    rates = {}
    for num in (1, 4, 16):
        found = []
        for seed in range(6):
            order = np.random.default_rng(seed).random((64, 28)).argsort(1)
            policy = fixed_point(gamma, BETA, torch.from_numpy(1.0 * (order < num)))
            found.append(table_violations(policy, cost).safety_rate)
        rates[num] = np.mean(found)
    assert 0.543 < rates[1] < rates[4] < rates[16] < 0.8985
    assert rates[1] == pytest.approx(0.643, abs=0.02)


def test_any_connected_pairs_have_the_whole_fixed_point_whatever_their_weights() -> None:
    reward, cost = constraint_table()
    score = reward - np.maximum(cost, 0)
    chain = torch.from_numpy(1.0 * (SECOND - FIRST == 1))  # 0-1, 1-2, ..., 6-7
    weight = chain * torch.linspace(0.2, 3, 64 * 28, dtype=torch.float64).reshape(64, 28)
    np.testing.assert_allclose(fixed_point(confidences(score), BETA, weight), gibbs(score), atol=1e-6)


def test_temperature_and_beta_multiply() -> None:
    reward, cost = constraint_table()
    score = reward - np.maximum(cost, 0)
    policy = fixed_point(confidences(score, temperature=2.0), 0.25)
    np.testing.assert_allclose(policy, gibbs(score, beta=2.0 * 0.25), atol=1e-6)
    assert np.abs(policy - gibbs(score, beta=0.25)).max() > 0.1


def test_labels_drawn_once_per_pair_have_the_same_fixed_point_on_average() -> None:
    """C-DPO with sampled labels estimates re-ranked label confidence: its labels have gamma as their mean."""
    reward, cost = constraint_table()
    score = reward - STAR * cost
    gamma = confidences(score)
    flat, ids = gamma.reshape(-1), [f"pair {i}" for i in range(gamma.numel())]
    num_draws = 200
    draws = torch.stack([pair_labels(flat, flat - 0.5, ids, labels="sampled", seed=seed) for seed in range(num_draws)])
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    deviation = (draws.mean(0) - flat) / (flat * (1 - flat) / num_draws).sqrt().clamp(min=1e-3)
    assert float(deviation.mean().abs()) < 4 / len(flat) ** 0.5
    assert float(deviation[(flat > 0.05) & (flat < 0.95)].std()) == pytest.approx(1, abs=0.1)
    averaged = fixed_point(draws.mean(0).reshape(gamma.shape), BETA)
    assert np.abs(averaged - gibbs(score)).mean() < 0.01


def test_a_draw_depends_on_its_row_and_the_seed_alone() -> None:
    gamma, ids = torch.full((500,), 0.5), [f"r{i}" for i in range(500)]
    labels = pair_labels(gamma, gamma, ids, labels="sampled", seed=3)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    mixed = pair_labels(gamma, gamma, [ids[i] for i in order], labels="sampled", seed=3)
    assert torch.equal(mixed, labels[order])
    assert torch.equal(pair_labels(gamma[:7], gamma[:7], ids[:7], labels="sampled", seed=3), labels[:7])
    assert not torch.equal(pair_labels(gamma, gamma, ids, labels="sampled", seed=4), labels)
    likelier = pair_labels(gamma + 0.2, gamma, ids, labels="sampled", seed=3)
    assert bool((likelier >= labels).all())
    assert pair_labels(torch.tensor([0.0, 1.0]), gamma[:2], ids[:2], labels="sampled", seed=0).tolist() == [0.0, 1.0]


def test_hard_labels_and_given_confidence() -> None:
    gamma, margin, ids = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([2.0, -1e-6, 0.0]), ["a", "b", "c"]
    assert pair_labels(gamma, margin, ids, labels="hard", seed=0).tolist() == [1.0, 0.0, 0.5]
    assert pair_labels(gamma, margin, ids, labels="confidence", seed=0) is gamma
    with pytest.raises(ShapeError, match="2 row ids for 3 pairs"):
        pair_labels(gamma, margin, ids[:2], labels="sampled", seed=0)
    with pytest.raises(ShapeError):
        pair_labels(gamma, margin[:2], ids, labels="hard", seed=0)


def test_hard_labels_have_no_constrained_optimum_but_its_best_answer() -> None:
    """They are the limit of a low temperature: no tie to the reference is left."""
    reward, cost = constraint_table()
    score = reward - STAR * cost
    margin = torch.from_numpy(score[:, FIRST] - score[:, SECOND]).reshape(-1)
    gamma = pair_labels(margin, margin, [""] * len(margin), labels="hard", seed=0).reshape(64, -1)
    policy = fixed_point(gamma, BETA)
    assert np.array_equal(policy.argmax(1), score.argmax(1))
    assert policy.max(1).min() > 0.999


def test_squashed_rewards_bound_the_penalty() -> None:
    """Under E4 an unsafe answer loses no more than alpha, whatever the multiplier, and safety saturates."""
    reward, cost = constraint_table()
    rates = {}
    for multiplier in (5.0, 1e6):
        score = reward - multiplier * np.maximum(cost, 0)
        policy = fixed_point(confidences(score, squash="sigmoid", alpha=1.0), BETA)
        squashed = 1 / (1 + np.exp(-np.clip(score, -700, 700)))
        np.testing.assert_allclose(policy, gibbs(squashed), atol=1e-6)
        rates[multiplier] = table_violations(policy, cost).safety_rate
    assert rates[1e6] == pytest.approx(0.705, abs=1e-3)
    assert table_violations(gibbs(reward - 1e6 * np.maximum(cost, 0)), cost).safety_rate > 0.999


def beliefs(num: int, num_members: int, seed: int) -> RewardPosterior:
    rng = torch.Generator().manual_seed(seed)
    return ensemble_posterior(torch.randn(num, num_members, generator=rng, dtype=torch.float64))


def test_constrained_margin_is_the_belief_of_independent_models() -> None:
    """The same as the margin of r - lambda c with the columns of both covariance roots side by side."""
    chosen, rejected = beliefs(40, 5, 0), beliefs(40, 5, 1)
    costs = beliefs(40, 3, 2), beliefs(40, 3, 3)
    found = constrained_margin(margin_posterior(chosen, rejected), margin_posterior(*costs), 1.7)

    def joint(reward: RewardPosterior, cost: RewardPosterior) -> RewardPosterior:
        return RewardPosterior(
            mean=reward.mean - 1.7 * cost.mean,
            deviations=torch.cat([reward.deviations, -1.7 * cost.deviations], 1),
            head_rewards=reward.head_rewards,
        )

    expected = margin_posterior(joint(chosen, costs[0]), joint(rejected, costs[1]))
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.variance, expected.variance)
    untouched = constrained_margin(margin_posterior(chosen, rejected), margin_posterior(*costs), 0.0)
    assert torch.equal(untouched.mean, chosen.mean - rejected.mean)
    with pytest.raises(ShapeError):
        constrained_margin(found, MarginPosterior(mean=torch.zeros(1), variance=torch.zeros(1)), 1.0)


def test_rectified_belief_rectifies_members() -> None:
    cost = ensemble_posterior(torch.tensor([[-2.0, 1.0], [-1.0, -3.0], [1.0, 3.0]]))
    assert weighed_belief(cost, "expected") is cost
    weighed = weighed_belief(cost, "rectified")
    assert weighed.mean.tolist() == [0.5, 0.0, 2.0]  # the first answer's mean cost is below 0
    assert weighed.variance.tolist() == pytest.approx([0.25, 0.0, 1.0])
    point = ensemble_posterior(torch.tensor([[-2.0], [0.0], [1.5]]))
    assert weighed_belief(point, "rectified").mean.tolist() == [0.0, 0.0, 1.5]


def test_a_rectified_multiplier_leaves_pairs_of_safe_answers_alone() -> None:
    """And one on the plain cost does not: safe answers earn a bonus for being safer still."""
    reward, cost = constraint_table()
    both_safe = torch.from_numpy((cost[:, FIRST] <= 0) & (cost[:, SECOND] <= 0))
    free = confidences(reward)
    rectified = confidences(reward - 20 * np.maximum(cost, 0))
    assert torch.equal(rectified[both_safe], free[both_safe])
    assert not torch.equal(rectified[~both_safe], free[~both_safe])
    assert float((confidences(reward - STAR * cost) - free)[both_safe].abs().max()) > 0.1


@pytest.mark.parametrize("multiplier", [0.0, STAR, 5.0])
def test_tilted_policy_of_all_answers_is_the_gibbs_form(multiplier: float) -> None:
    reward, cost = constraint_table()
    mixed = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    stored = table_responses()
    stored = StoredResponses(
        reward=stored.reward[mixed], weighed=stored.weighed[mixed], prompt=7 - 3 * stored.prompt[mixed]
    )
    found = tilted_policy(stored, multiplier, beta=BETA)
    expected = gibbs(reward - multiplier * cost)
    np.testing.assert_allclose(found.weight.numpy(), expected.reshape(-1)[mixed], atol=1e-15)
    assert found.statistic == pytest.approx((expected * cost).sum(1).mean(), abs=1e-13)
    assert found.mean_reward == pytest.approx((expected * reward).sum(1).mean(), abs=1e-13)
    assert found.effective_responses == pytest.approx((1 / (expected**2).sum(1)).mean())
    assert found.num_prompts == 64


def test_effective_responses_and_extremes_by_hand() -> None:
    stored = StoredResponses(
        reward=torch.tensor([0.0, 0.0, 1e4, -1e4, 5.0]),
        weighed=torch.tensor([1.0, 3.0, 0.5, 9.0, -2.0]),
        prompt=torch.tensor([0, 0, 4, 4, 9]),
    )
    found = tilted_policy(stored, 0.0, beta=0.1)
    assert found.weight.tolist() == [0.5, 0.5, 1.0, 0.0, 1.0]
    assert (found.statistic, found.mean_reward) == pytest.approx((0.5 / 3, (1e4 + 5) / 3))
    assert found.effective_responses == pytest.approx(4 / 3)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="1 of 2 stored responses"):
            StoredResponses(
                reward=torch.tensor([0.0, broken]), weighed=torch.zeros(2), prompt=torch.zeros(2, dtype=torch.int64)
            )
    with pytest.raises(DataError, match="0 of 0 stored responses"):
        StoredResponses(reward=torch.zeros(0), weighed=torch.zeros(0), prompt=torch.zeros(0, dtype=torch.int64))


def test_dual_loop_takes_the_exact_linear_path_to_the_tight_multiplier() -> None:
    solution = dual_ascent(table_responses(), kind="expected", beta=BETA, target=0.0, maximum=5.0)
    assert [*solution.path[:60:6]] == pytest.approx(
        [1, 0.522, 0.408, 0.389, 0.386, 0.385, 0.385, 0.385, 0.385, 0.385], abs=5.1e-4
    )
    assert solution.multiplier == pytest.approx(STAR, abs=5e-7)
    assert -1e-9 < solution.policy.statistic <= 0
    assert not solution.is_at_cap


@pytest.mark.parametrize("learning_rate", [1e-4, 3.0, 1e3])
def test_the_solution_does_not_depend_on_the_step(learning_rate: float) -> None:
    """Where the cost is steep, fixed steps of 3 would jump between the ends for ever."""
    solution = dual_ascent(
        table_responses(), kind="expected", beta=BETA, target=0.0, maximum=5.0, learning_rate=learning_rate
    )
    assert solution.multiplier == pytest.approx(STAR, abs=5e-7)
    assert len(solution.path) < 120


def test_rectified_multipliers_follow_tolerance_and_cap() -> None:
    stored = table_responses("rectified")
    solution = dual_ascent(stored, kind="rectified", beta=BETA, target=0.462, maximum=20.0)
    assert solution.multiplier == pytest.approx(1.0, abs=2e-3)  # the table's row of multiplier 1
    assert solution.policy.statistic == pytest.approx(0.462, abs=1e-9)
    capped = dual_ascent(stored, kind="rectified", beta=BETA, target=0.0, maximum=20.0)
    assert (capped.multiplier, capped.is_at_cap) == (20.0, True)
    assert 0 < capped.policy.statistic < 0.0015
    idle = dual_ascent(stored, kind="rectified", beta=BETA, target=1.5, maximum=20.0)
    assert (idle.multiplier, idle.is_at_cap, idle.path) == (0.0, False, (0.0,))
    assert idle.policy.statistic == pytest.approx(1.445, abs=5e-4)


def test_an_expected_constraint_out_of_reach_is_refused_with_its_cure() -> None:
    stored = table_responses()
    with pytest.raises(
        DataError, match=r"no multiplier up to 0\.2 .* 64 prompts to 0: .*raise constraint\.multiplier_max"
    ):
        dual_ascent(stored, kind="expected", beta=BETA, target=0.0, maximum=0.2)
    least = float(constraint_table()[1].min(1).mean())
    with pytest.raises(DataError, match=rf"raise constraint\.threshold above {least:.4g}, .*safer answers"):
        dual_ascent(stored, kind="expected", beta=BETA, target=least - 0.01, maximum=1e6)


def test_few_responses_per_prompt_tilt_less_and_many_find_the_multiplier() -> None:
    """Samples of the reference instead of all answers: the bias of self-normalised weights falls with their number."""
    reward, cost = constraint_table()
    errors = {}
    for num in (2, 16, 256):
        found = []
        for seed in range(8):
            rng = np.random.default_rng(seed)
            answer = rng.integers(0, 8, (64, num))
            pick = (np.arange(64)[:, None], answer)
            stored = StoredResponses(
                reward=torch.from_numpy(reward[pick]).reshape(-1),
                weighed=torch.from_numpy(cost[pick]).reshape(-1),
                prompt=torch.arange(64).repeat_interleave(num),
            )
            found.append(dual_ascent(stored, kind="expected", beta=BETA, target=0.0, maximum=20.0).multiplier)
        errors[num] = abs(float(np.mean(found)) - STAR)
    assert errors[2] > errors[16] > errors[256]
    assert errors[256] < 0.01


def test_two_stages_of_sacpo_end_where_one_stage_would() -> None:
    assert stepwise_beta(0.1, 4) == pytest.approx(0.025, abs=1e-15)
    assert [stepwise_beta(0.1, value) for value in (1, 2, 10)] == pytest.approx([0.1, 0.05, 0.01])
    reward, cost = constraint_table()
    helpful = gibbs(reward)
    for multiplier in (STAR, 4.0):
        one_stage = gibbs(reward - multiplier * cost)
        weight = helpful * np.exp(-(cost - cost.min(1, keepdims=True)) / stepwise_beta(BETA, multiplier))
        np.testing.assert_allclose(weight / weight.sum(1, keepdims=True), one_stage, atol=1e-8)
    for beta, multiplier in itertools.product((0.1, -1.0, float("inf")), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match="must both be above 0"):
            stepwise_beta(beta, multiplier)


def test_dpo_on_safety_pairs_from_the_helpful_policy_is_the_second_stage() -> None:
    """The loss measures margins from its reference, so logits relative to the helpful policy are what it moves."""
    reward, cost = constraint_table()
    moved = fixed_point(confidences(-cost), stepwise_beta(BETA, STAR))
    policy = gibbs(reward) * moved
    np.testing.assert_allclose(policy / policy.sum(1, keepdims=True), gibbs(reward - STAR * cost), atol=1e-6)
