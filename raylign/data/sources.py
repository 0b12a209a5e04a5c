"""Finding data files and reading their rows one by one, wherever fsspec reaches: disks, `hf://`, object stores.

Text files hold one JSON object a line and may be compressed; parquet is read a group of rows at a time. Memory is
bounded by one line or one such group. Lines and rows are counted from 1, blank lines included, so that a line number
is the one that an editor shows; blank lines are no rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow.parquet as pq

from raylign.config import EMBEDDED
from raylign.errors import DataError, DataNotFoundError, RowError

_TEXT = (".jsonl", ".json", ".ndjson")
_COMPRESSED = ("", ".gz", ".bz2", ".xz")
_PARQUET = ".parquet"
SUFFIXES = (*(text + compressed for text in _TEXT for compressed in _COMPRESSED), _PARQUET)

_BATCH_ROWS = 512
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class RawLine:
    """One row as it was found, before any of it is trusted.

    Attributes:
        line: line of a text file or row of a parquet file, from 1.
        content: bytes of the line; for parquet the row as JSON.
    """

    line: int
    content: bytes


def list_files(path: str) -> list[str]:
    """Files behind `data.path`, sorted by name.

    Args:
        path: a file, a directory (searched recursively), a glob, any fsspec URL such as
            "hf://datasets/Anthropic/hh-rlhf/harmless-base", or "embedded".

    Returns:
        Local paths, or URLs with their protocol. Empty files are left out unless there is nothing else.

    Raises:
        DataNotFoundError: nothing there, or no file of a readable format.
        DataError: all files are empty.
    """
    if path == EMBEDDED:
        from raylign.assets import PAIRS, asset_path

        return [str(asset_path(PAIRS))]
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise DataError(f"data.path={path} names no file system that fsspec can open: {error}") from error
    try:
        sizes = _find(filesystem, root)
    except Exception as error:  # remote file systems raise the errors of their transports, which share no base
        raise DataNotFoundError(
            f"data.path={path} cannot be listed: {error}. Check the spelling, the network, and for a private data set "
            "the access token in the environment"
        ) from error
    if not sizes:
        raise DataNotFoundError(f"data.path={path} matches no file; give a file, a directory or a glob that exists")
    readable = {name: size for name, size in sizes.items() if name.endswith(SUFFIXES)}
    if not readable:
        raise DataNotFoundError(
            f"data.path={path} holds no file that ends with {', '.join(SUFFIXES)}; found {', '.join(sorted(sizes)[:3])}"
        )
    filled = sorted(name for name, size in readable.items() if size != 0)
    if not filled:
        raise DataError(f"data.path={path} is empty; found only files of 0 bytes, expected preference rows")
    return [filesystem.unstrip_protocol(name) if "://" in path else name for name in filled]


def _find(filesystem: Any, root: str) -> dict[str, int | None]:
    """Names and sizes of the files at a path, in a directory or behind a glob; none when there is nothing."""
    if any(character in root for character in "*?["):
        found = filesystem.glob(root, detail=True)
    elif filesystem.isdir(root):
        found = filesystem.find(root, detail=True)
    elif filesystem.exists(root):
        found = {root: filesystem.info(root)}
    else:
        found = {}
    return {name: info.get("size") for name, info in found.items() if info.get("type") != "directory"}


def read_lines(path: str) -> Iterator[RawLine]:
    """Rows of one file in order, undecoded and unchecked.

    Args:
        path: as returned by `list_files`.

    Raises:
        DataNotFoundError: the file is gone.
        DataError: the file is damaged, or a JSON array instead of JSON lines.
    """
    try:
        yield from _read_parquet(path) if path.endswith(_PARQUET) else _read_text(path)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataNotFoundError(f"data file {path} does not exist; check data.path") from error
    except Exception as error:  # remote file systems and decompressors share no base of their errors
        raise DataError(
            f"data file {path} cannot be read: {error}. Is it complete, and named by its format?"
        ) from error


def _read_text(path: str) -> Iterator[RawLine]:
    with fsspec.open(path, "rb", compression="infer") as stream:
        for number, line in enumerate(stream, start=1):
            content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            content = content.strip()
            if number == 1 and content.startswith(b"["):
                raise DataError(
                    f"data file {path} holds one JSON array, expected one JSON object a line; "
                    "convert it with: jq -c '.[]' FILE > FILE.jsonl"
                )
            if content:
                yield RawLine(number, content)


def _read_parquet(path: str) -> Iterator[RawLine]:
    number = 0
    with fsspec.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield RawLine(number, encode_row(row))


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON; values that JSON lacks become text, and fail their column's check if it is read."""
    return json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """Arrays and scalars of numpy as Python values, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def decode_row(content: bytes) -> dict[str, Any]:
    """Columns of one raw line.

    Raises:
        RowError: not_utf8, invalid_json, or wrong_type when the line is no JSON object.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("not_utf8", f"byte {error.start} of the line is not UTF-8") from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also covers integers too long to convert
        raise RowError("invalid_json", f"the line is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise RowError("wrong_type", f"a line must hold a JSON object, found {type(row).__name__}")
    return row


def read_rows(path: str) -> Iterator[tuple[str, int, dict[str, Any] | RowError]]:
    """Path, line number and columns of every row of one file; an unreadable row is yielded as its error."""
    for raw in read_lines(path):
        try:
            yield path, raw.line, decode_row(raw.content)
        except RowError as error:
            yield path, raw.line, error
