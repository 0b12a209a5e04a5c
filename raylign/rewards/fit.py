r"""Fitting the hybrid reward on labelled pairs: ridge start, mini-batch AdamW, cross-fitting by prompt.

Features stay in the dtype they come in (float16 on disk) and are widened one layer or one mini-batch at a time.

Shape letters: N pairs, I items (answers, two a pair), L layers, D hidden width.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from raylign.errors import DataError, ShapeError
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.rewards.hybrid import HybridReward

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
        train_loss: mean over the epoch's batches in nats, nan at epoch 0.
        valid_loss: mean loss of the validation pairs in nats.
        valid_pair_accuracy: share of validation pairs with r(chosen) > r(rejected).
    """

    epoch: int
    train_loss: float
    valid_loss: float
    valid_pair_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridFit:
    """A fitted head and how it came about.

    Attributes:
        head: parameters of the best epoch, frozen (no gradient).
        best_epoch: the epoch with the highest validation pair accuracy; on a tie, the lowest validation loss.
        history: one record per epoch, from epoch 0.
    """

    head: HybridReward
    best_epoch: int
    history: tuple[FitEpoch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit:
    """Heads fitted without one fold each, and what they say about the fold that they did not see.

    Attributes:
        heads: one fit per fold; the only one is `full` when there is one fold.
        full: fit on all pairs, for answers outside the data.
        fold: (N,) int64, fold of each pair.
        chosen_reward: (N,) float32, by the head that did not see the pair's prompt.
        rejected_reward: (N,) float32, likewise.
    """

    heads: tuple[HybridFit, ...]
    full: HybridFit
    fold: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor


def fit_normalizer(chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Centre and scale of each layer over both answers of all pairs.

    Definition: \(\mu_l\) the mean state, \(\rho_l\) the root mean square of the coordinates of \(h_l - \mu_l\); 1 for a
    layer whose states are all equal.

    Args:
        chosen: hidden states. Shape (N, L, D), N at least 1.
        rejected: likewise.

    Returns:
        layer_mean (L, D) and layer_rms (L,), float32.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no pair, or states that are not finite.
    """
    _check_features(chosen, rejected)
    means, scales = [], []
    for layer in range(chosen.shape[1]):
        items_ID = torch.cat([chosen[:, layer], rejected[:, layer]]).double()
        mean_D = items_ID.mean(0)
        rms = (items_ID - mean_D).square().mean().sqrt()
        means.append(mean_D)
        scales.append(torch.where(rms == 0, 1.0, rms))
    layer_mean_LD, layer_rms_L = torch.stack(means).float(), torch.stack(scales).float()
    if not bool(torch.isfinite(layer_rms_L).all()):
        raise DataError("hidden states hold nan or infinity; float16 storage overflows beyond 65504")
    return layer_mean_LD, layer_rms_L


def ridge_probes(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    layer_mean: torch.Tensor,
    layer_rms: torch.Tensor,
    ridge: float,
) -> torch.Tensor:
    r"""Closed-form linear probe of each layer, target +1 for chosen and -1 for rejected answers.

    Definition: \(w_l = \arg\min_w \sum_i (w \cdot z_{il} - y_i)^2 + N \lambda |w|^2\) on normalised states. The targets
    sum to zero and the states are centred on these pairs, so the best bias is 0.

    Solved in float64 by Cholesky, in the D normal equations or, when there are fewer items than coordinates, in their
    dual of size 2N.

    Args:
        chosen: hidden states. Shape (N, L, D), N at least 1.
        rejected: likewise.
        layer_mean: of `fit_normalizer` on the same pairs. Shape (L, D).
        layer_rms: likewise. Shape (L,).
        ridge: \(\lambda\), penalty per pair, above 0.

    Returns:
        Probe weights on normalised states. Shape (L, D), float32.

    Raises:
        ShapeError: shapes differ or are not (N, L, D).
        DataError: no pair.

    Source: Hoerl and Kennard (1970); the start of the heads in docs/math.md.
    """
    _check_features(chosen, rejected)
    num_pairs, num_layers, width = chosen.shape
    target_I = torch.ones(2 * num_pairs, dtype=torch.float64, device=chosen.device)
    target_I[num_pairs:] = -1
    weights = []
    for layer in range(num_layers):
        states_ID = torch.cat([chosen[:, layer], rejected[:, layer]]).double()
        states_ID = (states_ID - layer_mean[layer]) / layer_rms[layer]
        if 2 * num_pairs < width:
            dual_I = _solve_ridge(states_ID @ states_ID.T, target_I, num_pairs * ridge)
            weights.append(states_ID.T @ dual_I)
        else:
            weights.append(_solve_ridge(states_ID.T @ states_ID, states_ID.T @ target_I, num_pairs * ridge))
    return torch.stack(weights).float()


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
    generator: torch.Generator,
) -> HybridFit:
    """Fit a hybrid reward: normaliser, ridge start of the probes, then AdamW on E2 + bce_weight x E3.

    Args:
        chosen: hidden states of preferred answers, any floating dtype. Shape (N, L, D), N at least 1.
        rejected: likewise of dispreferred answers.
        valid_chosen: pairs of other prompts that choose the epoch; keep reported numbers off them.
        valid_rejected: likewise.
        epochs: passes over the pairs; 0 keeps the ridge start with its random vote.
        batch_size: pairs of one step.
        learning_rate: AdamW step, constant.
        weight_decay: decoupled decay of all parameters.
        ridge: penalty per pair of the start.
        bce_weight: weight of the anchor.
        margin_target: margin asked for, reward units.
        train_probes: False trains the vote alone.
        generator: CPU generator of the vote's start and the order of pairs.

    Returns:
        The head of the best epoch and the history.

    Raises:
        ShapeError: features disagree in shape.
        DataError: no training pair, no validation pair, or states that are not finite.

    Source: arXiv:2503.10093; settings of docs/math.md rather than of the released code.
    """
    _check_features(valid_chosen, valid_rejected)
    num_pairs, num_layers, width = chosen.shape
    head = HybridReward(num_layers, width, generator=generator).to(chosen.device)
    head.layer_mean, head.layer_rms = fit_normalizer(chosen, rejected)
    with torch.no_grad():
        head.probe_weight.copy_(
            ridge_probes(chosen, rejected, layer_mean=head.layer_mean, layer_rms=head.layer_rms, ridge=ridge)
        )
    head.probe_weight.requires_grad_(train_probes)
    head.probe_bias.requires_grad_(train_probes)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, foreach=False)

    def pair_losses(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> torch.Tensor:
        ordered = margin_loss(chosen_reward, rejected_reward, margin_target=margin_target)
        return ordered + bce_weight * anchor_loss(chosen_reward, rejected_reward)

    def validated(epoch: int, train_loss: float) -> FitEpoch:
        chosen_reward, rejected_reward = rewards(head, valid_chosen), rewards(head, valid_rejected)
        return FitEpoch(
            epoch=epoch,
            train_loss=train_loss,
            valid_loss=float(pair_losses(chosen_reward, rejected_reward).mean()),
            valid_pair_accuracy=float((chosen_reward > rejected_reward).double().mean()),
        )

    history = [validated(0, float("nan"))]
    best_state = copy.deepcopy(head.state_dict())
    for epoch in range(1, epochs + 1):
        order_N = torch.randperm(num_pairs, generator=generator).to(chosen.device)
        losses = []
        for batch in torch.split(order_N, batch_size):
            chosen_reward, rejected_reward = head(torch.cat([chosen[batch], rejected[batch]])).chunk(2)
            loss = pair_losses(chosen_reward, rejected_reward).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        best = _best(history)
        history.append(validated(epoch, float(torch.stack(losses).mean())))
        if _best(history) != best:
            best_state = copy.deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    return HybridFit(head=head.requires_grad_(False), best_epoch=_best(history), history=tuple(history))


def rewards(head: HybridReward, features: torch.Tensor) -> torch.Tensor:
    """Rewards of many answers, a block at a time and without gradient.

    Args:
        head: fitted head.
        features: hidden states, any floating dtype. Shape (N, L, D).

    Returns:
        Shape (N,), float32.

    Raises:
        ShapeError: features of another number of layers or width.
    """
    with torch.no_grad():
        return torch.cat([head(block) for block in torch.split(features, _EVAL_PAIRS)])


def grouped_folds(groups: Sequence[str], num_folds: int, seed: int) -> torch.Tensor:
    """Fold of each item by a hash of its group alone: the same prompt is in the same fold in every data set and order.

    Args:
        groups: group key of each item, for example the prompt key. Length N.
        num_folds: folds, at least 1; their sizes are equal in expectation only.
        seed: another seed is another partition.

    Returns:
        Fold in [0, num_folds). Shape (N,), int64.
    """
    folds = {
        group: int.from_bytes(hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()) % num_folds
        for group in set(groups)
    }
    return torch.tensor([folds[group] for group in groups], dtype=torch.int64)


def cross_fit(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    groups: Sequence[str],
    *,
    valid_chosen: torch.Tensor,
    valid_rejected: torch.Tensor,
    num_folds: int,
    seed: int,
    **options: Unpack[FitOptions],
) -> CrossFit:
    """Score every pair with a head that never saw its prompt, and fit one head on all pairs.

    In-sample rewards confirm the stored labels, wrong ones included; out-of-fold rewards can contradict them.

    Args:
        chosen: hidden states. Shape (N, L, D).
        rejected: likewise.
        groups: prompt key of each pair. Length N.
        valid_chosen: pairs of prompts outside the data that choose each head's epoch.
        valid_rejected: likewise.
        num_folds: 1 scores the pairs with the head that saw them.
        seed: of the partition and of every fit.
        **options: passed to `fit_hybrid`.

    Returns:
        The fits, the folds and the rewards.

    Raises:
        ShapeError: features or groups disagree in length.
        DataError: a fold that holds all prompts, so that nothing is left to fit on.
    """
    _check_features(chosen, rejected)
    if len(groups) != len(chosen):
        raise ShapeError(f"{len(groups)} groups for {len(chosen)} pairs")

    def fitted(kept_N: torch.Tensor | slice) -> HybridFit:
        return fit_hybrid(
            chosen[kept_N],
            rejected[kept_N],
            valid_chosen=valid_chosen,
            valid_rejected=valid_rejected,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    full = fitted(slice(None))
    fold_N = grouped_folds(groups, num_folds, seed)
    if num_folds == 1:
        in_sample = rewards(full.head, chosen), rewards(full.head, rejected)
        return CrossFit(heads=(full,), full=full, fold=fold_N, chosen_reward=in_sample[0], rejected_reward=in_sample[1])
    chosen_N, rejected_N = (torch.empty(len(groups), device=chosen.device) for _ in range(2))
    fits = []
    for fold in range(num_folds):
        held_out_N = fold_N == fold
        if bool(held_out_N.all()):
            raise DataError(
                f"all {len(set(groups))} prompts fall into fold {fold} of {num_folds}: use more prompts or "
                "reward.folds=1"
            )
        fits.append(fitted(~held_out_N))
        if bool(held_out_N.any()):
            chosen_N[held_out_N] = rewards(fits[-1].head, chosen[held_out_N])
            rejected_N[held_out_N] = rewards(fits[-1].head, rejected[held_out_N])
    return CrossFit(heads=tuple(fits), full=full, fold=fold_N, chosen_reward=chosen_N, rejected_reward=rejected_N)


def _best(history: Sequence[FitEpoch]) -> int:
    """Highest validation pair accuracy, then lowest validation loss, then the earliest."""
    return min(history, key=lambda record: (-record.valid_pair_accuracy, record.valid_loss)).epoch


def _solve_ridge(gram: torch.Tensor, right: torch.Tensor, penalty: float) -> torch.Tensor:
    """Solution of (gram + penalty I) x = right, by Cholesky; overwrites the diagonal of gram."""
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(gram))[:, 0]


def _check_features(chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    if chosen.dim() != 3 or chosen.shape != rejected.shape:
        raise ShapeError(
            f"chosen {tuple(chosen.shape)} and rejected {tuple(rejected.shape)} features must both be (N, L, D)"
        )
    if len(chosen) == 0:
        raise DataError("a reward head needs at least one training pair and one validation pair")
