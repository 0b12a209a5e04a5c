"""The rank phase: a belief about the margin of every pair, and the label confidence that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from raylign.config import ConfidenceSection
from raylign.rewards.confidence import pair_confidence
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import predict
from raylign.rewards.posterior import RewardPosterior, concat_posteriors, ensemble_posterior, margin_posterior
from raylign.runtime.features_job import states_from_column
from raylign.runtime.fitted_reward import FULL, FittedReward, FittedTexts, resolve_temperature
from raylign.runtime.text_rewards import HEAD_REWARD_COLUMNS, HEAD_SCALE_COLUMNS

if TYPE_CHECKING:
    import ray.data


def rank_pairs(
    pairs: ray.data.Dataset, *, reward: FittedReward | FittedTexts, confidence: ConfidenceSection
) -> ray.data.Dataset:
    """Add `types.RANK_COLUMNS` to every pair and drop what they were made of, lazily, one block at a time.

    Args:
        pairs: with hidden states; for a reward of texts, what its phase scored (`SCORED_DIR`).
        reward: fitted.
        confidence: how margins become confidence.
    """
    import ray

    shared = ray.put((reward, confidence))
    return pairs.map_batches(rank_table, batch_format="pyarrow", batch_size=256, fn_kwargs={"shared": shared})


def rank_table(table: pa.Table, *, shared: Any) -> pa.Table:
    """Score one block: training pairs by the head of their fold, all others by the full head."""
    import ray

    reward, confidence = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    if isinstance(reward, FittedTexts):
        scored = (*HEAD_REWARD_COLUMNS, *HEAD_SCALE_COLUMNS)
        used: tuple[str, ...] = (*(name for name in scored if name in table.column_names), "fold")
        fold = torch.from_numpy(table["fold"].to_numpy().astype(np.int64))
        chosen, rejected = scored_beliefs(table)
    else:
        used = ("chosen_states", "rejected_states")
        fold = pair_folds(table, num_folds=len(reward.heads), seed=reward.fold_seed)
        chosen, rejected = _beliefs(table, fold, reward)
    margin = margin_posterior(chosen, rejected)
    belief = pair_confidence(
        chosen.mean,
        rejected.mean,
        margin.variance,
        alpha=confidence.alpha,
        floor=confidence.floor,
        center=reward.center_of(fold) if confidence.center == "ema" else 0.0,
        level="pair",
        squash=confidence.squash,
        temperature=resolve_temperature(confidence, reward),
    )
    columns = {
        "chosen_reward": chosen.mean.numpy(),
        "rejected_reward": rejected.mean.numpy(),
        "margin_mean": belief.margin_mean.numpy(),
        "margin_variance": belief.margin_variance.numpy(),
        "label_confidence": belief.label_confidence.numpy(),
        "fold": fold.numpy().astype(np.int16),
        "weight": np.ones(len(fold), np.float32),
    }
    table = table.drop_columns(list(used))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def pair_folds(table: pa.Table, *, num_folds: int, seed: int) -> torch.Tensor:
    """Fold of each training pair, `FULL` of all others. Shape (B,), int64."""
    fold = grouped_folds(table["prompt_key"].to_pylist(), num_folds, seed)
    fold[torch.tensor([split != "train" for split in table["split"].to_pylist()], dtype=torch.bool)] = FULL
    return fold


def scored_beliefs(table: pa.Table) -> tuple[RewardPosterior, RewardPosterior]:
    """Beliefs about chosen and rejected responses from the members' rewards, and sigma if any, beside them."""
    chosen, rejected = (
        ensemble_posterior(_lists(table, name), _lists(table, scale) if scale in table.column_names else None)
        for name, scale in zip(HEAD_REWARD_COLUMNS, HEAD_SCALE_COLUMNS, strict=True)
    )
    return chosen, rejected


def _lists(table: pa.Table, name: str) -> torch.Tensor:
    return torch.from_numpy(np.stack(table[name].to_numpy(zero_copy_only=False)))


def _beliefs(table: pa.Table, fold: torch.Tensor, reward: FittedReward) -> tuple[RewardPosterior, RewardPosterior]:
    """Each pair by the head of its fold, in the order of the table."""
    rows, beliefs = [], []
    states = [torch.from_numpy(states_from_column(table[f"{name}_states"]).copy()) for name in ("chosen", "rejected")]
    for k in torch.unique(fold).tolist():
        rows.append((fold == k).nonzero()[:, 0])
        head = reward.full if k == FULL else reward.heads[k]
        beliefs.append([predict(head, side[rows[-1]]) for side in states])
    place = torch.cat(rows).argsort()
    chosen, rejected = (concat_posteriors(side)[place] for side in zip(*beliefs, strict=True))
    return chosen, rejected


def confidence_facts(gamma: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Counts and a histogram of the label confidence of the training pairs, for the manifest and the report."""
    values = np.asarray(gamma, np.float64)
    counts, edges = np.histogram(values, bins=20, range=(0, 1))
    return {
        "num_pairs": len(values),
        "num_flips": int((values < 0.5).sum()),
        "mean": float(values.mean()) if len(values) else None,
        "histogram": counts.tolist(),
        "edges": edges.tolist(),
    }
