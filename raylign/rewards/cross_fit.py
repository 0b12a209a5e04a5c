"""Scoring pairs with heads that never saw their prompt.

Shape letters: N pairs, L layers, D hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.fit import predict
from raylign.rewards.posterior import MarginPosterior, RewardHead, RewardPosterior, concat_posteriors, margin_posterior
from raylign.rewards.probes import check_pairs

Head = TypeVar("Head", bound=RewardHead)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFit(Generic[Head]):
    """Heads fitted without one fold each, and what they say about the fold that they did not see.

    Attributes:
        heads: one per fold; the only one is `full` when there is one fold.
        full: fitted on all pairs, for answers outside the data.
        fold: (N,) int64, fold of each pair.
        chosen: belief about N answers, each by the head that did not see the pair's prompt.
        rejected: likewise.
    """

    heads: tuple[Head, ...]
    full: Head
    fold: torch.Tensor
    chosen: RewardPosterior
    rejected: RewardPosterior

    @property
    def margin(self) -> MarginPosterior:
        """Of the N pairs."""
        return margin_posterior(self.chosen, self.rejected)


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


def checked_folds(groups: Sequence[str], num_folds: int, seed: int) -> torch.Tensor:
    """`grouped_folds` that leave something to fit on whichever fold is left out.

    Raises:
        DataError: a fold that holds all groups.
    """
    fold_N = grouped_folds(groups, num_folds, seed)
    if num_folds > 1 and len(groups) and bool((fold_N == fold_N[0]).all()):
        raise DataError(
            f"all {len(set(groups))} prompts fall into fold {int(fold_N[0])} of {num_folds}: use more prompts or "
            "reward.folds=1"
        )
    return fold_N


def cross_fit(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    groups: Sequence[str],
    *,
    num_folds: int,
    seed: int,
    fit: Callable[[torch.Tensor], Head],
) -> CrossFit[Head]:
    """Score every pair with a head that never saw its prompt, and fit one head on all pairs.

    In-sample rewards confirm the stored labels, wrong ones included; out-of-fold rewards can contradict them.

    Args:
        chosen: hidden states. Shape (N, L, D).
        rejected: likewise.
        groups: prompt key of each pair. Length N.
        num_folds: 1 scores the pairs with the head that saw them.
        seed: of the partition.
        fit: fits a head on the pairs at the given positions, (n,) int64.

    Returns:
        The heads, the folds and the rewards.

    Raises:
        ShapeError: features or groups disagree in length.
        DataError: a fold that holds all prompts, so that nothing is left to fit on.
    """
    check_pairs(chosen, rejected)
    if len(groups) != len(chosen):
        raise ShapeError(f"{len(groups)} groups for {len(chosen)} pairs")
    fold_N = checked_folds(groups, num_folds, seed)
    full = fit(torch.arange(len(chosen)))
    if num_folds == 1:
        return CrossFit(
            heads=(full,), full=full, fold=fold_N, chosen=predict(full, chosen), rejected=predict(full, rejected)
        )
    heads, rows, beliefs = [], [], []
    for fold in range(num_folds):
        is_held_out_N = fold_N == fold
        heads.append(fit((~is_held_out_N).nonzero()[:, 0]))
        held_out = is_held_out_N.nonzero()[:, 0]
        rows.append(held_out)
        beliefs.append((predict(heads[-1], chosen[held_out]), predict(heads[-1], rejected[held_out])))
    place_N = torch.cat(rows).argsort()
    return CrossFit(
        heads=tuple(heads),
        full=full,
        fold=fold_N,
        chosen=concat_posteriors([belief[0] for belief in beliefs])[place_N],
        rejected=concat_posteriors([belief[1] for belief in beliefs])[place_N],
    )
