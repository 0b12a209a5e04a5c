"""One off-policy update: a batch of stored pairs in, moved weights out.

The batch is the same whatever the number of workers and however it is cut: the loss is the sum over pairs of weight
times loss, divided by the number of pairs of the whole batch. A mean over tokens is such a sum as well, because every
worker knows how many tokens the whole batch has. Accumulation never averages averages, and every number that is
reported or fed back (the running centre) is reduced from one value per pair, in the order of the batch.

Shape letter: B pairs of the update over all workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from raylign.config import TrainSection
from raylign.config_effects import AVA
from raylign.data.packing import MicroBatch
from raylign.errors import TrainingError
from raylign.losses import preference
from raylign.models.variational_policy import VariationalPolicy
from raylign.training.live_confidence import LiveConfidence
from raylign.training.micro_batches import Packing
from raylign.training.optim import trainable
from raylign.training.parallel import unwrap
from raylign.training.step import check_finite, clip_gradient, gradient_sync, seeded
from raylign.training.table import PairBatch
from raylign.training.update_costs import UpdateCosts
from raylign.training.variational import AVA_COLUMNS, SMALLEST_SIGMA, Variational
from raylign.training.world import World
from raylign.types import PairScores, TokenizedPair

# Rows of `PairValues`: one float64 per pair of the batch.
COLUMNS = (
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "confidence",
)
_EXTRA_SUMS = 2  # real tokens and row slots, reduced together with the columns


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSummary:
    """What one update did, the same on every worker.

    Attributes:
        columns: per-pair values by name (`COLUMNS`, for AVA also `AVA_COLUMNS`), each of shape (B,), float64, on the
            CPU.
        num_tokens: real tokens of the batch.
        num_slots: token slots computed for them, padding and fillers included.
        grad_norm: norm of the gradient before clipping.
        learning_rate: that the update used.
        facts: further numbers of the update by metric name.
    """

    columns: dict[str, torch.Tensor]
    num_tokens: int
    num_slots: int
    grad_norm: float
    learning_rate: float
    facts: dict[str, float] = field(default_factory=dict)


def offline_update(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    batch: PairBatch,
    *,
    update: int,
    settings: TrainSection,
    packing: Packing,
    seed: int,
    world: World | None = None,
    live: LiveConfidence | None = None,
    variational: Variational | None = None,
    is_logged: bool = False,
    costs: UpdateCosts | None = None,
) -> UpdateSummary:
    """Move the policy by one optimiser step on one batch.

    Args:
        policy: `PolicyForward` (`VariationalPolicy` for ava_p and ava_d), plain or wrapped in DDP or FSDP2; left in
            training mode.
        optimizer: over the policy's parameters.
        scheduler: stepped once.
        batch: all B pairs, the same on every worker.
        update: number of updates finished before this one; seeds dropout together with `seed` and the rank.
        settings: objective and its constants.
        packing: how the worker's share is cut into micro-batches.
        seed: of the run.
        world: this worker; None for a single process.
        live: confidence from the policy's current states; None uses the batch's column.
        variational: objective of ava_p and ava_d, needed by these alone.
        is_logged: measure also what is too dear for every update; moves no weight.
        costs: records what `live` computes beside the update.

    Returns:
        Summary over all workers.

    Raises:
        TrainingError: the loss or the gradient is not finite, or the objective lacks what it reads; the weights are
            those before the update.
    """
    world, costs = world or World(), costs or UpdateCosts()
    if settings.objective in AVA and not (variational is not None and isinstance(unwrap(policy), VariationalPolicy)):
        raise TrainingError(
            f"train.objective={settings.objective} needs a VariationalPolicy and a Variational objective"
        )
    names = COLUMNS if variational is None else (*COLUMNS, *AVA_COLUMNS, SMALLEST_SIGMA)
    with seeded(seed, update, world):
        if live is not None:
            with costs.nested("feature_forward"):
                live.begin_update(policy, batch)
        if variational is not None:
            variational.begin_update(policy, batch, packing=packing, is_logged=is_logged)
        policy.train()
        optimizer.zero_grad(set_to_none=True)
        values = torch.zeros(len(names) * batch.num_pairs + _EXTRA_SUMS, dtype=torch.float64, device=world.device)
        micro_batches = packing.plan(batch.tokens, world)
        for position, micro in enumerate(micro_batches):
            with gradient_sync(policy, is_last=position == len(micro_batches) - 1):
                packed = packing.pack(batch.tokens, micro, world)
                scores = policy(packed, layers=live.layers if live is not None else None)
                weight = batch.weight.to(world.device)[packed.pair_index] * micro.weight
                columns = _pair_values(scores, batch, micro, settings=settings, live=live)
                if variational is not None:
                    columns |= variational.losses(scores, weight, is_filler=not micro.weight)
                # DDP and FSDP average gradients over workers; the sum is what equals one large batch.
                loss = (columns["loss"] * weight).sum() * (world.size / batch.num_pairs)
                loss.backward()  # type: ignore[no-untyped-call]
            if micro.weight:
                _store(values, [columns[name] for name in names], packed.pair_index)
                values[-2] += packed.num_real_tokens
            values[-1] += packed.input_ids.numel()
        values = world.sum(values).cpu()
    columns = dict(zip(names, values[:-_EXTRA_SUMS].view(len(names), batch.num_pairs), strict=True))
    grad_norm = clip_gradient(trainable(policy), settings.max_grad_norm)
    check_finite(columns["loss"], grad_norm, update, learning_rate=settings.learning_rate)
    learning_rate = float(optimizer.param_groups[0]["lr"])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    if live is not None:
        with costs.nested("reward_head_update"):
            live.end_update(policy, update)
    facts = {} if variational is None else variational.end_update(columns.pop(SMALLEST_SIGMA))
    return UpdateSummary(
        columns=columns,
        num_tokens=int(values[-2]),
        num_slots=int(values[-1]),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        facts=facts,
    )


def pair_losses(margin: torch.Tensor, confidence: torch.Tensor | None, *, settings: TrainSection) -> torch.Tensor:
    """Loss per pair of the configured objective, for those that compare the policy with the reference.

    Args:
        margin: Delta, how much more than the reference the policy prefers the chosen response, nats. Shape (B,).
        confidence: gamma, read by label_confidence only. Shape (B,).
        settings: objective, beta, label_smoothing, ipo_tau.

    Returns:
        Loss per pair, not reduced. Shape (B,).

    Raises:
        TrainingError: label_confidence without gamma, or an objective that has no reference.
    """
    match settings.objective:
        case "dpo":
            return preference.dpo(margin, beta=settings.beta)
        case "cdpo":
            return preference.cdpo(margin, beta=settings.beta, label_smoothing=settings.label_smoothing)
        case "rdpo":
            return preference.rdpo(margin, beta=settings.beta, label_smoothing=settings.label_smoothing)
        case "ipo":
            return preference.ipo(margin, tau=settings.ipo_tau)
        case "label_confidence":
            if confidence is None:
                raise TrainingError("label_confidence needs gamma: run the rank phase, or set confidence.source=live")
            return preference.label_confidence(margin, confidence, beta=settings.beta)
    raise TrainingError(
        f"train.objective={settings.objective} reads no margin to a reference; it is no loss over pairs"
    )


def supervised_losses(chosen_logps: torch.Tensor, tokens: Sequence[TokenizedPair]) -> torch.Tensor:
    """Loss per pair whose mean over the batch is the negative log-likelihood of a token of a chosen response.

    Definition: -B log pi(y_c) / N, N the chosen responses' tokens in the whole batch.

    Args:
        chosen_logps: summed log-probabilities of the chosen responses of a micro-batch, nats. Shape (b,).
        tokens: all B pairs of the batch.

    Returns:
        Loss per pair, not reduced. Shape (b,).
    """
    num_tokens = sum(len(pair.chosen_ids) for pair in tokens)
    return chosen_logps * (-len(tokens) / num_tokens)


def _pair_values(
    scores: PairScores, batch: PairBatch, micro: MicroBatch, *, settings: TrainSection, live: LiveConfidence | None
) -> dict[str, torch.Tensor]:
    """Values of `COLUMNS` for the pairs of one micro-batch; the loss carries the gradient, and is 0 for AVA."""
    device = scores.chosen_logps.device
    index = torch.tensor(micro.indices, device=device)
    reference_chosen = batch.ref_chosen_logps.to(device)[index]
    reference_rejected = batch.ref_rejected_logps.to(device)[index]
    margin = preference.logp_margin(scores.chosen_logps, scores.rejected_logps, reference_chosen, reference_rejected)
    if live is not None:
        confidence = live.confidence(scores, index, is_filler=not micro.weight)
    elif batch.label_confidence is not None:
        confidence = batch.label_confidence.to(device)[index]
    else:
        confidence = None
    match settings.objective:
        case "ava_p" | "ava_d":
            loss, scale = torch.zeros_like(margin), 1.0
        case "sft":
            loss, scale = supervised_losses(scores.chosen_logps, batch.tokens), 1.0
        case objective:
            loss = pair_losses(margin, confidence, settings=settings)
            scale = settings.ipo_tau if objective == "ipo" else settings.beta
    return {
        "loss": loss,
        "chosen_logps": scores.chosen_logps.detach(),
        "rejected_logps": scores.rejected_logps.detach(),
        "chosen_rewards": preference.implicit_reward(scores.chosen_logps, reference_chosen, beta=scale),
        "rejected_rewards": preference.implicit_reward(scores.rejected_logps, reference_rejected, beta=scale),
        "confidence": torch.ones_like(margin) if confidence is None else confidence,
    }


def _store(values: torch.Tensor, columns: Sequence[torch.Tensor], index: torch.Tensor) -> None:
    """Put the columns of a micro-batch in place of its pairs."""
    rows = values[:-_EXTRA_SUMS].view(len(columns), -1)
    rows[:, index] = torch.stack([column.detach().double() for column in columns])
