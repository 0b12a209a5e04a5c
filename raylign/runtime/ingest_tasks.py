"""What the tasks of ingest do; plain functions on arrow tables and files, so they are tested without Ray.

A part is the rows of one chunk. Its staged files are `<part>.parquet` (valid rows) and `<part>.jsonl` (refused rows);
finishing it writes the used rows under the same name and adds the duplicates to the refused ones.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.config import DataSection
from raylign.data.canonical import HASH_COLUMNS, apply_verdicts, canonicalize, row_hashes, to_table
from raylign.data.sources import RawLine, read_lines
from raylign.data.splits import RowHashes
from raylign.models.loading import load_tokenizer
from raylign.types import QuarantinedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 512
_CHUNK_BYTES = 8 << 20  # also ends a chunk, so that one of long rows does not fill a task's memory

_CHUNK = pa.schema(
    [
        ("part", pa.string()),
        ("path", pa.string()),
        ("lines", pa.list_(pa.int64())),
        ("contents", pa.list_(pa.binary())),
    ]
)
STAGED_RECORD = pa.schema(
    [("part", pa.string()), ("path", pa.string()), ("num_rows", pa.int64()), ("num_valid", pa.int64())]
)
FINISHED_RECORD = pa.schema(
    [
        ("part", pa.string()),
        ("splits", pa.list_(pa.string())),
        ("reasons", pa.list_(pa.string())),
        ("num_cut", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class IngestTask:
    """What every task is told; small, because it is pickled into each of them.

    Attributes:
        config: the `data` section.
        model_path: directory of the tokenizer.
        trust_remote_code: let the tokenizer run code of its own.
        staging: directory of the staged parts.
        pairs: directory of the finished parts.
    """

    config: DataSection
    model_path: str
    trust_remote_code: bool
    staging: Path
    pairs: Path


def read_chunks(plan: pa.Table) -> Iterator[pa.Table]:
    """Chunks of raw lines of one file, one row each, so that they can be handed to tasks one by one.

    Args:
        plan: one row; number of the file in the data, where to read it, the path it is reported under.
    """
    (entry,) = plan.to_pylist()
    chunk: list[RawLine] = []
    number = num_bytes = 0
    for raw in read_lines(entry["read"]):
        chunk.append(raw)
        num_bytes += len(raw.content)
        if len(chunk) == CHUNK_ROWS or num_bytes >= _CHUNK_BYTES:
            yield _chunk_table(entry["file"], number, entry["path"], chunk)
            chunk, number, num_bytes = [], number + 1, 0
    if chunk:
        yield _chunk_table(entry["file"], number, entry["path"], chunk)


def _chunk_table(file: int, number: int, path: str, chunk: Sequence[RawLine]) -> pa.Table:
    row = {
        "part": f"{file:06d}-{number:08d}",  # sorts in data order
        "path": path,
        "lines": [raw.line for raw in chunk],
        "contents": [raw.content for raw in chunk],
    }
    return pa.Table.from_pylist([row], schema=_CHUNK)


def stage_chunk(chunk: pa.Table, task: IngestTask) -> pa.Table:
    """Parse and tokenize one chunk and write it as a staged part.

    Returns:
        One `STAGED_RECORD`.
    """
    (entry,) = chunk.to_pylist()
    lines = [RawLine(line, content) for line, content in zip(entry["lines"], entry["contents"], strict=True)]
    tokenizer = _tokenizer(task.model_path, task.trust_remote_code)
    rows, refused = canonicalize(lines, tokenizer, task.config, path=entry["path"])
    part = entry["part"]
    pq.write_table(to_table(rows), task.staging / f"{part}.parquet")
    _write_refused(refused, task.staging / f"{part}.jsonl")
    record = {"part": part, "path": entry["path"], "num_rows": len(lines), "num_valid": len(rows)}
    return pa.Table.from_pylist([record], schema=STAGED_RECORD)


def staged_hashes(part: str, task: IngestTask) -> RowHashes:
    """Hashes of the valid rows of a staged part."""
    return row_hashes(pq.read_table(task.staging / f"{part}.parquet", columns=HASH_COLUMNS))


def finish_part(plan: pa.Table, task: IngestTask) -> pa.Table:
    """Write the used rows of one staged part, and add its duplicates to its refused rows.

    Args:
        plan: one row; the part, the path it is reported under, and the verdict of each of its rows as bytes.
        task: as given to `stage_chunk`.

    Returns:
        One `FINISHED_RECORD`: the split of each used row, the reason of each refused one, and how many answers of used
        rows fill the length limit.
    """
    (entry,) = plan.to_pylist()
    part, codes = entry["part"], np.frombuffer(entry["codes"], np.uint8)
    used, duplicates = apply_verdicts(pq.read_table(task.staging / f"{part}.parquet"), codes, path=entry["path"])
    if len(used):
        pq.write_table(used, task.pairs / f"{part}.parquet")
    refused = sorted([*_read_refused(task.staging / f"{part}.jsonl"), *duplicates], key=lambda row: row.line)
    _write_refused(refused, refused_file(part, task))  # a file of its own, so that the task can be run again
    prompts = used["prompt_ids"].combine_chunks().value_lengths()
    num_cut = sum(
        pc.sum(pc.equal(pc.add(prompts, used[name].combine_chunks().value_lengths()), task.config.max_length)).as_py()
        or 0
        for name in ("chosen_ids", "rejected_ids")
    )
    record = {
        "part": part,
        "splits": used["split"].to_pylist(),
        "reasons": [row.reason for row in refused],
        "num_cut": num_cut,
    }
    return pa.Table.from_pylist([record], schema=FINISHED_RECORD)


def refused_file(part: str, task: IngestTask) -> Path:
    """Where `finish_part` lists all refused rows of a part."""
    return task.staging / f"{part}.refused.jsonl"


@functools.lru_cache(maxsize=1)
def _tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loaded once per worker process."""
    return load_tokenizer(model_path, trust_remote_code=trust_remote_code)


def _write_refused(rows: Sequence[QuarantinedRow], path: Path) -> None:
    records = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(records), encoding="utf-8", errors="backslashreplace")


def _read_refused(path: Path) -> list[QuarantinedRow]:
    with path.open(encoding="utf-8") as stream:
        return [QuarantinedRow(**json.loads(line)) for line in stream]
