"""One policy-gradient update: prompts of a round in, moved weights out.

Advantages belong to the round and are computed once, from the numbers stored with it; an update only reads them. As
for stored pairs, the batch is one sum over its tokens (or responses) divided by their number over all workers, however
it is cut into micro-batches.

A method with another reward hands in a round with other rewards, see `Round.with_rewards`; nothing here knows where a
reward comes from. A constraint hands in the costs beside them, because a cost may have a critic of its own.

Shape letters: n responses of a round, N their tokens, H value heads, T tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from raylign.config import PolicyGradientSection, TrainSection
from raylign.constraints.rectified import (
    combine,
    constrained_rewards,
    constrained_token_rewards,
    cost_token_rewards,
    part_weights,
)
from raylign.losses import policy_gradient
from raylign.losses.advantages import (
    gae,
    group_advantages,
    kl_estimates,
    rewards_at_end,
    sequence_scores,
    token_group_advantages,
    token_rewards,
)
from raylign.training.constrained import RoundConstraint
from raylign.training.micro_batches import Packing
from raylign.training.online_pairs import couple_responses
from raylign.training.optim import trainable
from raylign.training.parallel import unwrap
from raylign.training.rounds import Round
from raylign.training.step import check_finite, clip_gradient, gradient_sync, seeded
from raylign.training.world import World
from raylign.types import PackedBatch, PairScores

# Sums over the counted tokens of an update, reduced over workers.
_VALUE_LOSSES = ("value_loss", "cost_value_loss")  # by value head
_LOSSES = ("policy_loss", *_VALUE_LOSSES)
SUMS = (*_LOSSES, "is_clipped", "policy_change", "tokens", "slots")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTargets:
    """What the updates of a round move towards, per response token.

    Attributes:
        logps_old: (N,) trainer's log-probabilities at the start of the round, nats.
        importance: (N,) truncated weight of trainer over sampler probability.
        advantages: (N,) reward units.
        values_old: (N, H) value heads at the start of the round, reward before cost; None without them.
        returns: (N, H) what the value heads learn, None without them.
        facts: numbers for the metrics.
        unsafe: (n,) bool, the part of each response where safe and unsafe ones are averaged apart, else None.
    """

    logps_old: torch.Tensor
    importance: torch.Tensor
    advantages: torch.Tensor
    values_old: torch.Tensor | None
    returns: torch.Tensor | None
    facts: dict[str, float]
    unsafe: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSummary:
    """What one update did, the same on every worker.

    Attributes:
        sums: over the update's tokens, by name (`SUMS`).
        num_responses: in the update.
        grad_norm: norm of the policy's gradient before clipping.
        learning_rate: that the update used.
    """

    sums: dict[str, float]
    num_responses: int
    grad_norm: float
    learning_rate: float


def round_targets(
    round_: Round, *, settings: PolicyGradientSection, constraint: RoundConstraint | None = None
) -> RoundTargets:
    """Advantages and importance weights of a round.

    Args:
        round_: with the trainer's log-probabilities; for advantage=gae with values of the reward and, under a
            constraint, of the cost; for credit=token with rewards of tokens.
        settings: estimator and its constants.
        constraint: costs of the responses and what they weigh; None follows the rewards alone.

    Raises:
        TrainingError: credit=token, and a response without rewards of its tokens.
    """
    assert round_.policy_logps is not None
    scored = round_.scored
    logps_old = torch.from_numpy(round_.policy_logps).double()
    reference = torch.from_numpy(np.concatenate([item.reference_token_logps for item in scored])).double()
    sampler = torch.from_numpy(np.concatenate([item.rollout.sampler_logps for item in scored])).double()
    sequence = torch.repeat_interleave(torch.arange(len(scored)), torch.from_numpy(np.diff(round_.offsets)))
    kl, _ = kl_estimates(logps_old, reference)
    values_old, returns = None, None
    if settings.advantage == "gae":
        assert round_.values is not None
        values_old = torch.from_numpy(round_.values).double()
        advantages, returns = _critic_targets(round_, values_old, kl, sequence, settings, constraint)
    elif settings.credit == "token":
        advantages = _token_targets(round_, kl, sequence, settings, constraint)
    else:
        reward, score_clip = torch.from_numpy(round_.rewards), settings.score_clip
        if constraint is not None:
            reward = constrained_rewards(reward, constraint.cost, **_weighing(constraint), score_clip=score_clip)
            score_clip = math.inf  # reward and cost are bounded each for itself, not their sum
        score = sequence_scores(reward, kl, sequence, beta=settings.beta, score_clip=score_clip)
        advantages = group_advantages(score, _prompts(round_), scale=settings.group_scale)[sequence]
    facts = importance_facts(round_, cap=settings.importance_cap) | {
        "actor/reference_kl": float(kl.sum() / len(scored)),
        "critic/advantages/mean": float(advantages.mean()),
        "critic/advantages/std": float(advantages.std(correction=0)),
    }
    if settings.credit == "token":
        facts |= token_facts(round_)
    if returns is not None and values_old is not None:
        for head, name in enumerate(
            ("critic/explained_variance", "critic/cost_explained_variance")[: returns.shape[1]]
        ):
            target = returns[:, head]
            unexplained = (target - values_old[:, head]).var(correction=0) / target.var(correction=0).clamp_min(1e-12)
            facts[name] = float(1 - unexplained)
    return RoundTargets(
        logps_old=logps_old.float(),
        importance=policy_gradient.importance_weights(logps_old, sampler, cap=settings.importance_cap).float(),
        advantages=advantages.float(),
        values_old=None if values_old is None else values_old.float(),
        returns=None if returns is None else returns.float(),
        facts=facts,
        unsafe=constraint.unsafe if constraint is not None and constraint.has_parts else None,
    )


def _token_targets(
    round_: Round,
    kl: torch.Tensor,
    sequence: torch.Tensor,
    settings: PolicyGradientSection,
    constraint: RoundConstraint | None,
) -> torch.Tensor:
    """Advantages (N,) of rewards of tokens without a critic."""
    rewards, score_clip = torch.from_numpy(round_.token_rewards), settings.score_clip
    if constraint is None:
        rewards = rewards.clamp(-score_clip, score_clip)
    else:
        weighing = _weighing(constraint)
        rewards = constrained_token_rewards(rewards, constraint.cost, sequence, **weighing, score_clip=score_clip)
    rewards = token_rewards(rewards, kl, beta=settings.beta, score_clip=math.inf)
    return token_group_advantages(rewards, sequence, _prompts(round_), scale=settings.group_scale)


def _prompts(round_: Round) -> torch.Tensor:
    """(n,) prompt of each response."""
    return torch.tensor([item.rollout.prompt_index for item in round_.scored])


def _weighing(constraint: RoundConstraint) -> dict[str, Any]:
    return {"multiplier": constraint.multiplier, "variant": constraint.variant}


def _critic_targets(
    round_: Round,
    values_NH: torch.Tensor,
    kl: torch.Tensor,
    sequence: torch.Tensor,
    settings: PolicyGradientSection,
    constraint: RoundConstraint | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (N,) of one or two critics, and their returns (N, H)."""
    constants = {"beta": settings.beta, "score_clip": settings.score_clip}
    if settings.credit == "token":
        rewards = torch.from_numpy(round_.token_rewards)
    else:
        rewards = rewards_at_end(torch.from_numpy(round_.rewards), sequence)
    per_token = token_rewards(rewards, kl, **constants)
    advantages, returns = gae(per_token, values_NH[:, 0], sequence, gae_lambda=settings.gae_lambda)
    if constraint is None:
        return advantages, returns[:, None]
    costs = cost_token_rewards(constraint.cost, kl, sequence, variant=constraint.variant, **constants)
    cost_advantages, cost_returns = gae(costs, values_NH[:, 1], sequence, gae_lambda=settings.gae_lambda)
    advantages = combine(
        advantages,
        cost_advantages,
        constraint.unsafe[sequence],
        **_weighing(constraint),
    )
    return advantages, torch.stack([returns, cost_returns], dim=1)


def importance_facts(round_: Round, *, cap: float) -> dict[str, float]:
    """How far the trainer's log-probabilities of a round are from the sampler's, by metric name.

    Args:
        round_: with the trainer's log-probabilities.
        cap: of the importance weights; infinite where nothing is corrected.
    """
    assert round_.policy_logps is not None
    sampler = torch.from_numpy(np.concatenate([item.rollout.sampler_logps for item in round_.scored]))
    stats = policy_gradient.importance_stats(torch.from_numpy(round_.policy_logps), sampler, cap=cap).summary()
    return {f"importance/{name}": value for name, value in stats.items()}


def token_facts(round_: Round) -> dict[str, float]:
    """What the rewards of the tokens of a round say, by metric name.

    Args:
        round_: with rewards of tokens.

    Returns:
        Mean and deviation over tokens; `at_end`, the share of their sum of squares that last tokens hold, 1 where all
        reward stands at the end; and `gap`, mean of the rewards' sum less the response's score, reward units.
    """
    rewards, ends = round_.token_rewards, round_.offsets[1:] - 1
    sums = np.add.reduceat(rewards, round_.offsets[:-1])
    squares = float(np.square(rewards).sum())
    found = {
        "mean": rewards.mean(),
        "std": rewards.std(),
        "at_end": np.square(rewards[ends]).sum() / squares if squares else 0.0,
        "gap": (sums - round_.rewards).mean(),
    }
    return {f"actor/token_reward/{name}": float(value) for name, value in found.items()}


def gradient_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    round_: Round,
    targets: RoundTargets,
    prompts: np.ndarray,
    *,
    update: int,
    settings: TrainSection,
    gradient: PolicyGradientSection,
    packing: Packing,
    seed: int,
    world: World | None = None,
) -> GradientSummary:
    """Move the policy by one optimiser step on the responses to some prompts of a round.

    Args:
        policy: `PolicyForward`, plain or wrapped in DDP or FSDP2; with value heads for advantage=gae.
        optimizer: over its parameters.
        scheduler: stepped once.
        round_: the same on every worker.
        targets: of the round.
        prompts: positions in the round. Shape (B,).
        update: number of updates finished before this one.
        settings: optimiser constants.
        gradient: clipping and reduction.
        packing: how the worker's share is cut into micro-batches.
        seed: of the run.
        world: this worker; None for a single process.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are those before the update.
    """
    world = world or World()
    couples = couple_responses(round_, prompts)
    members = [position for prompt in prompts for position in round_.by_prompt[prompt]]
    num_tokens = int(np.diff(round_.offsets)[members].sum())
    part_weight = _part_weight(round_, targets, members, reduction=gradient.reduction)
    with seeded(seed, update, world):
        policy.train()
        optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=world.device)
        micro_batches = packing.plan(couples.tokens, world)
        for position, micro in enumerate(micro_batches):
            with gradient_sync(policy, is_last=position == len(micro_batches) - 1):
                packed = packing.pack(couples.tokens, micro, world)
                index = couples.token_index(round_, micro.indices)
                weight = torch.from_numpy(couples.token_weight(round_, micro.indices)).to(world.device) * micro.weight
                losses = _token_losses(policy(packed), targets, torch.from_numpy(index), gradient)
                if part_weight is not None:
                    losses["policy_loss"] = losses["policy_loss"] * part_weight[index].to(world.device)
                share = policy_gradient.reduce_loss(
                    sum(losses[name] for name in _LOSSES if name in losses) * weight,
                    reduction=gradient.reduction,
                    num_tokens=num_tokens,
                    num_sequences=len(members),
                )
                # DDP and FSDP average gradients over workers; the sum is what equals one large batch.
                (share * world.size).backward()  # type: ignore[no-untyped-call]
            sums += _sums(losses, weight, packed)
        sums = world.sum(sums).cpu()
    value_heads = unwrap(policy).value_heads
    heads = [] if value_heads is None else list(value_heads.parameters())
    body = [parameter for parameter in trainable(policy) if not any(parameter is head for head in heads)]
    grad_norm = clip_gradient(body, settings.max_grad_norm)
    clip_gradient(heads, settings.max_grad_norm)
    check_finite(sums[: len(_LOSSES)], grad_norm, update, learning_rate=settings.learning_rate, items="loss sums")
    learning_rate = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    return GradientSummary(
        sums=dict(zip(SUMS, sums.tolist(), strict=True)),
        num_responses=len(members),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
    )


def _token_losses(
    scores: PairScores, targets: RoundTargets, index: torch.Tensor, gradient: PolicyGradientSection
) -> dict[str, torch.Tensor]:
    """Losses (T,) of the scored tokens of one micro-batch."""
    assert scores.token_logps is not None
    device = scores.token_logps.device
    logps_old, advantages, importance = (
        values[index].to(device) for values in (targets.logps_old, targets.advantages, targets.importance)
    )
    policy_loss = policy_gradient.clipped_surrogate(
        scores.token_logps, logps_old, advantages, clip=gradient.clip, importance_weight=importance
    )
    value_losses = {}
    if targets.values_old is not None and targets.returns is not None and scores.token_values is not None:
        value_losses = {
            name: policy_gradient.value_loss(
                scores.token_values[:, head],
                targets.values_old[index, head].to(device),
                targets.returns[index, head].to(device),
                value_clip=gradient.value_clip,
            )
            for head, name in enumerate(_VALUE_LOSSES[: targets.returns.shape[1]])
        }
    # k3 of the policy before the round against the policy now: an estimate that is never negative
    _, policy_change = kl_estimates(logps_old, scores.token_logps)
    is_clipped = policy_gradient.is_clipped(scores.token_logps, logps_old, advantages, clip=gradient.clip)
    return {
        "policy_loss": policy_loss,
        **value_losses,
        "is_clipped": is_clipped.float(),
        "policy_change": policy_change.detach(),
    }


def _sums(losses: dict[str, torch.Tensor], weight: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
    """One entry per name of `SUMS`."""
    nothing = weight.new_zeros((), dtype=torch.float64)
    totals = [(losses[name].detach().double() * weight).sum() if name in losses else nothing for name in SUMS[:-2]]
    return torch.stack([*totals, weight.double().sum(), weight.new_tensor(packed.input_ids.numel()).double()])


def _part_weight(round_: Round, targets: RoundTargets, members: list[int], *, reduction: str) -> torch.Tensor | None:
    """(N,) weights that average the safe and the unsafe responses of an update apart; None for one mean."""
    if targets.unsafe is None:
        return None
    lengths = torch.from_numpy(np.diff(round_.offsets))
    size = lengths[members] if reduction == "token_global" else torch.ones(len(members))
    weight = torch.zeros(len(lengths))
    weight[members] = part_weights(targets.unsafe[members], size).float()
    return weight.repeat_interleave(lengths)
