"""Finding and reading files. Real: local disk, compression, parquet, fsspec's memory file system. Faked: the hub."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import uuid

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raylign.data.sources import RawLine, decode_row, encode_row, list_files, read_lines, read_rows
from raylign.errors import DataError, DataNotFoundError, RowError

ROWS = [{"prompt": f"p{i}", "chosen": "é", "rejected": "b"} for i in range(3)]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture
def memory_url():
    """A directory of the memory file system that no other test uses."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".ndjson"])
def test_text_formats_give_the_same_rows(tmp_path, kind, packing):
    path = tmp_path / f"rows{kind}{packing}"
    path.write_bytes(PACKERS[packing](TEXT))
    assert list(read_rows(str(path))) == [(str(path), i + 1, row) for i, row in enumerate(ROWS)]


def test_parquet_counts_rows_across_groups(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"n": i} for i in range(1300)]), path, row_group_size=500)
    assert [(line, row["n"]) for _, line, row in read_rows(str(path))] == [(i + 1, i) for i in range(1300)]


def test_bad_lines_are_yielded_with_their_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": 1}\n   \n{"a": \n{"a": "\xff"}\r\n[1]\n' + b"[" * 100_000 + b'\n{"a": 2}')
    found = [(line, row.reason if isinstance(row, RowError) else row) for _, line, row in read_rows(str(path))]
    assert found == [
        (2, {"a": 1}),
        (4, "invalid_json"),
        (5, "not_utf8"),
        (6, "wrong_type"),
        (7, "invalid_json"),
        (8, {"a": 2}),
    ]


def test_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert list(read_lines(str(path))) == [RawLine(1, b'{"a": 1}')]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT)[:-8] + b"damaged!")
    lines = read_lines(str(path))
    assert next(lines).line == 1
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read"):
        list(lines)


def test_json_array_names_the_cure(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match="one JSON object a line; convert it with: jq"):
        list(read_lines(str(path)))


def test_directory_and_glob_are_sorted_and_filtered(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "empty.jsonl").touch()
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl.gz")]
    assert list_files(str(tmp_path)) == names
    assert list_files(str(tmp_path / "*.jsonl")) == names[:2]
    assert list_files(names[1]) == [names[1]]


def test_embedded_pairs():
    (path,) = list_files("embedded")
    assert {"prompt", "chosen", "rejected"} <= decode_row(next(read_lines(path)).content).keys()


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/", "*.jsonl"])
def test_nothing_there_names_path_and_cure(tmp_path, name):
    with pytest.raises(DataNotFoundError, match=r"matches no file; give a file, a directory or a glob") as caught:
        list_files(str(tmp_path / name))
    assert name.rstrip("/") in str(caught.value)


def test_empty_directory(tmp_path):
    with pytest.raises(DataNotFoundError, match="matches no file"):
        list_files(str(tmp_path))


def test_no_readable_format(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataNotFoundError, match=r"ends with \.jsonl.*rows\.csv"):
        list_files(str(tmp_path))


def test_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        list_files(str(tmp_path / "rows.jsonl"))


def test_unknown_protocol():
    with pytest.raises(DataError, match="no file system that fsspec can open"):
        list_files("nonsense://bucket/rows.jsonl")


def test_file_that_vanished(tmp_path):
    with pytest.raises(DataNotFoundError, match="does not exist"):
        list(read_lines(str(tmp_path / "gone.jsonl")))


def test_any_fsspec_url(memory_url):
    with fsspec.open(f"{memory_url}/rows.jsonl.gz", "wb") as stream:
        stream.write(gzip.compress(TEXT))
    (path,) = list_files(memory_url)
    assert path.startswith("memory://")
    assert [row for _, _, row in read_rows(path)] == ROWS


class FakeHub(MemoryFileSystem):
    """The hub's file system with its files in memory."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("hf://").strip("/")


def test_hub_data_set_is_listed_and_read_through_its_file_system(monkeypatch):
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.setitem(registry._registry, "hf", FakeHub)
    monkeypatch.setattr(FakeHub, "store", {})
    monkeypatch.setattr(FakeHub, "pseudo_dirs", [""])
    FakeHub().pipe("/datasets/org/name/data/train.jsonl.gz", gzip.compress(TEXT))
    FakeHub().pipe("/datasets/org/name/README.md", b"card")
    for path in ("hf://datasets/org/name", "hf://datasets/org/name/data/*.gz"):
        (found,) = list_files(path)
        assert found == "hf:///datasets/org/name/data/train.jsonl.gz"  # memory paths are absolute, the hub's are not
        assert [row for _, _, row in read_rows(found)] == ROWS


def test_hub_that_cannot_be_reached_names_the_cure(monkeypatch):
    class Unreachable(FakeHub):
        def isdir(self, path):
            raise RuntimeError("no route to hub")  # as httpx, whose errors are no OSError

    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, "hf", Unreachable)
    with pytest.raises(DataNotFoundError, match=r"org/name cannot be listed: no route to hub\. Check the spelling"):
        list_files("hf://datasets/org/name")


def test_encode_row_carries_numpy_and_refuses_nothing():
    row = {"a": np.array([1, 2]), "b": np.float32(0.5), "c": None, "d": {"e": {1}.__class__}}
    assert decode_row(encode_row(row)) == {"a": [1, 2], "b": 0.5, "c": None, "d": {"e": "<class 'set'>"}}
