"""Raw lines to the columns of ingested pairs, a chunk of rows at a time.

Two steps, because duplicates and splits are decided over the whole data set: `canonicalize` parses and tokenizes a
chunk on its own, `apply_verdicts` keeps the rows that the decision kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raylign.config import DataSection
from raylign.data.schema import parse_row
from raylign.data.sources import RawLine, decode_row
from raylign.data.splits import (
    DUPLICATE_ID,
    DUPLICATE_ROW,
    SPLITS,
    UNNAMED,
    RowHashes,
    outcome,
    pair_hashes,
    prompt_key,
)
from raylign.data.tokenization import tokenize_pairs
from raylign.errors import RowError
from raylign.types import PreferencePair, QuarantinedRow, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_IDS = pa.list_(pa.int32())

PAIR_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("prompt_key", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.list_(_MESSAGE)),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_safe", pa.bool_()),
        ("rejected_safe", pa.bool_()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
    ]
)

# What the decision over the whole data set reads, and where a row was found, in case the decision refuses it.
_STAGED_ONLY = [
    ("line", pa.int64()),
    ("excerpt", pa.string()),
    ("row_hash", pa.uint64()),
    ("content_hash", pa.uint64()),
    ("mirrored_hash", pa.uint64()),
    ("named_split", pa.int8()),
]
STAGED_SCHEMA = pa.schema([*PAIR_SCHEMA, *(pa.field(name, kind) for name, kind in _STAGED_ONLY)])
HASH_COLUMNS = ["row_hash", "content_hash", "mirrored_hash", "prompt_key", "named_split"]

_EXCERPT_CHARACTERS = 200
_DUPLICATE_DETAIL = {
    DUPLICATE_ROW: "an earlier row has the same prompt, chosen and rejected text",
    DUPLICATE_ID: "an earlier, different row has the same id",
}


@dataclass(frozen=True, slots=True)
class CanonicalRow:
    """One valid row.

    Attributes:
        raw: the line it came from.
        pair: its text.
        tokens: its token ids.
    """

    raw: RawLine
    pair: PreferencePair
    tokens: TokenizedPair


def canonicalize(
    lines: Sequence[RawLine], tokenizer: PreTrainedTokenizerBase, config: DataSection, *, path: str
) -> tuple[list[CanonicalRow], list[QuarantinedRow]]:
    """Parse and tokenize some rows of one file.

    Args:
        lines: raw rows.
        tokenizer: has a chat template, see `raylign.data.tokenization.check_tokenizer`.
        config: format, label and length limits.
        path: file of the rows, for quarantine records.

    Returns:
        The valid rows and the refused ones, both in the order of `lines`; together as many as there are lines.
    """
    parsed: list[tuple[RawLine, PreferencePair]] = []
    refused: list[QuarantinedRow] = []
    for raw in lines:
        try:
            parsed.append((raw, parse_row(decode_row(raw.content), format=config.format, prefer=config.prefer)))
        except RowError as error:
            refused.append(_quarantined(path, raw.line, excerpt(raw), error))
    tokens = tokenize_pairs(
        [pair for _, pair in parsed], tokenizer, max_length=config.max_length, prompt_limit=config.prompt_limit
    )
    rows: list[CanonicalRow] = []
    for (raw, pair), result in zip(parsed, tokens, strict=True):
        if isinstance(result, RowError):
            refused.append(_quarantined(path, raw.line, excerpt(raw), result))
        else:
            rows.append(CanonicalRow(raw, pair, result))
    return rows, sorted(refused, key=lambda row: row.line)


def excerpt(raw: RawLine) -> str:
    """The first 200 characters of a raw row; bytes that are no text are shown as replacement characters."""
    return raw.content[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "replace")[:_EXCERPT_CHARACTERS]


def _quarantined(path: str, line: int, shown: str, error: RowError) -> QuarantinedRow:
    return QuarantinedRow(path=path, line=line, reason=error.reason, detail=error.detail, excerpt=shown)


def to_table(rows: Sequence[CanonicalRow]) -> pa.Table:
    """Valid rows as arrow columns, `STAGED_SCHEMA`; the split is not known yet."""
    pairs = [row.pair for row in rows]
    hashes = [pair_hashes(pair) for pair in pairs]
    columns = {
        "row_id": [pair.row_id for pair in pairs],
        "source": [pair.source for pair in pairs],
        "prompt_key": [prompt_key(pair) for pair in pairs],
        "split": [None] * len(rows),
        "prompt": [[{"role": turn.role, "content": turn.content} for turn in pair.prompt] for pair in pairs],
        "chosen": [pair.chosen for pair in pairs],
        "rejected": [pair.rejected for pair in pairs],
        "chosen_safe": [pair.chosen_safe for pair in pairs],
        "rejected_safe": [pair.rejected_safe for pair in pairs],
        "prompt_ids": [row.tokens.prompt_ids for row in rows],
        "chosen_ids": [row.tokens.chosen_ids for row in rows],
        "rejected_ids": [row.tokens.rejected_ids for row in rows],
        "line": [row.raw.line for row in rows],
        "excerpt": [excerpt(row.raw) for row in rows],
        "row_hash": [row_hash for row_hash, _, _ in hashes],
        "content_hash": [content for _, content, _ in hashes],
        "mirrored_hash": [mirrored for _, _, mirrored in hashes],
        "named_split": [UNNAMED if pair.split is None else SPLITS.index(pair.split) for pair in pairs],
    }
    return pa.table(columns, schema=STAGED_SCHEMA)


def row_hashes(table: pa.Table) -> RowHashes:
    """The `HASH_COLUMNS` of a table as arrays."""
    keys = table["prompt_key"].to_pylist()
    return RowHashes(
        row=table["row_hash"].to_numpy(),
        content=table["content_hash"].to_numpy(),
        mirrored=table["mirrored_hash"].to_numpy(),
        prompt=np.fromiter((int(key, 16) for key in keys), np.uint64, len(keys)),
        named=table["named_split"].to_numpy(),
    )


def apply_verdicts(table: pa.Table, codes: np.ndarray, *, path: str) -> tuple[pa.Table, list[QuarantinedRow]]:
    """Keep the used rows, with their split, and list the duplicates.

    Args:
        table: rows of `STAGED_SCHEMA`.
        codes: (N,) uint8 verdict of each row, see `raylign.data.splits.decide`.
        path: file of the rows, for quarantine records.

    Returns:
        The used rows in `PAIR_SCHEMA`, and the duplicates.
    """
    splits, reasons = zip(*(outcome(code) for code in codes.tolist()), strict=True) if len(codes) else ((), ())
    refused = [
        _quarantined(path, line, shown, RowError(reason, _DUPLICATE_DETAIL[reason]))
        for line, shown, reason in zip(table["line"].to_pylist(), table["excerpt"].to_pylist(), reasons, strict=True)
        if reason is not None
    ]
    column = STAGED_SCHEMA.get_field_index("split")
    table = table.set_column(column, STAGED_SCHEMA.field(column), pa.array(splits, pa.string()))
    return table.filter(pa.array([split is not None for split in splits], pa.bool_())).select(
        PAIR_SCHEMA.names
    ), refused
