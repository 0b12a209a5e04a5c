"""The policy-gradient update on a small real model: one batch whatever its cut, and the gradient it should have."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_rounds import tiny_round, with_token_rewards
from tiny_run import tiny_model

from raylign.config import PolicyGradientSection, RobustSection, TrainSection
from raylign.errors import TrainingError
from raylign.models.forward import PolicyForward
from raylign.rewards.posterior import ensemble_posterior
from raylign.runtime.robust import robust_rewards
from raylign.training.gradient import GradientSummary, gradient_update, round_targets, token_facts
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


def test_an_update_by_the_mixture_of_one_member_is_that_of_its_reward_bitwise() -> None:
    """w_nominal = 1 and M = 1 leave the trainer of a single reward; a second member does not."""
    policy = make_policy()
    start, round_ = copy.deepcopy(policy.state_dict()), make_round(policy)
    mu = torch.randn(len(round_.scored), 2, generator=torch.Generator().manual_seed(3))
    rule = RobustSection(rule="brme", w_nominal=1.0)

    def updated(rewards: torch.Tensor) -> dict[str, torch.Tensor]:
        policy.load_state_dict(start)
        scored = [replace(item, reward=float(r)) for item, r in zip(round_.scored, rewards, strict=True)]
        update(policy, replace(round_, scored=tuple(scored)), PolicyGradientSection())
        return copy.deepcopy(policy.state_dict())

    plain = updated(mu[:, 0])
    robust = updated(robust_rewards(ensemble_posterior(mu[:, :1], torch.ones(len(mu), 1)), rule))
    both = updated(robust_rewards(ensemble_posterior(mu, torch.tensor([2.0, 1.0]).expand(len(mu), 2)), rule))
    assert all(torch.equal(plain[name], robust[name]) for name in plain)
    assert not all(torch.equal(plain[name], both[name]) for name in plain)


def test_the_first_update_follows_the_policy_gradient_of_rewards_of_tokens() -> None:
    policy = make_policy()
    round_ = with_token_rewards(make_round(policy))
    gradient = PolicyGradientSection(credit="token", reduction="sequence_sum", beta=0.1, importance_cap=1.5)
    before = copy.deepcopy(policy.state_dict())
    # the definition, written out: - sum_i sum_t A_it w_t log pi(t), A the rewards to go less those of the others at t
    to_go, weights = [], []
    for position, item in enumerate(round_.scored):
        old = round_.policy_logps[round_.offsets[position] : round_.offsets[position + 1]]
        rewards = item.token_rewards - 0.1 * (old - item.reference_token_logps)
        to_go.append(rewards[::-1].cumsum()[::-1])
        weights.append(np.minimum(np.exp(old - item.rollout.sampler_logps), 1.5))
    loss = torch.zeros(())
    for position, logps in enumerate(plain_logps(policy, round_)):
        group = [other for other in range(3 * (position // 3), 3 * (position // 3) + 3) if other != position]
        for t, logp in enumerate(logps):
            baseline = np.mean([to_go[other][min(t, len(to_go[other]) - 1)] for other in group])
            loss = loss - float((to_go[position][t] - baseline) * weights[position][t]) * logp
    (loss / len(round_.scored)).backward()
    expected = {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}
    update(policy, round_, gradient)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_all_reward_on_the_last_token_trains_as_the_reward_of_the_response(advantage: str) -> None:
    """Without a divergence, whose rewards to go differ."""
    moved = []
    for credit in ("sequence", "token"):
        policy = make_policy(num_values=int(advantage == "gae"))
        round_ = with_token_rewards(make_round(policy), at_end=True)
        update(policy, round_, PolicyGradientSection(advantage=advantage, credit=credit, beta=0.0))
        moved.append(policy.state_dict())
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-5, atol=1e-7)


def test_critics_learn_the_rewards_of_tokens_to_go() -> None:
    policy = make_policy(num_values=1)
    round_ = with_token_rewards(make_round(policy))
    settings = PolicyGradientSection(advantage="gae", credit="token", gae_lambda=1.0, beta=0.0)
    targets = round_targets(round_, settings=settings)
    to_go = np.concatenate([item.token_rewards[::-1].cumsum()[::-1] for item in round_.scored])
    torch.testing.assert_close(targets.returns[:, 0], torch.from_numpy(to_go), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_rewards_of_tokens_are_clipped_each(advantage: str) -> None:
    policy = make_policy(num_values=int(advantage == "gae"))
    round_ = with_token_rewards(make_round(policy))
    settings = PolicyGradientSection(advantage=advantage, credit="token", beta=0.0, score_clip=0.3)
    scored = [replace(item, token_rewards=item.token_rewards.clip(-0.3, 0.3)) for item in round_.scored]
    by_hand = round_targets(
        replace(round_, scored=tuple(scored)), settings=settings.model_copy(update={"score_clip": 9})
    )
    torch.testing.assert_close(round_targets(round_, settings=settings).advantages, by_hand.advantages)


def test_facts_of_rewards_of_tokens_by_hand() -> None:
    round_ = tiny_round(1, 2)
    lengths = np.diff(round_.offsets)
    tokens = [np.r_[np.full(length - 1, 0.5), 2.0].astype(np.float32) for length in lengths]
    scored = [replace(item, reward=1.0, token_rewards=one) for item, one in zip(round_.scored, tokens, strict=True)]
    facts = token_facts(replace(round_, scored=tuple(scored)))
    every = np.concatenate(tokens)
    assert facts == {
        "actor/token_reward/mean": pytest.approx(every.mean()),
        "actor/token_reward/std": pytest.approx(every.std(), rel=1e-5),
        "actor/token_reward/at_end": pytest.approx(8.0 / (8.0 + 0.25 * (lengths.sum() - 2))),
        "actor/token_reward/gap": pytest.approx(np.mean(0.5 * (lengths - 1) + 2.0 - 1.0)),
    }
    assert token_facts(with_token_rewards(round_, at_end=True))["actor/token_reward/at_end"] == 1.0
    nothing = [replace(item, token_rewards=0 * one) for item, one in zip(scored, tokens, strict=True)]
    assert token_facts(replace(round_, scored=tuple(nothing)))["actor/token_reward/at_end"] == 0.0


def test_responses_without_rewards_of_tokens_are_refused() -> None:
    policy = make_policy()
    round_ = make_round(policy)
    half = replace(round_, scored=(*with_token_rewards(round_).scored[:7], *round_.scored[7:]))
    with pytest.raises(TrainingError, match=r"5 of the 12 responses of round 1 have none.*reward\.kind=ava_p"):
        round_targets(half, settings=PolicyGradientSection(credit="token"))
    short = [replace(item, token_rewards=np.zeros(1, np.float32)) for item in round_.scored]
    with pytest.raises(TrainingError, match="12 rewards of tokens for"):
        round_targets(replace(round_, scored=tuple(short)), settings=PolicyGradientSection(credit="token"))


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
        model, learning_rate=1e-2, weight_decay=0.0, heads=model.value_heads, head_learning_rate=1e-2
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
    shaped = round_.rewards - 3.0 * (round_.rewards > 0)
    penalised = round_targets(round_.with_rewards(shaped), settings=gradient)
    assert not torch.equal(plain, penalised.advantages)
    # rewards of tokens follow: what is taken off a response is taken off its last token
    by_token = PolicyGradientSection(beta=0.0, credit="token")
    at_end = with_token_rewards(round_, at_end=True).with_rewards(shaped)
    torch.testing.assert_close(round_targets(at_end, settings=by_token).advantages, penalised.advantages)


def test_a_loss_that_is_not_finite_stops_before_the_weights_move() -> None:
    policy = make_policy()
    round_ = make_round(policy)
    round_.scored[0].reference_token_logps[0] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(TrainingError, match=r"update 1: .* not finite; lower train\.learning_rate"):
        update(policy, round_, PolicyGradientSection())
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
