"""`raylign data inspect`: the first pairs token by token, what is scored of them, and why rows are refused.

Rows go through the functions that ingest uses; Ray is not needed. The result is text, coloured on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from raylign.config import DataSection
from raylign.data.canonical import CanonicalRow, apply_verdicts, canonicalize, row_hashes, to_table
from raylign.data.sources import RawLine, list_files, read_lines
from raylign.data.splits import assign_split, decide, outcome, prompt_key
from raylign.data.tokenization import check_tokenizer
from raylign.errors import DataError
from raylign.types import PreferencePair, QuarantinedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE_ROWS = 512
_SHOWN_TOKENS = 160
_SHOWN_IDS = 6

_DIM, _GREEN, _YELLOW, _BOLD, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[1;33m", "\x1b[1m", "\x1b[0m"


def inspect_source(
    config: DataSection, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, use_color: bool, seed: int = 0
) -> str:
    """Read the first rows behind `config.path` and show them.

    Args:
        config: path, format and length limits.
        tokenizer: of the policy.
        num_rows: pairs shown in full; the summary is over up to 512 rows.
        use_color: ANSI colours instead of plain markers.
        seed: of the split.

    Raises:
        DataError: nothing there, or no row in it.
        ModelError: the tokenizer has no usable chat template.
    """
    check_tokenizer(tokenizer, "the policy's directory")
    rows: list[CanonicalRow] = []
    refused: list[QuarantinedRow] = []
    num_read = 0
    for path in list_files(config.path):
        lines: list[RawLine] = list(islice(read_lines(path), _SAMPLE_ROWS - num_read))
        valid, invalid = canonicalize(lines, tokenizer, config, path=path)
        rows, refused, num_read = rows + valid, refused + invalid, num_read + len(lines)
        if num_read == _SAMPLE_ROWS:
            break
    if not num_read:
        raise DataError(f"data.path={config.path} holds no rows; expected preference pairs, one a line or row")
    rows, repeated = _without_duplicates(rows, config, seed)
    refused += repeated
    shown = format_pairs(rows[:num_rows], tokenizer, config, use_color=use_color, seed=seed)
    return shown + "\n" + format_summary(rows, refused, num_read=num_read, config=config)


def format_pairs(
    rows: Sequence[CanonicalRow],
    tokenizer: PreTrainedTokenizerBase,
    config: DataSection,
    *,
    use_color: bool,
    seed: int = 0,
) -> str:
    """Text of some pairs: tokens separated by "|", marked by what the loss does with them.

    With colour the prompt is dim, scored response tokens are green, the end-of-response token is yellow; without, the
    response stands in [brackets] and the end token in {braces}.
    """
    blocks = [_format_pair(number, row, tokenizer, config, use_color, seed) for number, row in enumerate(rows, start=1)]
    return "\n".join(blocks)


def format_summary(
    rows: Sequence[CanonicalRow], refused: Sequence[QuarantinedRow], *, num_read: int, config: DataSection
) -> str:
    """Text of the token lengths of the valid rows and of the reasons of the refused ones, with an example of each."""
    lines = [f"first {num_read} rows: {num_read - len(refused)} usable, {len(refused)} quarantined"]
    if rows:
        lengths = {
            "prompt": [len(row.tokens.prompt_ids) for row in rows],
            "chosen": [len(row.tokens.chosen_ids) for row in rows],
            "rejected": [len(row.tokens.rejected_ids) for row in rows],
        }
        lines.append(f"{'tokens':<28}{'mean':>8}{'95 %':>8}{'most':>8}")
        for name, values in lengths.items():
            lines.append(f"  {name:<26}{np.mean(values):>8.1f}{np.percentile(values, 95):>8.0f}{max(values):>8}")
        full = sum(
            len(row.tokens.prompt_ids) + len(ids) == config.max_length
            for row in rows
            for ids in (row.tokens.chosen_ids, row.tokens.rejected_ids)
        )
        lines.append(
            f"  {full} of {2 * len(rows)} answers reach data.max_length={config.max_length} and were cut there"
        )
    if refused:
        lines.append(f"{'reason':<28}{'rows':>8}  for example")
    reasons = [row.reason for row in refused]
    for reason in sorted(set(reasons), key=lambda name: (-reasons.count(name), name)):
        example = refused[reasons.index(reason)]
        lines.append(
            f"  {reason:<26}{reasons.count(reason):>8}  {_printable(example.path)}:{example.line}: "
            f"{_printable(example.detail)}"
        )
    return "\n".join(lines)


def _without_duplicates(
    rows: list[CanonicalRow], config: DataSection, seed: int
) -> tuple[list[CanonicalRow], list[QuarantinedRow]]:
    """Rows that are not repeated among those read, and records of those that are."""
    table = to_table(rows)
    codes = decide(
        row_hashes(table),
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        max_pairs=None,
        seed=seed,
    ).codes
    kept = [row for row, code in zip(rows, codes.tolist(), strict=True) if outcome(code)[0] is not None]
    return kept, apply_verdicts(table, codes, path=config.path)[1]


def _format_pair(
    number: int,
    row: CanonicalRow,
    tokenizer: PreTrainedTokenizerBase,
    config: DataSection,
    use_color: bool,
    seed: int,
) -> str:
    pair, tokens = row.pair, row.tokens
    about = [f"line {row.raw.line}", f"row_id {pair.row_id}", f"source {pair.source or '-'}"]
    about += [f"turns {len(pair.prompt)}", f"split {_split(pair, config, seed)}"]
    title = f"pair {number}"
    lines = [f"{_BOLD}{title}{_RESET}" if use_color else title, "  " + "  ".join(map(_printable, about))]
    parts = (
        ("prompt", tokens.prompt_ids, "not scored", None),
        ("chosen", tokens.chosen_ids, "scored", pair.chosen_safe),
        ("rejected", tokens.rejected_ids, "scored", pair.rejected_safe),
    )
    for name, ids, use, is_safe in parts:
        label = "" if is_safe is None else ", labelled safe" if is_safe else ", labelled unsafe"
        lines.append(f"  {name:<9}{len(ids):>5} tokens, {use}{label}; ids {_ids(ids)}")
        lines.append("    " + _marked(ids, tokenizer, is_scored=name != "prompt", use_color=use_color))
    return "\n".join(lines) + "\n"


def _split(pair: PreferencePair, config: DataSection, seed: int) -> str:
    if pair.split == "train":
        return "train (named by the row; validation prompts are taken from it by hash)"
    if pair.split is not None:
        return f"{pair.split} (named by the row)"
    key = prompt_key(pair)
    split = assign_split(key, valid_fraction=config.valid_fraction, test_fraction=config.test_fraction, seed=seed)
    return f"{split} (by hash of the first user turn)"


def _marked(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, *, is_scored: bool, use_color: bool) -> str:
    """Tokens of one part; the last one of a scored part is the end-of-response token."""
    texts = [_printable(tokenizer.decode([token])) for token in ids.tolist()]
    end = texts.pop() if is_scored else ""
    if len(texts) > _SHOWN_TOKENS:
        half = _SHOWN_TOKENS // 2
        texts = [*texts[:half], f" ... {len(texts) - 2 * half} more ... ", *texts[-half:]]
    body = "|".join(texts)
    if not is_scored:
        return f"{_DIM}{body}{_RESET}" if use_color else body
    return f"{_GREEN}{body}{_YELLOW}|{end}{_RESET}" if use_color else f"[{body}]{{{end}}}"


def _ids(ids: np.ndarray) -> str:
    values = [str(value) for value in ids.tolist()]
    if len(values) <= 2 * _SHOWN_IDS:
        return " ".join(values)
    return " ".join([*values[:_SHOWN_IDS], "...", *values[-_SHOWN_IDS:]])


def _printable(text: str) -> str:
    r"""Control characters as escapes: newlines show as \n, and no row can send codes to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
