"""Raw lines to columns, the counts, and the inspection text, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raylign.config import DataSection
from raylign.data.canonical import PAIR_SCHEMA, apply_verdicts, canonicalize, row_hashes, to_table
from raylign.data.counts import IngestCounts, check_usable
from raylign.data.inspect import inspect_source
from raylign.data.sources import RawLine
from raylign.data.splits import decide
from raylign.errors import DataError, ModelError, QuarantineLimitError
from raylign.types import TEXT_COLUMNS, TOKEN_COLUMNS

CONFIG = DataSection(max_length=64)


def row(number, **changes):
    return {"id": f"r{number}", "prompt": f"q{number}", "chosen": f"c{number}", "rejected": "no"} | changes


def raw(*rows):
    return [RawLine(i, json.dumps(item).encode()) for i, item in enumerate(rows, start=1)]


def test_valid_and_refused_rows_add_up_in_order(make_tokenizer):
    lines = raw(row(1), row(2, prompt="x" * 60), row(3), row(4, chosen=""), row(5))
    rows, refused = canonicalize(lines, make_tokenizer(), CONFIG, path="p")
    assert [r.raw.line for r in rows] == [1, 3, 5]
    assert [(r.line, r.reason, r.path) for r in refused] == [(2, "prompt_too_long", "p"), (4, "empty_text", "p")]


def test_columns_are_those_of_the_dataflow():
    assert tuple(PAIR_SCHEMA.names) == TEXT_COLUMNS + TOKEN_COLUMNS


def test_verdicts_keep_split_and_list_duplicates(make_tokenizer):
    lines = raw(row(1, split="test"), row(1, split="test", id="again"), row(2, split="valid"))
    rows, _ = canonicalize(lines, make_tokenizer(), CONFIG, path="p")
    table = to_table(rows)
    verdicts = decide(row_hashes(table), valid_fraction=0.1, test_fraction=0.1, max_pairs=None, seed=0)
    used, refused = apply_verdicts(table, verdicts.codes, path="p")
    assert used.schema == PAIR_SCHEMA
    assert used["row_id"].to_pylist() == ["r1", "r2"]
    assert used["split"].to_pylist() == ["test", "valid"]
    assert [(r.line, r.reason) for r in refused] == [(2, "duplicate_row")]


def test_a_chunk_without_valid_rows_has_the_same_columns(make_tokenizer):
    rows, refused = canonicalize(raw([]), make_tokenizer(), CONFIG, path="p")
    assert (rows, len(refused)) == ([], 1)
    used, duplicates = apply_verdicts(to_table([]), np.empty(0, np.uint8), path="p")
    assert (len(used), used.schema, duplicates) == (0, PAIR_SCHEMA, [])


def make_counts(**changes):
    values = {"rows_read": 10, "used": 6, "quarantined": {"b": 1, "a": 2}, "sampled_out": 1}
    return IngestCounts(**(values | {"splits": {"train": 6}, "cut": 0, "contradictions": 0} | changes))


def test_counts_that_do_not_add_up_are_our_mistake():
    make_counts().check_sums()
    with pytest.raises(AssertionError, match="10 rows read but 9 accounted for"):
        make_counts(used=5).check_sums()


def test_limit_is_a_share_of_all_rows_and_names_the_top_reasons_first():
    where = {"source": "rows.jsonl", "quarantine_path": Path("q.jsonl")}
    check_usable(make_counts(), max_bad_fraction=0.3, **where)
    with pytest.raises(QuarantineLimitError, match=r"3 of 10 rows of rows\.jsonl .*\(a 2, b 1\).*q\.jsonl"):
        check_usable(make_counts(), max_bad_fraction=0.29, **where)
    with pytest.raises(DataError, match="no valid pair"):
        check_usable(make_counts(used=0), max_bad_fraction=1, **where)


@pytest.fixture
def rows_path(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        row(1, source="here\x1b[31m", chosen_safe=True),
        row(2, split="test"),
        row(1, id="again"),
        row(3, chosen=""),
    ]
    path.write_text("\n".join(json.dumps(item) for item in rows))
    return path


def test_inspection_marks_prompt_response_and_end(rows_path, make_tokenizer):
    text = inspect_source(
        CONFIG.model_copy(update={"path": str(rows_path)}), make_tokenizer(), num_rows=2, use_color=False
    )
    assert "    <bos>|<|user|>|q|1|<|assistant|>\n" in text
    assert "chosen       3 tokens, scored, labelled safe; ids" in text
    assert "    [c|1]{<eos>}\n" in text
    assert "split test (named by the row)" in text
    assert "first 4 rows: 2 usable, 2 quarantined" in text
    assert f"{rows_path}:4: chosen is empty" in text
    assert f"{rows_path}:3: an earlier row has the same" in text


@pytest.mark.parametrize("use_color", [True, False])
def test_inspection_sends_no_control_codes_of_the_data(rows_path, make_tokenizer, use_color):
    config = CONFIG.model_copy(update={"path": str(rows_path)})
    text = inspect_source(config, make_tokenizer(), num_rows=1, use_color=use_color)
    assert "here\\x1b[31m" in text
    assert ("\x1b[32m" in text) == use_color
    assert "\x1b[31m" not in text


def test_inspection_without_template_or_rows(tmp_path, rows_path, make_tokenizer):
    config = CONFIG.model_copy(update={"path": str(rows_path)})
    with pytest.raises(ModelError, match="no chat template"):
        inspect_source(config, make_tokenizer(None), num_rows=1, use_color=False)
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        inspect_source(
            CONFIG.model_copy(update={"path": str(tmp_path / "blank.jsonl")}),
            make_tokenizer(),
            num_rows=1,
            use_color=False,
        )
