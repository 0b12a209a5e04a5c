"""Cached hidden states on the driver, for whatever fits heads on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from raylign.errors import DataError
from raylign.runtime.features_job import states_from_column

if TYPE_CHECKING:
    import ray.data

Pairs = tuple[torch.Tensor, torch.Tensor]  # chosen and rejected states, each (N, L, D)

VERDICT_COLUMNS = ("chosen_safe", "rejected_safe")
_STATE_COLUMNS = ("chosen_states", "rejected_states")
_ROWS = 256  # in a batch: states of large models are a megabyte a pair


@dataclass(frozen=True, kw_only=True)
class PairStates:
    """Cached states of the pairs that heads are fitted and judged on.

    Attributes:
        chosen: (N, L, D), float16 or float32.
        rejected: likewise.
        prompt_key: N keys; pairs of one prompt share one.
        split: N names.
        chosen_safe: N human verdicts, None where there is none; () when they were not asked for.
        rejected_safe: likewise.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    prompt_key: list[str]
    split: list[str]
    chosen_safe: Sequence[bool | None] = ()
    rejected_safe: Sequence[bool | None] = ()

    def part(self, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Chosen, rejected and prompt keys of one split."""
        rows = [i for i, name in enumerate(self.split) if name == split]
        if not rows:
            raise DataError(f"no pair in the {split!r} split; give more prompts or larger data.{split}_fraction")
        return self.chosen[rows], self.rejected[rows], [self.prompt_key[i] for i in rows]


def read_states(features: ray.data.Dataset, *, max_pairs: int, only_labelled: bool = False) -> PairStates:
    """Collect states on the driver, at most `max_pairs` pairs of each split.

    Which pairs are taken depends on hashes of their ids alone.

    Args:
        features: with states and splits.
        max_pairs: of each split; bounds memory.
        only_labelled: leave out pairs of which no answer has a safety verdict, and read the verdicts.

    Raises:
        DataError: no pair, none with a verdict where they are asked for, or two with one id.
    """
    names = ["row_id", "prompt_key", "split", *(VERDICT_COLUMNS if only_labelled else ())]
    index = pa.concat_tables(features.select_columns(names).iter_batches(batch_format="pyarrow", batch_size=None))
    num_rows = len(index)
    if only_labelled:
        index = index.filter(has_verdict(index))
    if not len(index):
        raise DataError(f"no pair{' with a safety verdict (chosen_safe, rejected_safe)' * only_labelled} to fit on")
    kept = _sample_ids(index, max_pairs)
    rows = features.select_columns(["row_id", *_STATE_COLUMNS])
    if len(kept) < num_rows:
        rows = rows.map_batches(_only, batch_format="pyarrow", batch_size=_ROWS, fn_kwargs={"kept": kept})
    table = index.filter(pc.is_in(index["row_id"], value_set=pa.array(kept)))
    table = table.take(pc.sort_indices(table, sort_keys=[("row_id", "ascending")]))
    chosen, rejected = _gather(rows, table["row_id"].to_pylist())
    return PairStates(
        chosen=chosen,
        rejected=rejected,
        prompt_key=table["prompt_key"].to_pylist(),
        split=table["split"].to_pylist(),
        **{name: table[name].to_pylist() for name in VERDICT_COLUMNS if only_labelled},
    )


def _only(batch: pa.Table, *, kept: Collection[str]) -> pa.Table:
    return batch.filter(pc.is_in(batch["row_id"], value_set=pa.array(kept)))


def _gather(rows: ray.data.Dataset, row_ids: Sequence[str]) -> list[torch.Tensor]:
    """States in the order of `row_ids`, each (N, L, D), with no more than a batch of them in memory twice."""
    places = {row_id: place for place, row_id in enumerate(row_ids)}
    if len(places) < len(row_ids):
        raise DataError(f"{len(row_ids) - len(places)} pairs have the row_id of another; ids must be unique")
    arrays: dict[str, np.ndarray] = {}
    for batch in rows.iter_batches(batch_format="pyarrow", batch_size=_ROWS):
        at = [places[row_id] for row_id in batch["row_id"].to_pylist()]
        for name in _STATE_COLUMNS:
            states = states_from_column(batch[name])
            arrays.setdefault(name, np.empty((len(row_ids), *states.shape[1:]), states.dtype))[at] = states
    return [torch.from_numpy(arrays[name]) for name in _STATE_COLUMNS]


def reversed_splits(train: Pairs, valid: Pairs, *, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Training and validation pairs with a share of their labels reversed; every fit of a seed reverses the same.

    Args:
        train: chosen and rejected states, each (N, L, D).
        valid: likewise.
        share: in [0, 1].
        seed: of the run.
    """
    return reversed_pairs(*train, share=share, seed=seed), reversed_pairs(*valid, share=share, seed=seed + 1)


def reversed_pairs(chosen: torch.Tensor, rejected: torch.Tensor, *, share: float, seed: int) -> Pairs:
    """The pairs with the order of exactly round(share x N) of them reversed, chosen by the seed.

    Args:
        chosen: (N, L, D).
        rejected: likewise.
        share: in [0, 1].
        seed: pairs reversed at a smaller share are reversed at a larger one too.
    """
    num_pairs = len(chosen)
    order = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(seed))
    is_reversed = torch.zeros(num_pairs, dtype=torch.bool)
    is_reversed[order[: round(share * num_pairs)]] = True
    mask = is_reversed[:, None, None]
    return torch.where(mask, rejected, chosen), torch.where(mask, chosen, rejected)


def has_verdict(table: pa.Table) -> pa.ChunkedArray:
    """Pairs of which one answer or both have a human safety verdict; bool."""
    chosen, rejected = (pc.is_valid(table[name]) for name in VERDICT_COLUMNS)
    return pc.or_(chosen, rejected)


def _sample_ids(index: pa.Table, max_pairs: int) -> list[str]:
    kept: list[str] = []
    for split in pc.unique(index["split"]):
        rows = index.filter(pc.equal(index["split"], split))
        ids, keys = rows["row_id"].to_pylist(), rows["prompt_key"].to_pylist()
        # in the order of the prompts' keys, which are hashes already
        kept += [row_id for _, row_id in sorted(zip(keys, ids, strict=True))[:max_pairs]]
    return kept
