"""The policy-gradient update on a small real model: one batch whatever its cut, and the gradient it should have."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_rounds import tiny_round
from tiny_run import tiny_model

from raylign.config import PolicyGradientSection, TrainSection
from raylign.errors import TrainingError
from raylign.models.forward import PolicyForward
from raylign.training.gradient import GradientSummary, gradient_update, round_targets
from raylign.training.micro_batches import Packing
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round
from raylign.training.world import World

SETTINGS = TrainSection(learning_rate=1e-2, max_grad_norm=1e6)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=10_000)


def make_policy(num_values: int = 0) -> PolicyForward:
    policy = PolicyForward(tiny_model(), num_values=num_values)
    if policy.value_heads is not None:
        torch.nn.init.normal_(policy.value_heads.weight, generator=torch.Generator().manual_seed(0))
    return policy


def make_round(policy: PolicyForward, num_samples: int = 3, **options: int) -> Round:
    round_ = tiny_round(4, num_samples, **options)
    return round_.with_policy(*round_logps(policy, round_, packing=PACKING, world=World()))


def update(
    policy: PolicyForward, round_: Round, gradient: PolicyGradientSection, *, batch_tokens: int = 10_000
) -> GradientSummary:
    """One update over all prompts by plain gradient descent of step 1, so that the weights move by the gradient."""
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return gradient_update(
        policy,
        optimizer,
        scheduler,
        round_,
        round_targets(round_, settings=gradient),
        np.arange(4),
        update=0,
        settings=SETTINGS,
        gradient=gradient,
        packing=replace(PACKING, batch_tokens=batch_tokens),
        seed=0,
    )


def plain_logps(policy: PolicyForward, round_: Round) -> list[torch.Tensor]:
    """Log-probability of every response token, from the model's own logits, one response at a time."""
    found = []
    for item in round_.scored:
        ids = torch.from_numpy(np.concatenate([item.rollout.prompt_ids, item.rollout.response_ids])).long()
        logits = policy.model(input_ids=ids[None]).logits[0, len(item.rollout.prompt_ids) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, ids[len(item.rollout.prompt_ids) :, None])[:, 0])
    return found


@pytest.mark.parametrize("num_samples", [2, 3])
def test_the_trainers_log_probabilities_are_those_of_the_model(num_samples: int) -> None:
    policy = make_policy()
    round_ = make_round(policy, num_samples)
    assert round_.policy_logps is not None
    expected = torch.cat(plain_logps(policy, round_)).detach().numpy()
    np.testing.assert_allclose(round_.policy_logps, expected, atol=1e-5)


@pytest.mark.parametrize("reduction", ["token_global", "sequence_sum"])
def test_the_first_update_follows_the_policy_gradient(reduction: str) -> None:
    policy = make_policy()
    round_ = make_round(policy)
    gradient = PolicyGradientSection(reduction=reduction, beta=0.1, importance_cap=1.5)
    before = copy.deepcopy(policy.state_dict())
    # the definition, written out: - sum_i A_i sum_t w_t log pi(t), leave-one-out advantages of R - beta sum_t kl_t
    scores = []
    weights = []
    for position, item in enumerate(round_.scored):
        old = round_.policy_logps[round_.offsets[position] : round_.offsets[position + 1]]
        scores.append(item.reward - 0.1 * float((old - item.reference_token_logps).sum()))
        weights.append(torch.from_numpy(np.minimum(np.exp(old - item.rollout.sampler_logps), 1.5)))
    loss = torch.zeros(())
    for position, logps in enumerate(plain_logps(policy, round_)):
        group = [other for other in range(3 * (position // 3), 3 * (position // 3) + 3) if other != position]
        advantage = scores[position] - np.mean([scores[other] for other in group])
        loss = loss - advantage * (weights[position] * logps).sum()
    loss = loss / (round_.offsets[-1] if reduction == "token_global" else len(round_.scored))
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    update(policy, round_, gradient)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("advantage", ["group", "gae"])
@pytest.mark.parametrize("num_samples", [2, 3])
def test_micro_batches_change_nothing(advantage: str, num_samples: int) -> None:
    gradient = PolicyGradientSection(advantage=advantage)
    moved = []
    for batch_tokens in (10_000, 1):
        policy = make_policy(num_values=int(advantage == "gae"))
        summary = update(policy, make_round(policy, num_samples), gradient, batch_tokens=batch_tokens)
        moved.append((summary, policy.state_dict()))
    (one, first), (many, second) = moved
    for name in ("policy_loss", "value_loss", "tokens"):
        assert one.sums[name] == pytest.approx(many.sums[name], rel=1e-5, abs=1e-6)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_the_value_head_learns_returns_and_leaves_the_model_alone() -> None:
    gradient = PolicyGradientSection(advantage="gae", beta=0.0)
    policy = make_policy(num_values=1)
    round_ = make_round(policy)
    round_ = replace(round_, scored=tuple(replace(item, reward=0.0) for item in round_.scored))
    targets = round_targets(round_, settings=gradient)
    assert targets.returns is not None and targets.values_old is not None
    # with no reward and lambda below 1 the returns differ from the values, so the head has something to learn
    loss = 0.5 * ((targets.values_old - targets.returns) ** 2).sum()
    summary = update(policy, round_, gradient)
    assert summary.sums["value_loss"] == pytest.approx(float(loss), rel=1e-4)
    model = make_policy(num_values=1)
    zero = replace(targets, advantages=torch.zeros_like(targets.advantages))
    optimizer = build_optimizer(
        model, learning_rate=1e-2, weight_decay=0.0, value_heads=model.value_heads, value_learning_rate=1e-2
    )
    before = copy.deepcopy(model.state_dict())
    gradient_update(
        model,
        optimizer,
        build_scheduler(optimizer, schedule="constant", num_updates=1, warmup_fraction=0),
        round_,
        zero,
        np.arange(4),
        update=0,
        settings=SETTINGS,
        gradient=gradient,
        packing=PACKING,
        seed=0,
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("value_heads")), name


def test_other_rewards_change_the_advantages() -> None:
    policy = make_policy()
    round_ = make_round(policy)
    gradient = PolicyGradientSection(beta=0.0)
    plain = round_targets(round_, settings=gradient).advantages
    shifted = round_targets(round_.with_rewards(round_.rewards + 3), settings=gradient).advantages
    torch.testing.assert_close(plain, shifted)  # a constant is no information
    penalised = round_targets(round_.with_rewards(round_.rewards - 3.0 * (round_.rewards > 0)), settings=gradient)
    assert not torch.equal(plain, penalised.advantages)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move() -> None:
    policy = make_policy()
    round_ = make_round(policy)
    round_.scored[0].reference_token_logps[0] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(TrainingError, match=r"update 1: .* not finite; lower train\.learning_rate"):
        update(policy, round_, PolicyGradientSection())
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
