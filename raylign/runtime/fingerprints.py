"""What tells whether inputs changed: of files and of ingested pairs by content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa

from raylign.config import EMBEDDED
from raylign.data.sources import list_files
from raylign.models.loading import file_fingerprint
from raylign.runtime.pair_states import VERDICT_COLUMNS
from raylign.types import TOKEN_COLUMNS

if TYPE_CHECKING:
    import ray.data

_PLAIN = ("row_id", "prompt_key", "split", *VERDICT_COLUMNS)


def source_state(path: str) -> list[Any]:
    """Name and content of local files, wherever they lie, and the store's own key of remote ones.

    A job's copy of its working directory has other paths and times in every session.
    """
    if path == EMBEDDED:
        return [EMBEDDED]
    files = list_files(path)
    if "://" in files[0]:
        filesystem, _ = fsspec.core.url_to_fs(files[0])
        return [[file, filesystem.ukey(file)] for file in files]
    return [[Path(file).name, file_fingerprint(Path(file))] for file in files]


def pairs_fingerprint(pairs: ray.data.Dataset) -> str:
    """Hash of what later phases read of ingested pairs: ids, splits, tokens, and verdicts where there are any.

    Where or when they were made does not count. One stream per column (two for lists), so that it does not depend on
    how the rows are cut into blocks.
    """
    present = set(pairs.columns() or ())
    plain = [name for name in _PLAIN if name not in VERDICT_COLUMNS or name in present]
    lengths = [f"{name} lengths" for name in TOKEN_COLUMNS]
    streams = {name: hashlib.blake2b(digest_size=16) for name in (*plain, *TOKEN_COLUMNS, *lengths)}
    columns = pairs.select_columns([*plain, *TOKEN_COLUMNS])
    context = columns.context.execution_options
    was_ordered, context.preserve_order = context.preserve_order, True
    try:
        for batch in columns.iter_batches(batch_size=None, batch_format="pyarrow"):
            for name in plain:
                streams[name].update("".join(f"{value}\0" for value in batch[name].to_pylist()).encode())
            for name in TOKEN_COLUMNS:
                for ids in batch[name].chunks:
                    streams[f"{name} lengths"].update(_little_endian(ids.value_lengths()))
                    streams[name].update(_little_endian(ids.flatten()))
    finally:
        context.preserve_order = was_ordered
    whole = hashlib.blake2b(digest_size=16)
    for stream in streams.values():
        whole.update(stream.digest())
    return whole.hexdigest()


def _little_endian(numbers: pa.Array) -> bytes:
    return bytes(numbers.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
