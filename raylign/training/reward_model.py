r"""Fine-tuning LoRA members of a reward model on preference pairs.

Each member has its own pairs, order and start. Without a diversity weight nothing couples them, so that members trained
together and members trained one by one end with the same weights; with one, a penalty on their stacked A matrices does,
and they must be trained together.

Shape letters: N pairs, B pairs of a batch, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.errors import ShapeError, TrainingError
from raylign.losses.diversity import lora_diversity
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.models.classifiers import ClassifierForward
from raylign.models.token_forward import TokenRewardForward
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.order import DataOrder
from raylign.types import Layout, PackedBatch, TokenizedPair


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberTraining:
    """How members are trained.

    Attributes:
        epochs: passes over a member's pairs.
        batch_size: pairs of one step, those with weight 0 included.
        learning_rate: peak step of AdamW, linear decay to 0, no weight decay.
        anchor_weight: weight of the anchor that gives all members one zero; 0 drops it.
        diversity_weight: weight of the normalised nuclear norm of the members' A matrices.
        batch_tokens: token budget of one forward.
        layout: of the rows, see `resolve_layout`.
        pad_token_id: fills rows.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    anchor_weight: float
    diversity_weight: float
    batch_tokens: int
    layout: Layout
    pad_token_id: int


Members = ClassifierForward | TokenRewardForward
# (forward, member, pairs, rows of the batch, weight of every pair, options) -> loss, its gradient added
Backward = Callable[[Any, str, Sequence[TokenizedPair], np.ndarray, torch.Tensor, MemberTraining], float]


def bradley_terry_backward(
    forward: ClassifierForward,
    name: str,
    pairs: Sequence[TokenizedPair],
    rows: np.ndarray,
    weights_N: torch.Tensor,
    options: MemberTraining,
) -> float:
    r"""Add the gradient of one member's batch and return its loss.

    Definition: \(\sum_i w_i \ell_i / B\) with \(\ell = -\log\sigma(r_c - r_r) + a\,(-\log\sigma(r_c) -
    \log\sigma(-r_r))\). Pairs of weight 0 cost nothing.

    Args:
        forward: the members, this one active.
        name: of the member.
        pairs: all N pairs.
        rows: those of the batch. Shape (B,), int64.
        weights_N: of each pair for this member.
        options: steps and losses.
    """
    total = 0.0
    for members, batch in weighted_batches(pairs, rows, weights_N, options, forward.device):
        chosen_B, rejected_B = forward.forward_pairs(batch)[:, :, 0]
        pair_loss_B = margin_loss(chosen_B, rejected_B, margin_target=0.0)
        pair_loss_B = pair_loss_B + options.anchor_weight * anchor_loss(chosen_B, rejected_B)
        loss = (weights_N[members].to(pair_loss_B.device) * pair_loss_B).sum() / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def weighted_batches(
    pairs: Sequence[TokenizedPair] | Mapping[int, TokenizedPair],
    rows: np.ndarray,
    weights_N: torch.Tensor,
    options: MemberTraining,
    device: torch.device,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """The pairs of a batch that count, in micro-batches.

    Args:
        pairs: by their rows, at least those of the batch.
        rows: those of the batch. Shape (B,), int64.
        weights_N: of each pair. Shape (N,).
        options: layout and token budget.
        device: gets the micro-batches.

    Yields:
        Rows of the pairs of a micro-batch, and the micro-batch.
    """
    kept = [int(row) for row in rows if weights_N[row] > 0]
    if not kept:
        return
    tokens = [pair_tokens(pairs[row], options.layout) for row in kept]
    (plan,) = plan_micro_batches(tokens, batch_tokens=options.batch_tokens, num_workers=1)
    for micro_batch in plan:
        members = [kept[position] for position in micro_batch.indices]
        batch = pack_pairs([pairs[row] for row in members], layout=options.layout, pad_token_id=options.pad_token_id)
        yield members, batch.to(device)


def train_members(
    forward: Members,
    names: Sequence[str],
    pairs: Sequence[TokenizedPair],
    *,
    options: MemberTraining,
    seeds: Sequence[int],
    weights: torch.Tensor | None = None,
    backward: Backward = bradley_terry_backward,
) -> torch.Tensor:
    r"""Train members in one loop.

    Each member minimises its own weighted mean loss, all of them together minus the diversity weight times
    `lora_diversity`.

    Args:
        forward: fresh members around a frozen model, see `add_members`; left in evaluation mode.
        names: of the M members to train.
        pairs: N pairs.
        options: steps and losses.
        seeds: of each member's order of pairs.
        weights: how often each member counts each pair; None counts all alike. Shape (N, M).
        backward: the loss.

    Returns:
        Mean loss of each member's updates in nats, without the diversity term. Shape (M, updates), float32.

    Raises:
        DataError: no pair.
        ShapeError: weights or seeds that are not one per member.
        TrainingError: a loss that is not finite.

    Source: Zhai et al. (2024), arXiv:2401.00243, without the penalty at scoring; the anchor is E3 in docs/math.md.
    """
    weights_NM = torch.ones(len(pairs), len(names)) if weights is None else weights
    if weights_NM.shape != (len(pairs), len(names)) or len(seeds) != len(names):
        raise ShapeError(
            f"weights {tuple(weights_NM.shape)} and {len(seeds)} seeds must be for {len(pairs)} pairs and "
            f"{len(names)} members"
        )
    orders = [
        DataOrder(num_pairs=len(pairs), batch_size=options.batch_size, seed=seed, epochs=options.epochs)
        for seed in seeds
    ]
    weights_NM = weights_NM / weights_NM.mean(0)
    forward.train()
    _require_gradients(forward, names)
    optimizer = build_optimizer(forward, learning_rate=options.learning_rate, weight_decay=0.0)
    num_updates = orders[0].num_updates
    scheduler = build_scheduler(optimizer, schedule="linear", num_updates=num_updates, warmup_fraction=0.0)
    losses_MU = torch.zeros(len(names), num_updates)
    for update in range(num_updates):
        for member, (name, order) in enumerate(zip(names, orders, strict=True)):
            forward.activate(name)
            _require_gradients(forward, names)
            losses_MU[member, update] = backward(
                forward, name, pairs, order.batch(update), weights_NM[:, member], options
            )
        if not bool(torch.isfinite(losses_MU[:, update]).all()):
            raise TrainingError(
                f"the loss of update {update + 1} of the reward model is {losses_MU[:, update].tolist()}; lower "
                "reward_model.learning_rate"
            )
        if options.diversity_weight and len(names) > 1:
            (-options.diversity_weight * lora_diversity(down_projections(forward, names))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    forward.eval().requires_grad_(False)
    return losses_MU


def down_projections(forward: Members, names: Sequence[str]) -> list[list[nn.Parameter]]:
    """A matrices (r, D) of the named members, layer by layer."""
    stacks: list[Any] = [module.lora_A for module in forward.model.modules() if hasattr(module, "lora_A")]
    return [[stack[name].weight for name in names] for stack in stacks]


def _require_gradients(forward: Members, names: Sequence[str]) -> None:
    """Of all members to train; peft keeps those of the active one alone."""
    for parameter_name, parameter in forward.named_parameters():
        if any(part in parameter_name for part in (".lora_", ".modules_to_save.", "heads.")):
            parameter.requires_grad_(any(f".{name}." in parameter_name for name in names))
