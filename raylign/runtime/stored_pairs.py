"""The pairs a training reads, when they came as a Dataset: written once, and compared when the training goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from raylign.errors import CheckpointError
from raylign.training.table import OPTIONAL_COLUMNS, REQUIRED_COLUMNS

if TYPE_CHECKING:
    import ray.data

_EXACT = ("row_id", "split", "prompt_ids", "chosen_ids", "rejected_ids", "fold", "chosen_safe", "rejected_safe")
_REAL = ("ref_chosen_logps", "ref_rejected_logps", "label_confidence", "weight")
# The same model on other block sizes gives float32 numbers that differ in the last digits.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def store_pairs(ranked: ray.data.Dataset, pairs: Path, *, is_continued: bool) -> None:
    """Write the columns that training reads; leave the files of a training that goes on, if they hold the same.

    Args:
        ranked: pairs of the rank phase.
        pairs: directory for the parquet files.
        is_continued: whether there is a checkpoint that was trained on the pairs stored there.

    Raises:
        CheckpointError: the training that goes on was started with other pairs.
    """
    done = pairs / "_SUCCESS"
    columns = [column for column in ranked.columns() or [] if column in REQUIRED_COLUMNS + OPTIONAL_COLUMNS]
    selected = ranked.select_columns(columns)
    if is_continued and done.exists():
        stored = pads.dataset([str(file) for file in sorted(pairs.rglob("*.parquet"))], format="parquet")
        difference = pairs_difference(
            stored.to_batches(), selected.iter_batches(batch_size=None, batch_format="pyarrow")
        )
        if difference:
            raise CheckpointError(
                f"{pairs} holds the pairs that this training was started with, the Dataset given now has others "
                f"({difference}); give the same Dataset, or start under a new run.name"
            )
        return
    done.unlink(missing_ok=True)
    selected.write_parquet(str(pairs), mode="overwrite")
    done.touch()


def pairs_difference(
    stored: Iterable[pa.RecordBatch | pa.Table], given: Iterable[pa.RecordBatch | pa.Table]
) -> str | None:
    """What differs between two sets of ranked pairs, in any order and however cut; None when nothing does.

    Numbers computed by a model (log-probs, gamma, weight) may differ by rounding.

    Args:
        stored: batches of columns in `REQUIRED_COLUMNS` and `OPTIONAL_COLUMNS`, read one after the other.
        given: likewise.
    """
    old, new = _read(stored), _read(given)
    if old.columns != new.columns:
        return f"columns {', '.join(sorted(old.columns ^ new.columns))}"
    if len(old.ids) != len(new.ids):
        return f"{len(old.ids)} pairs stored, {len(new.ids)} given"
    for ours, theirs in zip(old.ids, new.ids, strict=True):
        if ours != theirs:
            return f"pair {min(ours, theirs)} is only in one of them"
    for row, (our_digest, their_digest) in enumerate(zip(old.digests, new.digests, strict=True)):
        if our_digest != their_digest:
            return f"tokens, split, fold or safety labels of pair {old.ids[row]}"
    is_close = np.isclose(new.numbers, old.numbers, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
    if not is_close.all():
        row, column = np.argwhere(~is_close)[0]
        was, now = old.numbers[row, column], new.numbers[row, column]
        return f"{_REAL[column]} of pair {old.ids[row]}: was {was:.6g}, now {now:.6g}"
    return None


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """N pairs sorted by id: what must agree exactly as digests, and the numbers of `_REAL`, shape (N, 4)."""

    columns: frozenset[str]
    ids: list[str]
    digests: list[bytes]
    numbers: np.ndarray


def _read(batches: Iterable[pa.RecordBatch | pa.Table]) -> _Facts:
    columns: frozenset[str] = frozenset()
    ids: list[str] = []
    digests: list[bytes] = []
    numbers = [np.zeros((0, len(_REAL)))]
    for batch in batches:
        if batch.num_rows == 0:
            continue
        columns = frozenset(batch.schema.names)
        ids += batch["row_id"].to_pylist()
        exact = [batch[name].to_pylist() for name in _EXACT if name in columns]
        digests += [hashlib.blake2b(repr(row).encode(), digest_size=8).digest() for row in zip(*exact, strict=True)]
        numbers.append(np.stack([_column(batch, name) for name in _REAL], axis=1))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return _Facts(
        columns=columns,
        ids=[ids[row] for row in order],
        digests=[digests[row] for row in order],
        numbers=np.concatenate(numbers)[order],
    )


def _column(batch: pa.RecordBatch | pa.Table, name: str) -> np.ndarray:
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    numbers: np.ndarray = batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return numbers
