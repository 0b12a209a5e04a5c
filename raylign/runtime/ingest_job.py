"""Ingest: any readable source to one parquet data set of tokenized pairs, with every row accounted for.

    files -> chunks of raw lines -> parse, tokenize -> staged parts      (Ray Data, streaming)
    hashes of the staged rows -> duplicates, sample, splits              (driver, 33 bytes a row)
    staged parts -> used rows, quarantine records                        (Ray Data)

A part is named by its place in the data, so the order of the result does not depend on which task ran when, and a task
that is run again replaces its own files. The output directory must be visible to all nodes. Progress bars are Ray
Data's own, `ray.data.DataContext.get_current().enable_progress_bars`.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raylign.config import DataSection
from raylign.data.counts import IngestCounts, check_usable
from raylign.data.sources import encode_row, list_files
from raylign.data.splits import RowHashes, Verdicts, decide
from raylign.data.tokenization import check_tokenizer
from raylign.errors import DataError, DataNotFoundError
from raylign.models.loading import load_tokenizer
from raylign.runtime.execution import own_errors
from raylign.runtime.ingest_tasks import (
    CHUNK_ROWS,
    IngestTask,
    finish_part,
    read_chunks,
    refused_file,
    stage_chunk,
    staged_hashes,
)
from raylign.types import Message

PAIRS_DIR = "pairs"
QUARANTINE_FILE = "quarantine.jsonl"
_STAGING_DIR = ".staging"


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What ingest leaves behind.

    Attributes:
        dataset: used pairs in data order, columns `TEXT_COLUMNS` and `TOKEN_COLUMNS` of `raylign.types`.
        counts: where every row went.
        quarantine_path: one JSON record per refused row in data order: path, line, reason, detail, excerpt.
    """

    dataset: ray.data.Dataset
    counts: IngestCounts
    quarantine_path: Path


def run_ingest(
    source: str | ray.data.Dataset,
    *,
    config: DataSection,
    model_path: str,
    output_dir: Path,
    seed: int,
    trust_remote_code: bool = False,
) -> IngestResult:
    """Read, check, tokenize, deduplicate and split preference pairs.

    Args:
        source: what `raylign.data.sources.list_files` takes, or a Dataset with the columns of any row format.
        config: the `data` section; its `path` is not read.
        model_path: directory with the tokenizer and its chat template.
        output_dir: gets `pairs/` and `quarantine.jsonl`; those of an earlier call are replaced.
        seed: of the split and of the `max_pairs` sample.
        trust_remote_code: let the tokenizer run code of its own.

    Raises:
        DataNotFoundError: no such file.
        DataError: an unreadable or empty file, or no valid pair.
        QuarantineLimitError: more refused rows than `config.max_bad_fraction`.
        ModelError: no tokenizer, or one without a chat template.
    """
    check_tokenizer(load_tokenizer(model_path, trust_remote_code=trust_remote_code), str(model_path))
    output_dir = Path(output_dir).absolute()
    task = IngestTask(config, str(model_path), trust_remote_code, output_dir / _STAGING_DIR, output_dir / PAIRS_DIR)
    for directory in (task.staging, task.pairs):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    name = source if isinstance(source, str) else "the given Dataset"
    with own_errors():
        staged = _stage(_locate(source, task), task)
        if not staged:
            raise DataError(f"{name} holds no rows; expected preference pairs, one a line or row")
        verdicts = _decide([record["part"] for record in staged], task, seed)
        finished = _finish(staged, verdicts, task)
    quarantine = output_dir / QUARANTINE_FILE
    _join([refused_file(record["part"], task) for record in staged], quarantine)
    shutil.rmtree(task.staging)
    counts = _count(staged, finished, verdicts)
    try:
        check_usable(counts, max_bad_fraction=config.max_bad_fraction, source=name, quarantine_path=quarantine)
    except DataError:
        shutil.rmtree(task.pairs)
        raise
    return IngestResult(read_pairs(output_dir), counts, quarantine)


def read_pairs(output_dir: Path) -> ray.data.Dataset:
    """The pairs that `run_ingest` wrote, in data order.

    Raises:
        DataNotFoundError: `output_dir` holds none.
    """
    parts = sorted(str(path) for path in (Path(output_dir) / PAIRS_DIR).glob("*.parquet"))
    if not parts:
        raise DataNotFoundError(f"{output_dir} holds no ingested pairs; run ingest with this output directory first")
    dataset = ray.data.read_parquet(parts)
    dataset.context.execution_options.preserve_order = True  # a data set has a context of its own
    return dataset


def held_out_prompts(ingest: Path, num: int) -> list[list[Message]]:
    """The first `num` distinct test prompts in the order of their keys, which are hashes."""
    rows = read_pairs(ingest).select_columns(["prompt_key", "split", "prompt"])
    found: dict[str, list[Message]] = {}
    for row in rows.iter_rows():
        if row["split"] == "test":
            found.setdefault(row["prompt_key"], [Message(**turn) for turn in row["prompt"]])
    return [found[key] for key in sorted(found)[:num]]


def _locate(source: str | ray.data.Dataset, task: IngestTask) -> dict[str, str]:
    """Files to read, each with the path that its rows are reported under."""
    if isinstance(source, str):
        return {path: path for path in list_files(source)}
    path = task.staging / "rows.jsonl"
    _write_rows(source, path)
    return {str(path): ""}


def _write_rows(dataset: ray.data.Dataset, path: Path) -> None:
    """Row k of a Dataset as line k of a file, which from then on is read like any other."""
    encoded = dataset.map(_encoded)
    options = encoded.context.execution_options
    was_ordered = options.preserve_order
    options.preserve_order = True  # line numbers are row numbers; without it blocks come as they get ready
    try:
        with path.open("wb") as stream:
            for batch in encoded.iter_batches(batch_size=CHUNK_ROWS, batch_format="pyarrow"):
                stream.writelines(line + b"\n" for line in batch["line"].to_pylist())
    finally:
        options.preserve_order = was_ordered


def _encoded(row: dict[str, Any]) -> dict[str, bytes]:
    return {"line": encode_row(row)}


def _stage(files: Mapping[str, str], task: IngestTask) -> list[dict[str, Any]]:
    """Read, parse and tokenize everything; one `STAGED_RECORD` per part, in data order."""
    plan = [{"file": number, "read": read, "path": path} for number, (read, path) in enumerate(files.items())]
    records = (
        ray.data.from_items(plan, override_num_blocks=len(plan))
        .map_batches(read_chunks, batch_size=1, batch_format="pyarrow")
        .repartition(target_num_rows_per_block=1)  # a block, hence a task, per chunk
        .map_batches(stage_chunk, batch_size=1, batch_format="pyarrow", fn_kwargs={"task": task})
        .take_all()
    )
    return sorted(records, key=lambda record: record["part"])


def _decide(parts: Sequence[str], task: IngestTask, seed: int) -> Verdicts:
    hashes = [staged_hashes(part, task) for part in parts]
    names = [field.name for field in fields(RowHashes)]
    return decide(
        RowHashes(**{name: np.concatenate([getattr(part, name) for part in hashes]) for name in names}),
        valid_fraction=task.config.valid_fraction,
        test_fraction=task.config.test_fraction,
        max_pairs=task.config.max_pairs,
        seed=seed,
    )


def _finish(staged: Sequence[Mapping[str, Any]], verdicts: Verdicts, task: IngestTask) -> list[dict[str, Any]]:
    """Write the used rows of every part; one `FINISHED_RECORD` per part."""
    ends = np.cumsum([record["num_valid"] for record in staged])
    codes = np.split(verdicts.codes, ends[:-1])
    plan = [
        {"part": record["part"], "path": record["path"], "codes": part_codes.tobytes()}
        for record, part_codes in zip(staged, codes, strict=True)
    ]
    parts = ray.data.from_items(plan, override_num_blocks=len(plan))
    finished: list[dict[str, Any]] = parts.map_batches(
        finish_part, batch_size=1, batch_format="pyarrow", fn_kwargs={"task": task}
    ).take_all()
    return finished


def _count(
    staged: Sequence[Mapping[str, Any]], finished: Sequence[Mapping[str, Any]], verdicts: Verdicts
) -> IngestCounts:
    """Counts of what was read and of what was written, which must agree."""
    splits = Counter(split for record in finished for split in record["splits"])
    reasons = Counter(reason for record in finished for reason in record["reasons"])
    counts = IngestCounts(
        rows_read=sum(record["num_rows"] for record in staged),
        used=splits.total(),
        quarantined=dict(sorted(reasons.items())),
        sampled_out=verdicts.num_sampled_out,
        splits=dict(sorted(splits.items())),
        cut=sum(record["num_cut"] for record in finished),
        contradictions=verdicts.num_contradictions,
    )
    counts.check_sums()
    return counts


def _join(paths: Sequence[Path], output: Path) -> None:
    with output.open("wb") as target:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, target)
