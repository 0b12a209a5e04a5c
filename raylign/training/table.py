"""The ranked pairs a worker trains on: read once from parquet, addressed by row number.

Every worker reads the same rows in the same order (sorted by `row_id`, whatever the files' order), so that a row number
means the same pair on every worker and after every restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch

from raylign.errors import DataError, DataNotFoundError
from raylign.types import TOKEN_COLUMNS, Split, TokenizedPair

REQUIRED_COLUMNS = ("row_id", *TOKEN_COLUMNS, "ref_chosen_logps", "ref_rejected_logps")
OPTIONAL_COLUMNS = ("split", "label_confidence", "fold", "weight", "chosen_safe", "rejected_safe")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """B pairs of one update, the same on every worker.

    Attributes:
        tokens: token ids of each pair.
        ref_chosen_logps: (B,) summed reference log-probabilities, nats, float32.
        ref_rejected_logps: (B,) likewise.
        label_confidence: (B,) gamma of the data, float32, or None when the data have none.
        fold: (B,) head that may judge the pair, int64; -1 for pairs that no head was fitted on.
        weight: (B,) factor of the pair's loss, float32.
    """

    tokens: Sequence[TokenizedPair]
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    label_confidence: torch.Tensor | None
    fold: torch.Tensor
    weight: torch.Tensor

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.tokens)


class PairTable:
    """Columns of the pairs of one split.

    Args:
        table: arrow table with `REQUIRED_COLUMNS` and any of `OPTIONAL_COLUMNS`, in the order to be used.

    Raises:
        DataError: a column is missing or there is no row.
    """

    def __init__(self, table: pa.Table) -> None:
        missing = [name for name in REQUIRED_COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(f"training pairs lack the columns {missing}; they come from the features phase")
        if table.num_rows == 0:
            raise DataError("there is no pair to train on: the split is empty")
        self._tokens = {name: _ragged(table, name) for name in TOKEN_COLUMNS}
        self._ref_chosen_logps = _numbers(table, "ref_chosen_logps", np.float32)
        self._ref_rejected_logps = _numbers(table, "ref_rejected_logps", np.float32)
        self._label_confidence = (
            _numbers(table, "label_confidence", np.float32) if "label_confidence" in table.column_names else None
        )
        self._fold = _numbers(table, "fold", np.int64, default=-1)
        self._weight = _numbers(table, "weight", np.float32, default=1)
        self.fingerprint = self._digest(table["row_id"].to_pylist())

    def _digest(self, row_ids: Sequence[str]) -> str:
        """Hash over everything that training reads."""
        digest = hashlib.blake2b("\0".join(row_ids).encode(), digest_size=8)
        for values, offsets in self._tokens.values():
            digest.update(values.data)
            digest.update(offsets.data)
        numbers = (self._ref_chosen_logps, self._ref_rejected_logps, self._fold, self._weight, self._label_confidence)
        for column in numbers:
            digest.update(b"absent" if column is None else column.data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._weight)

    @property
    def has_label_confidence(self) -> bool:
        """Whether the data bring a gamma for every pair."""
        return self._label_confidence is not None and bool(np.isfinite(self._label_confidence).all())

    @property
    def max_fold(self) -> int:
        """Largest fold number, -1 when no pair has one."""
        return int(self._fold.max())

    def batch(self, rows: np.ndarray) -> PairBatch:
        """The pairs of the given row numbers, in that order."""
        gamma = self._label_confidence
        return PairBatch(
            tokens=[TokenizedPair(**{name: self._ids(name, row) for name in TOKEN_COLUMNS}) for row in rows],
            ref_chosen_logps=torch.from_numpy(self._ref_chosen_logps[rows]),
            ref_rejected_logps=torch.from_numpy(self._ref_rejected_logps[rows]),
            label_confidence=None if gamma is None else torch.from_numpy(gamma[rows]),
            fold=torch.from_numpy(self._fold[rows]),
            weight=torch.from_numpy(self._weight[rows]),
        )

    def _ids(self, name: str, row: int) -> np.ndarray:
        values, offsets = self._tokens[name]
        return values[offsets[row] : offsets[row + 1]]


def read_split(path: str | Path, split: Split) -> pa.Table:
    """Rows of one split from a directory of parquet files, sorted by `row_id`, with the columns training reads.

    Without a `split` column all rows count as "train".

    Raises:
        DataNotFoundError: the directory holds no parquet file.
        DataError: rows without an id, or two rows with the same id.
    """
    source = _open(path)
    columns = [name for name in REQUIRED_COLUMNS + OPTIONAL_COLUMNS if name in source.schema.names]
    if "split" in columns:
        table = source.to_table(columns=columns, filter=pc.field("split") == split)
    else:
        table = source.to_table(columns=columns)
        table = table if split == "train" else table.slice(0, 0)
    if pc.count_distinct(table["row_id"]).as_py() != table.num_rows:
        raise DataError(f"{path}: row_id is not unique in split {split!r}")
    return table.take(pc.sort_indices(table, sort_keys=[("row_id", "ascending")]))


def count_split(path: str | Path, split: Split) -> int:
    """Number of rows that `read_split` gives.

    Raises:
        DataNotFoundError: the directory holds no parquet file.
    """
    source = _open(path)
    if "split" not in source.schema.names:
        return source.count_rows() if split == "train" else 0
    return int(source.count_rows(filter=pc.field("split") == split))


def _open(path: str | Path) -> pads.Dataset:
    files = sorted(Path(path).rglob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise DataNotFoundError(f"{path} holds no parquet file of ranked pairs")
    source = pads.dataset([str(file) for file in files], format="parquet")
    if "row_id" not in source.schema.names:
        raise DataError(f"{path} has no row_id column; expected the output of the rank phase")
    return source


def anchor_pairs(table: pa.Table) -> pa.Table:
    """Pairs that say which answer is the safe one, by label and not by a head's opinion.

    Pairs with both safety labels and exactly one safe answer are used, safe answer as chosen. Data without any such
    label (hh-rlhf) fall back to the stored order of these held-out pairs, which is a human judgement as well.
    """
    if not {"chosen_safe", "rejected_safe"} <= set(table.column_names):
        return table
    chosen_safe, rejected_safe = table["chosen_safe"], table["rejected_safe"]
    decided = pc.fill_null(pc.xor(chosen_safe.cast(pa.bool_()), rejected_safe.cast(pa.bool_())), False)
    if not pc.any(decided).as_py():
        return table
    table = table.filter(decided)
    is_swapped = pc.invert(table["chosen_safe"].cast(pa.bool_()))
    for first, second in (("chosen_ids", "rejected_ids"), ("ref_chosen_logps", "ref_rejected_logps")):
        chosen, rejected = table[first], table[second]
        table = _replace(table, first, pc.if_else(is_swapped, rejected, chosen))
        table = _replace(table, second, pc.if_else(is_swapped, chosen, rejected))
    return table


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column, int32 and int64."""
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    if not isinstance(column, pa.ListArray | pa.LargeListArray) or column.null_count:
        raise DataError(f"column {name} must be lists of token ids without nulls, found {column.type}")
    offsets = np.asarray(column.offsets, np.int64)
    return np.asarray(column.values, np.int32), offsets


def _numbers(table: pa.Table, name: str, dtype: type, default: float | None = None) -> np.ndarray:
    """A column of numbers; absent or null entries become the default."""
    if name not in table.column_names:
        return np.full(table.num_rows, default, dtype)
    values = table[name]
    if default is not None:
        values = pc.fill_null(values, default)
    # a copy, because torch refuses to share arrow's read-only memory
    return np.array(values.to_numpy(), dtype)
