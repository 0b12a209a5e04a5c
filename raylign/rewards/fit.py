r"""Fitting hybrid rewards on labelled pairs: ridge start, then mini-batch AdamW, all members in one pass.

The members of an ensemble share every read of the features and every batched product, and are otherwise separate: the
loss is a sum over members of losses of their own parameters, and AdamW works on each number alone, so that M members
in one pass are the M members of M passes. The first members of a larger ensemble are the members of a smaller one.

Shape letters: N pairs, B pairs of a batch, M members, L layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from raylign.errors import DataError, TrainingError
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.rewards.hybrid import HybridReward, standardize
from raylign.rewards.posterior import RewardHead, RewardPosterior, concat_posteriors
from raylign.rewards.probes import check_pairs, fit_normalizer, ridge_probes

HeadData = Literal["bootstrap", "shards", "all"]

_EVAL_PAIRS = 256  # pairs widened to float32 at a time when only rewards are needed


class FitOptions(TypedDict):
    """How `fit_hybrid` fits, for functions that pass it on; the fields are its arguments."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    ridge: float
    bce_weight: float
    margin_target: float
    train_probes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FitEpoch:
    """State of a fit after an epoch; epoch 0 is the ridge start.

    Attributes:
        epoch: passes over the training pairs so far.
        train_loss: mean over the epoch's batches in nats, nan at epoch 0. Shape (M,).
        valid_loss: mean loss of the validation pairs in nats. Shape (M,).
        valid_accuracy: share of validation pairs with r(chosen) > r(rejected); of costs, see `fit_cost`. Shape (M,).
    """

    epoch: int
    train_loss: torch.Tensor
    valid_loss: torch.Tensor
    valid_accuracy: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridFit:
    """Fitted members and how they came about.

    Attributes:
        head: each member with the parameters of its best epoch, frozen (no gradient).
        best_epochs: of each member, the epoch with the highest validation pair accuracy; on a tie, the lowest
            validation loss, then the earliest.
        history: one record per epoch, from epoch 0.
    """

    head: HybridReward
    best_epochs: tuple[int, ...]
    history: tuple[FitEpoch, ...]


def member_weights(num_pairs: int, num_heads: int, *, head_data: HeadData, seed: int) -> torch.Tensor | None:
    """Which pairs each member is fitted to, and how often it counts them.

    Args:
        num_pairs: N.
        num_heads: M.
        head_data: "bootstrap" draws Poisson(1) counts, "shards" leaves a member all pairs but every M-th of a random
            order, "all" gives all members all pairs, so that they differ by their start alone.
        seed: of the draws; those of a member do not depend on M.

    Returns:
        Weight of each pair for each member, at least one above 0 for each. Shape (N, M), float32; None for "all".

    Raises:
        DataError: shards of a single member, or of fewer pairs than members.

    Source: Oza and Russell (2001), online bagging; Coste et al. (2023), arXiv:2310.02743, for "all".
    """
    if head_data == "all":
        return None
    if head_data == "shards":
        if not 2 <= num_heads <= num_pairs:
            raise DataError(
                f"reward.head_data=shards needs two members or more and as many pairs, got {num_heads} members and "
                f"{num_pairs} pairs; use bootstrap or all"
            )
        order_N = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
        return (order_N[:, None] % num_heads != torch.arange(num_heads)).float()
    columns = []
    for member in range(num_heads):
        generator = _member_generator(seed, member + 1)
        column_N = torch.poisson(torch.ones(num_pairs), generator=generator)
        columns.append(column_N if bool(column_N.any()) else torch.ones(num_pairs))
    return torch.stack(columns, dim=1)


def fit_hybrid(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    valid_chosen: torch.Tensor,
    valid_rejected: torch.Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    ridge: float,
    bce_weight: float,
    margin_target: float,
    train_probes: bool,
    seed: int,
    num_heads: int = 1,
    weights: torch.Tensor | None = None,
    is_standardized: bool = False,
) -> HybridFit:
    """Fit hybrid rewards: normaliser, ridge start of the probes, then AdamW on E2 + bce_weight x E3.

    Args:
        chosen: hidden states of preferred answers, any floating dtype. Shape (N, L, D), N at least 1.
        rejected: likewise of dispreferred answers.
        valid_chosen: pairs of other prompts that choose the epochs; keep reported numbers off them.
        valid_rejected: likewise.
        epochs: passes over the pairs; 0 keeps the ridge start with its random vote.
        batch_size: pairs of one step.
        learning_rate: AdamW step, constant.
        weight_decay: decoupled decay of all parameters.
        ridge: penalty per pair of the start.
        bce_weight: weight of the anchor.
        margin_target: margin asked for by the pair loss, reward units.
        train_probes: False trains the votes alone.
        seed: of the order of pairs, the same for all members, and of the members' starts, each its own.
        num_heads: M.
        weights: of `member_weights`; None counts all pairs alike. Shape (N, M).
        is_standardized: give all members the same mean and spread on the validation pairs.

    Returns:
        The members at their best epochs and the history.

    Raises:
        ShapeError: features disagree in shape.
        DataError: no training pair, no validation pair, or states that are not finite.

    Source: arXiv:2503.10093; settings of docs/math.md rather than of the released code.
    """
    check_pairs(chosen, rejected)
    check_pairs(valid_chosen, valid_rejected)
    num_pairs, num_layers, width = chosen.shape
    order = torch.Generator().manual_seed(seed)
    head = start_members(num_layers, width, order=order, seed=seed, num_heads=num_heads).to(chosen.device)
    head.layer_mean, head.layer_rms = fit_normalizer(chosen, rejected)
    weights = None if weights is None else weights.to(chosen.device)
    with torch.no_grad():
        normal = {"layer_mean": head.layer_mean, "layer_rms": head.layer_rms}
        head.probe_weight.copy_(ridge_probes(chosen, rejected, **normal, ridge=ridge, weights=weights))
    head.probe_weight.requires_grad_(train_probes)
    head.probe_bias.requires_grad_(train_probes)

    def pair_losses(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> torch.Tensor:
        ordered = margin_loss(chosen_reward, rejected_reward, margin_target=margin_target)
        return ordered + bce_weight * anchor_loss(chosen_reward, rejected_reward)

    def batch_losses(rows: torch.Tensor) -> torch.Tensor:
        return pair_losses(*head.head_rewards(torch.cat([chosen[rows], rejected[rows]])).chunk(2))

    def validated() -> tuple[torch.Tensor, torch.Tensor]:
        chosen_NM, rejected_NM = (predict(head, part).head_rewards for part in (valid_chosen, valid_rejected))
        return pair_losses(chosen_NM, rejected_NM).mean(0), (chosen_NM > rejected_NM).double().mean(0)

    fit = train_members(
        head,
        num_rows=num_pairs,
        batch_losses=batch_losses,
        validated=validated,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        order=order,
        weights=weights,
        is_better=_has_higher_accuracy,
    )
    if is_standardized:
        standardize(head, torch.cat([valid_chosen, valid_rejected]))
    return fit


def train_members(
    head: HybridReward,
    *,
    num_rows: int,
    batch_losses: Callable[[torch.Tensor], torch.Tensor],
    validated: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    order: torch.Generator,
    weights: torch.Tensor | None,
    is_better: Callable[[FitEpoch, FitEpoch], torch.Tensor],
) -> HybridFit:
    """Mini-batch AdamW from where the members stand; each keeps the parameters of its best epoch.

    Args:
        head: members at their start; trained in place and frozen. Parameters without gradient stay as they are.
        num_rows: N, what one epoch passes over.
        batch_losses: losses of the rows at given positions, (B,) int64, by each member. Shape (B, M).
        validated: validation loss and accuracy of each member as it stands. Shape (M,) each.
        epochs: passes over the rows.
        batch_size: rows of one step.
        learning_rate: AdamW step, constant.
        weight_decay: decoupled decay of all parameters.
        order: of the rows, the same for all members.
        weights: of `member_weights`; None counts all rows alike. Shape (N, M).
        is_better: members whose epoch (first) is better than their best so far (second). Shape (M,), bool.
    """
    num_heads, device = head.num_heads, head.probe_weight.device
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, foreach=False)
    # A member's mean weight instead of the batch's keeps its steps unbiased however the batches are cut.
    scaled = None if weights is None else weights / weights.mean(0)

    def record_of(epoch: int, train_loss_M: torch.Tensor) -> FitEpoch:
        valid_loss_M, valid_accuracy_M = validated()
        return FitEpoch(epoch=epoch, train_loss=train_loss_M, valid_loss=valid_loss_M, valid_accuracy=valid_accuracy_M)

    best = record_of(0, torch.full((num_heads,), float("nan")))
    history = [best]
    best_epoch_M = torch.zeros(num_heads, dtype=torch.int64)
    best_state = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    for epoch in range(1, epochs + 1):
        order_N = torch.randperm(num_rows, generator=order).to(device)
        losses = []
        for batch in torch.split(order_N, batch_size):
            losses_BM = batch_losses(batch)
            loss_M = (losses_BM if scaled is None else losses_BM * scaled[batch]).mean(0)
            optimizer.zero_grad()
            loss_M.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss_M.detach())
        check_finite(losses, epoch)
        record = record_of(epoch, torch.stack(losses).mean(0))
        history.append(record)
        is_better_M = is_better(record, best)
        best = _keep(best, record, is_better_M)
        best_epoch_M[is_better_M.cpu()] = epoch
        for name, parameter in head.named_parameters():
            best_state[name][is_better_M] = parameter.detach()[is_better_M]
    head.load_state_dict(best_state, strict=False)
    return HybridFit(head=head.requires_grad_(False), best_epochs=tuple(best_epoch_M.tolist()), history=tuple(history))


def check_finite(losses: Sequence[torch.Tensor], epoch: int) -> None:
    """Refuse to go on with members that diverged: their best epoch would be their start, and look like a fit.

    Args:
        losses: of an epoch, each (M,).
        epoch: its number.

    Raises:
        TrainingError: a loss that is not finite.
    """
    bad = torch.stack(list(losses)).isfinite().logical_not().any(0).nonzero()[:, 0].tolist()
    if bad:
        raise TrainingError(
            f"the loss of {len(bad)} of {losses[0].numel()} members (from member {bad[0]}) is not finite in epoch "
            f"{epoch} of their fit: lower its learning_rate, and look for states that are not finite"
        )


def start_members(
    num_layers: int, hidden_size: int, *, order: torch.Generator, seed: int, num_heads: int
) -> HybridReward:
    """M members with a random start of their own; that of a member does not depend on M.

    Args:
        num_layers: L.
        hidden_size: D.
        order: the stream of the fit, from which member 0 starts.
        seed: of the streams of the others.
        num_heads: M.
    """
    starts = [order, *(_member_generator(seed, -member) for member in range(1, num_heads))]
    return HybridReward(num_layers, hidden_size, generators=starts)


def predict(head: RewardHead, features: torch.Tensor) -> RewardPosterior:
    """Belief about the rewards of many answers, a block at a time and without gradient.

    Args:
        head: fitted head.
        features: hidden states, any floating dtype. Shape (n, L, D).

    Raises:
        ShapeError: features of another number of layers or width.
    """
    with torch.no_grad():
        return concat_posteriors([head(block) for block in torch.split(features, _EVAL_PAIRS)])


def _has_higher_accuracy(record: FitEpoch, best: FitEpoch) -> torch.Tensor:
    """Members with a higher validation pair accuracy, or the same and a lower loss. Shape (M,), bool."""
    higher_M = record.valid_accuracy > best.valid_accuracy
    tied_M = record.valid_accuracy == best.valid_accuracy
    return higher_M | (tied_M & (record.valid_loss < best.valid_loss))


def _keep(best: FitEpoch, record: FitEpoch, is_better_M: torch.Tensor) -> FitEpoch:
    return FitEpoch(
        epoch=record.epoch,
        train_loss=record.train_loss,
        valid_loss=torch.where(is_better_M, record.valid_loss, best.valid_loss),
        valid_accuracy=torch.where(is_better_M, record.valid_accuracy, best.valid_accuracy),
    )


def _member_generator(seed: int, stream: int) -> torch.Generator:
    """A stream of its own for a member; member 0 starts from the stream of the run."""
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)
