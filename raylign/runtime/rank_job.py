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
from raylign.rewards.posterior import margin_posterior
from raylign.runtime.features_job import states_from_column
from raylign.runtime.fitted_reward import FittedReward, resolve_temperature

if TYPE_CHECKING:
    import ray.data

FULL = -1  # fold number of pairs that no head was fitted on: the head of all training pairs scores them


def rank_pairs(features: ray.data.Dataset, *, reward: FittedReward, confidence: ConfidenceSection) -> ray.data.Dataset:
    """Add `types.RANK_COLUMNS` to every pair and drop the states, lazily, one block at a time."""
    import ray

    shared = ray.put((reward, confidence))
    return features.map_batches(rank_table, batch_format="pyarrow", batch_size=1024, fn_kwargs={"shared": shared})


def rank_table(table: pa.Table, *, shared: Any) -> pa.Table:
    """Score one block: training pairs by the head of their fold, all others by the full head."""
    import ray

    reward, confidence = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    chosen = torch.from_numpy(states_from_column(table["chosen_states"]).copy())
    rejected = torch.from_numpy(states_from_column(table["rejected_states"]).copy())
    fold = grouped_folds(table["prompt_key"].to_pylist(), len(reward.heads), reward.fold_seed)
    fold[torch.tensor([split != "train" for split in table["split"].to_pylist()], dtype=torch.bool)] = FULL
    columns = _score(chosen, rejected, fold, reward, confidence)
    table = table.drop_columns(["chosen_states", "rejected_states"])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def _score(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    fold: torch.Tensor,
    reward: FittedReward,
    confidence: ConfidenceSection,
) -> dict[str, np.ndarray]:
    names = ("chosen_reward", "rejected_reward", "margin_mean", "margin_variance", "label_confidence")
    out = {name: np.zeros(len(fold), np.float32) for name in names}
    for k in fold.unique().tolist():
        rows = (fold == k).nonzero()[:, 0]
        head = reward.full if k == FULL else reward.heads[k]
        center = reward.full_center if k == FULL else reward.centers[k]
        of_chosen, of_rejected = predict(head, chosen[rows]), predict(head, rejected[rows])
        belief = pair_confidence(
            of_chosen.mean,
            of_rejected.mean,
            margin_posterior(of_chosen, of_rejected).variance,
            alpha=confidence.alpha,
            floor=confidence.floor,
            center=center if confidence.center == "ema" else 0.0,
            level="pair",
            squash=confidence.squash,
            temperature=resolve_temperature(confidence, reward),
        )
        values = (of_chosen.mean, of_rejected.mean, belief.margin_mean, belief.margin_variance, belief.label_confidence)
        for name, value in zip(names, values, strict=True):
            out[name][rows.numpy()] = value.numpy()
    return {**out, "fold": fold.numpy().astype(np.int16), "weight": np.ones(len(fold), np.float32)}


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
