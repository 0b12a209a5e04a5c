"""Prompts of the online methods. A list of rows stands in for the data set; Ray itself is not started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raylign.errors import DataError
from raylign.runtime import prompts as prompts_module
from raylign.runtime.prompts import PromptCounts, collect_prompts, prompts_fingerprint, read_prompts, write_prompts


class StoredPairs:
    """As much of `ray.data.Dataset` as is read: chosen columns, in batches of numpy arrays."""

    def __init__(self, rows: Sequence[dict[str, Any]], *, batch_size: int = 3) -> None:
        self.rows = rows
        self.batch_size = batch_size

    def select_columns(self, columns: list[str]) -> StoredPairs:
        return StoredPairs([{name: row[name] for name in columns} for row in self.rows], batch_size=self.batch_size)

    def iter_batches(self, *, batch_format: str) -> Iterator[dict[str, np.ndarray]]:
        assert batch_format == "numpy"
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            batch = {}
            for name in rows[0]:
                batch[name] = np.empty(len(rows), object)
                batch[name][:] = [row[name] for row in rows]
            yield batch


def row(key: str, ids: Sequence[int], split: str = "train") -> dict[str, Any]:
    return {"prompt_key": key, "split": split, "prompt_ids": np.array(ids, np.int32), "chosen": "not read"}


def as_lists(prompts: Sequence[np.ndarray]) -> list[list[int]]:
    return [ids.tolist() for ids in prompts]


def test_training_prompts_come_once_each_in_the_order_of_their_keys():
    """Pairs share prompts, within a batch and across batches, and blocks arrive in any order."""
    rows = [
        row("c", [7, 8, 9]),
        row("a", [1, 2]),
        row("a", [1, 2]),
        row("v", [5], "valid"),
        row("c", [7, 8, 9]),
        row("t", [6], "test"),
        row("b", [3]),
    ]
    for stored in (rows, rows[::-1]):
        prompts, counts = collect_prompts(StoredPairs(stored), max_prompt_tokens=None)
        assert as_lists(prompts) == [[1, 2], [3], [7, 8, 9]]
        assert {ids.dtype for ids in prompts} == {np.dtype(np.int32)}
        assert counts == PromptCounts(used=3, too_long=0)


def test_prompts_without_room_for_a_response_are_counted_once_each():
    rows = [
        row("d", [1] * 4),
        row("b", [2] * 5),
        row("a", [3] * 6),
        row("a", [3] * 6),
        row("c", [4] * 9),
        row("v", [5] * 9, "valid"),
    ]
    prompts, counts = collect_prompts(StoredPairs(rows), max_prompt_tokens=5)
    assert as_lists(prompts) == [[2] * 5, [1] * 4]  # five tokens are just short enough
    assert counts == PromptCounts(used=2, too_long=2)


@pytest.mark.parametrize(
    ("rows", "num_too_long"),
    [([row("a", [1, 2, 3]), row("b", [1, 2, 3, 4])], 2), ([row("a", [1], "valid"), row("b", [1], "test")], 0), ([], 0)],
    ids=["too_long", "held_out", "empty"],
)
def test_no_prompt_left_is_a_data_error(rows, num_too_long):
    with pytest.raises(DataError, match=rf"no training prompt .*: {num_too_long} leave no .*sampler\.max_new_tokens"):
        collect_prompts(StoredPairs(rows), max_prompt_tokens=2)


@pytest.fixture
def prompts() -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in ([9, 2, 70_000], [4], [1, 1])]


def test_prompts_survive_the_file_in_order(tmp_path, prompts):
    file = tmp_path / "prompts.parquet"
    write_prompts([np.array([3], np.int32)] * 5, file)
    write_prompts(prompts, file)
    for found in (read_prompts(file), read_prompts(str(file))):
        assert as_lists(found) == as_lists(prompts)
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
        assert prompts_fingerprint(found) == prompts_fingerprint(prompts)
    assert list(tmp_path.iterdir()) == [file]


def test_interrupted_write_leaves_the_prompts_that_were_there(tmp_path, prompts, monkeypatch):
    file = tmp_path / "prompts.parquet"
    write_prompts(prompts, file)

    def die_half_way(table: pa.Table, where: Path) -> None:
        Path(where).write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(prompts_module.pq, "write_table", die_half_way)
    with pytest.raises(OSError, match="disk full"):
        write_prompts(prompts[:1], file)
    assert as_lists(read_prompts(file)) == as_lists(prompts)


@pytest.mark.parametrize(
    "other",
    [
        [[4], [9, 2, 70_000], [1, 1]],
        [[9, 2], [70_000, 4], [1, 1]],
        [[9, 2, 70_000], [4], [1, 2]],
        [[9, 2, 70_000], [4]],
    ],
    ids=["order", "border", "token", "missing"],
)
def test_fingerprint_tells_prompts_apart(prompts, other):
    assert prompts_fingerprint([np.array(ids, np.int32) for ids in other]) != prompts_fingerprint(prompts)


def test_fingerprint_is_of_the_ids_and_not_of_their_type(prompts):
    assert prompts_fingerprint([ids.astype(np.int64) for ids in prompts]) == prompts_fingerprint(prompts)
