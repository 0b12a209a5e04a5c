"""One constrained update on a small real model: its gradient, its limits, and one batch whatever its cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from constrained_rounds import costly_round, with_costs
from tiny_rounds import with_token_rewards
from tiny_run import tiny_model

from raylign.config import ConstraintSection, PolicyGradientSection, TrainSection
from raylign.constraints.multipliers import MultiplierState
from raylign.errors import TrainingError
from raylign.models.forward import PolicyForward
from raylign.training.constrained import round_constraint
from raylign.training.gradient import GradientSummary, RoundTargets, gradient_update, round_targets
from raylign.training.micro_batches import Packing
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round
from raylign.training.world import World

LAMBDA = 1.3
SETTINGS = TrainSection(learning_rate=1e-2, max_grad_norm=1e6)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=10_000)
Constraint = dict[str, Any]
PER_PART: Constraint = {"kind": "split", "split_reduction": "per_part"}
CONSTRAINTS: list[Constraint] = [
    {"kind": "rectified"},
    {"kind": "split"},
    PER_PART,
    {"kind": "expected"},
    {"kind": "fixed_penalty"},
]


def make_policy(num_values: int = 0, *, cost_head: float = 1.0) -> PolicyForward:
    policy = PolicyForward(tiny_model(), num_values=num_values)
    if policy.value_heads is not None:
        torch.nn.init.normal_(policy.value_heads.weight, generator=torch.Generator().manual_seed(0))
        policy.value_heads.weight.data[1:] *= cost_head
    return policy


def scored(policy: PolicyForward, round_: Round) -> Round:
    return round_.with_policy(*round_logps(policy, round_, packing=PACKING, world=World()))


def targets_of(round_: Round, gradient: PolicyGradientSection, constraint: Constraint | None) -> RoundTargets:
    if constraint is None:
        return round_targets(round_, settings=gradient)
    state, settings = MultiplierState(value=LAMBDA), ConstraintSection(**constraint)
    return round_targets(round_, settings=gradient, constraint=round_constraint(round_, state, settings=settings))


def update(
    policy: PolicyForward,
    round_: Round,
    constraint: Constraint | None,
    *,
    batch_tokens: int = 10_000,
    **gradient: Any,
) -> GradientSummary:
    """One step of plain gradient descent of size 1 over all prompts."""
    settings = PolicyGradientSection(**gradient)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    return gradient_update(
        policy,
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        round_,
        targets_of(round_, settings, constraint),
        np.arange(len(round_.by_prompt)),
        update=0,
        settings=SETTINGS,
        gradient=settings,
        packing=replace(PACKING, batch_tokens=batch_tokens),
        seed=0,
    )


def moved(round_: Round, constraint: Constraint | None, *, cost_head: float = 0.0, **gradient: Any) -> dict[str, Any]:
    """Weights of the model (not of the heads) after one update."""
    policy = make_policy(2 if gradient.get("advantage") == "gae" else 0, cost_head=cost_head)
    update(policy, scored(policy, round_), constraint, **gradient)
    return policy.model.state_dict()


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("constraint", "reduction"),
    [*((constraint, "token_global") for constraint in CONSTRAINTS), (PER_PART, "sequence_sum")],
    ids=str,
)
def test_the_update_follows_the_constrained_gradient(constraint: Constraint, reduction: str) -> None:
    """Written out: leave-one-out advantages of what reward and cost make, one response at a time."""
    policy = make_policy()
    round_ = scored(policy, costly_round(4, 3))
    costs, lengths = round_.costs, np.diff(round_.offsets)
    before = copy.deepcopy(policy.state_dict())
    scores, weights, logps = [], [], []
    for position, item in enumerate(round_.scored):
        old = round_.policy_logps[round_.offsets[position] : round_.offsets[position + 1]]
        penalised = {
            "rectified": item.reward - LAMBDA * max(item.cost, 0),
            "fixed_penalty": item.reward - LAMBDA * max(item.cost, 0),
            "expected": (item.reward - LAMBDA * item.cost) / (1 + LAMBDA),
            "split": (item.reward - LAMBDA * item.cost) / (1 + LAMBDA) if item.cost > 0 else item.reward,
        }[constraint["kind"]]
        scores.append(penalised - 0.1 * float((old - item.reference_token_logps).sum()))
        weights.append(torch.from_numpy(np.minimum(np.exp(old - item.rollout.sampler_logps), 1.5)))
        ids = torch.from_numpy(np.concatenate([item.rollout.prompt_ids, item.rollout.response_ids])).long()
        logits = policy.model(input_ids=ids[None]).logits[0, len(item.rollout.prompt_ids) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(1, ids[len(item.rollout.prompt_ids) :, None])[:, 0])
    size = lengths if reduction == "token_global" else np.ones(len(lengths))
    loss = torch.zeros(())
    for position in range(len(scores)):
        group = [other for other in range(3 * (position // 3), 3 * (position // 3) + 3) if other != position]
        advantage = scores[position] - np.mean([scores[other] for other in group])
        own_part = (costs > 0) == (costs[position] > 0) if constraint is PER_PART else np.full(len(costs), True)
        loss = loss - advantage * (weights[position] * logps[position]).sum() / size[own_part].sum()
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    update(policy, round_, constraint, reduction=reduction, beta=0.1, importance_cap=1.5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("advantage", ["group", "gae"])
@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
def test_a_reward_on_the_last_token_is_constrained_as_that_of_the_response(
    constraint: Constraint, advantage: str
) -> None:
    policy = make_policy(2 if advantage == "gae" else 0)
    round_ = with_token_rewards(scored(policy, costly_round(4, 3)), at_end=True)
    found = [
        targets_of(round_, PolicyGradientSection(advantage=advantage, credit=credit, beta=0.0), constraint)
        for credit in ("sequence", "token")
    ]
    torch.testing.assert_close(found[0].advantages, found[1].advantages, rtol=1e-5, atol=1e-5)
    if advantage == "gae":
        torch.testing.assert_close(found[0].returns, found[1].returns, rtol=1e-5, atol=1e-5)


def test_a_cost_comes_off_the_last_of_the_rewards_of_tokens() -> None:
    policy = make_policy()
    round_ = with_token_rewards(scored(policy, costly_round(4, 3)))
    settings = PolicyGradientSection(credit="token", beta=0.1)
    found = targets_of(round_, settings, {"kind": "rectified"}).advantages
    by_hand = round_.with_rewards(round_.rewards - LAMBDA * round_.costs.clip(min=0))
    torch.testing.assert_close(found, targets_of(by_hand, settings, None).advantages, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, targets_of(round_, settings, None).advantages)


@pytest.mark.parametrize("advantage", ["group", "gae"])
@pytest.mark.parametrize("constraint", [{"kind": "rectified"}, PER_PART], ids=str)
def test_micro_batches_change_nothing(constraint: Constraint, advantage: str) -> None:
    found = []
    for batch_tokens in (10_000, 1):
        policy = make_policy(2 if advantage == "gae" else 0)
        round_ = scored(policy, costly_round(4, 3))
        found.append((update(policy, round_, constraint, batch_tokens=batch_tokens, advantage=advantage), policy))
    (one, first), (many, second) = found
    for name in ("policy_loss", "value_loss", "cost_value_loss", "tokens"):
        assert one.sums[name] == pytest.approx(many.sums[name], rel=1e-5, abs=1e-6)
    assert (one.sums["cost_value_loss"] > 0) == (advantage == "gae")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_safe_round_is_trained_as_without_a_constraint_to_the_bit() -> None:
    round_ = costly_round(4, 3)
    safe = with_costs(round_, -np.abs(round_.costs))
    plain = moved(safe, None)
    for constraint in CONSTRAINTS:
        assert same(moved(safe, constraint), plain) == (constraint["kind"] != "expected"), constraint
    assert not same(moved(round_, {"kind": "rectified"}), plain)  # the costs do reach the weights


def test_with_critics_a_safe_round_is_plain_where_the_cost_critic_is_silent() -> None:
    round_ = costly_round(4, 3)
    safe = with_costs(round_, -np.abs(round_.costs))
    plain = moved(safe, None, advantage="gae")
    for kind, cost_head, is_plain in (
        ("rectified", 0.0, True),
        ("rectified", 1.0, False),
        ("split", 0.0, True),
        ("split", 1.0, True),
        ("expected", 0.0, False),
    ):
        assert same(moved(safe, {"kind": kind}, cost_head=cost_head, advantage="gae"), plain) == is_plain, kind


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_an_unsafe_round_is_the_same_for_split_and_expected_to_the_bit(advantage: str) -> None:
    round_ = costly_round(4, 3)
    unsafe = with_costs(round_, np.abs(round_.costs) + 0.1)
    expected = moved(unsafe, {"kind": "expected"}, cost_head=1.0, advantage=advantage)
    for constraint in ({"kind": "split"}, PER_PART):
        assert same(moved(unsafe, constraint, cost_head=1.0, advantage=advantage), expected)
    assert not same(moved(round_, {"kind": "split"}, advantage=advantage), expected)


@pytest.mark.parametrize("shift", [-9.0, 9.0])
@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_an_empty_part_is_finite(advantage: str, shift: float) -> None:
    round_ = costly_round(4, 3)
    for constraint in ({"kind": "rectified"}, PER_PART):
        policy = make_policy(2 if advantage == "gae" else 0)
        one_part = scored(policy, with_costs(round_, round_.costs + shift))
        summary = update(policy, one_part, constraint, advantage=advantage, batch_tokens=100)
        assert np.isfinite(list(summary.sums.values())).all()
        assert all(torch.isfinite(value).all() for value in policy.state_dict().values())


def test_the_cost_head_learns_what_the_variant_weighs() -> None:
    """At lambda 1 its returns on the last token are P, or C with the divergence where the sum is divided."""
    policy = make_policy(2)
    round_ = scored(policy, costly_round(4, 3))
    settings = PolicyGradientSection(advantage="gae", gae_lambda=1.0, beta=0.2)
    last = torch.from_numpy(round_.offsets[1:] - 1)
    reference = np.concatenate([item.reference_token_logps for item in round_.scored])
    divergence = torch.from_numpy(round_.policy_logps - reference)[last]
    cost = torch.from_numpy(round_.costs).float()
    for kind, expected in (("rectified", cost.clamp(min=0)), ("expected", cost + 0.2 * divergence)):
        targets = targets_of(round_, settings, {"kind": kind})
        torch.testing.assert_close(targets.returns[last, 1], expected, rtol=1e-4, atol=1e-5)
        assert np.isfinite(targets.facts["critic/cost_explained_variance"])
    undivided = targets_of(round_, settings, {"kind": "split", "split_normalise": "none"})
    torch.testing.assert_close(undivided.returns[last, 1], cost, rtol=1e-4, atol=1e-5)


def test_the_rewards_are_clipped_before_they_are_weighed() -> None:
    policy = make_policy()
    round_ = scored(policy, costly_round(4, 3, shift=3.0))
    clipped = targets_of(round_, PolicyGradientSection(score_clip=0.5), {"kind": "rectified"})
    by_hand = round_.with_rewards(np.clip(round_.rewards, -0.5, 0.5) - LAMBDA * np.clip(round_.costs, 0, 0.5))
    plain = targets_of(by_hand, PolicyGradientSection(), None)
    torch.testing.assert_close(clipped.advantages, plain.advantages)


def test_a_missing_cost_names_the_cost_model() -> None:
    round_ = costly_round(4, 3)
    costs = round_.costs
    costs[[3, 5]] = np.nan
    with pytest.raises(TrainingError, match=r"kind=rectified needs a cost.*2 of the 12 .* round 1 .*cost_model"):
        targets_of(scored(make_policy(), with_costs(round_, costs)), PolicyGradientSection(), {"kind": "rectified"})
