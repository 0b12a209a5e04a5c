"""Ingest on a real Ray with a tokenizer of bytes; all files are small and local."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.config import DataSection
from raylign.errors import DataError, DataNotFoundError, ModelError, QuarantineLimitError
from raylign.types import TEXT_COLUMNS, TOKEN_COLUMNS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

NUM_ROWS = 1200  # more than two chunks


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, make_tokenizer):
    path = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def ingest(tmp_path, model_path):
    from raylign.runtime.ingest_job import run_ingest

    def run(source, name="out", seed=0, **config):
        config = DataSection(**({"max_length": 64, "max_bad_fraction": 1.0} | config))
        source = str(source) if isinstance(source, Path) else source
        return run_ingest(source, config=config, model_path=model_path, output_dir=tmp_path / name, seed=seed)

    return run


def row(number, **changes):
    return {"id": f"r{number}", "prompt": f"question {number // 2}", "chosen": f"c{number}", "rejected": "no"} | changes


def write(path, rows):
    """Rows as JSON lines; bytes are written as they are."""
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def stored(output_dir):
    """The written pairs in the order of the files."""
    return pa.concat_tables([pq.read_table(p) for p in sorted((output_dir / "pairs").glob("*.parquet"))]).to_pylist()


def quarantined(result):
    return [json.loads(line) for line in result.quarantine_path.read_text(encoding="utf-8").splitlines()]


BAD_ROWS = [
    (b'{"prompt":', "invalid_json"),
    (b'{"prompt": "\xff\xfe"}', "not_utf8"),
    ({"prompt": "q", "chosen": "c"}, "missing_field"),
    (row(4, rejected="c4"), "chosen_equals_rejected"),
    (row(5, prompt="q" * 60), "prompt_too_long"),
    (row(0, chosen="other"), "duplicate_id"),
    (row(0, id="again"), "duplicate_row"),
    (row(8, chosen="a<eos>b"), "special_token_in_text"),
    (row(9, chosen=[]), "empty_text"),
]


def test_every_bad_row_is_listed_with_its_line_and_reason(tmp_path, ingest):
    rows = [row(0), *(bad for bad, _ in BAD_ROWS), b"", row(20)]
    result = ingest(write(tmp_path / "rows.jsonl", rows))
    listed = quarantined(result)
    assert [(r["line"], r["reason"]) for r in listed] == [(i + 2, reason) for i, (_, reason) in enumerate(BAD_ROWS)]
    assert {r["path"] for r in listed} == {str(tmp_path / "rows.jsonl")}
    assert listed[0]["excerpt"] == '{"prompt":'
    assert all(r["detail"] for r in listed)
    assert result.counts.quarantined == {reason: 1 for _, reason in sorted(BAD_ROWS, key=lambda bad: bad[1])}
    assert (result.counts.rows_read, result.counts.used) == (len(BAD_ROWS) + 2, 2)
    assert [r["row_id"] for r in result.dataset.take_all()] == ["r0", "r20"]


def test_cut_answers_are_counted(tmp_path, ingest):
    long = "x" * 80
    rows = [row(0), row(1, chosen=long), row(2, chosen=long, rejected="y" * 80), row(3, prompt="q" * 60, chosen=long)]
    result = ingest(write(tmp_path / "rows.jsonl", rows))
    assert (result.counts.used, result.counts.cut) == (3, 3)  # answers of a refused row do not count


def test_files_are_known_by_their_content_wherever_they_lie(tmp_path):
    from raylign.runtime.fingerprints import source_state

    places = [tmp_path / name for name in ("here", "there")]
    for place in places:
        place.mkdir()
        write(place / "rows.jsonl", [row(0), row(1)])
    assert source_state(str(places[0])) == source_state(str(places[1] / "rows.jsonl"))
    write(places[1] / "rows.jsonl", [row(0), row(2)])
    assert source_state(str(places[0])) != source_state(str(places[1]))


def test_columns_and_contents(tmp_path, ingest, make_tokenizer):
    result = ingest(write(tmp_path / "rows.jsonl", [row(0, source="here", chosen_safe=True, split="test")]))
    (stored_row,) = result.dataset.take_all()
    assert tuple(stored_row) == TEXT_COLUMNS + TOKEN_COLUMNS
    schema = result.dataset.schema().base_schema
    assert schema.field("prompt_ids").type.value_type == pa.int32()
    assert stored_row["prompt"] == [{"role": "user", "content": "question 0"}]
    assert (stored_row["split"], stored_row["source"]) == ("test", "here")
    assert (stored_row["chosen_safe"], stored_row["rejected_safe"]) == (True, None)
    tokenizer = make_tokenizer()
    assert tokenizer.decode(stored_row["prompt_ids"]) == "<bos><|user|>question 0<|assistant|>"
    assert tokenizer.decode(stored_row["chosen_ids"]) == "c0<eos>"


def test_order_and_contents_do_not_depend_on_parallelism(tmp_path, ingest, monkeypatch):
    import ray

    data = tmp_path / "data"
    data.mkdir()
    expected = []
    for number, name in enumerate(["b.jsonl", "a.jsonl", "c.jsonl"]):
        rows = [row(i, id=f"{name}-{i}", rejected=f"no {number}") for i in range(NUM_ROWS if name == "b.jsonl" else 50)]
        write(data / name, rows)
    for name, count in (("a.jsonl", 50), ("b.jsonl", NUM_ROWS), ("c.jsonl", 50)):
        expected += [f"{name}-{i}" for i in range(count)]
    two = ingest(data, "two")
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context.execution_options, "resource_limits", ray.data.ExecutionResources(cpu=1))
    one = ingest(data, "one")
    assert [r["row_id"] for r in stored(tmp_path / "two")] == expected
    assert stored(tmp_path / "one") == stored(tmp_path / "two")
    assert one.counts == two.counts
    assert [r["row_id"] for r in two.dataset.take_all()] == expected


def test_a_dataset_gives_what_its_file_gives(tmp_path, ingest):
    import ray

    rows = [row(i) for i in range(NUM_ROWS)]
    rows[700] = row(700, rejected="c700")
    path = write(tmp_path / "rows.jsonl", rows)
    from_file = ingest(path, "file")
    dataset = ray.data.from_items(rows, override_num_blocks=7)
    from_dataset = ingest(dataset, "dataset")
    assert stored(tmp_path / "file") == stored(tmp_path / "dataset")
    assert from_file.counts == from_dataset.counts
    assert from_file.counts.used == NUM_ROWS - 1
    (refused,) = quarantined(from_dataset)
    assert (refused["path"], refused["line"]) == ("", 701)
    assert dataset.context.execution_options.preserve_order is False  # put back as it was


def test_gzip_and_parquet_give_the_same_rows(tmp_path, ingest):
    rows = [row(i, prompt=[{"role": "user", "content": f"q{i}"}]) for i in range(20)]
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(write(tmp_path / "plain", rows).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert ingest(tmp_path / "rows.json.gz", "gz").counts == ingest(tmp_path / "rows.parquet", "pq").counts
    assert stored(tmp_path / "gz") == stored(tmp_path / "pq")


def test_split_is_by_prompt_and_seed(tmp_path, ingest):
    path = write(tmp_path / "rows.jsonl", [row(i) for i in range(NUM_ROWS)])
    result = ingest(path, valid_fraction=0.2, test_fraction=0.2)
    rows = stored(tmp_path / "out")
    by_prompt = {}
    for item in rows:
        by_prompt.setdefault(item["prompt_key"], set()).add(item["split"])
    assert len(by_prompt) == NUM_ROWS // 2
    assert all(len(splits) == 1 for splits in by_prompt.values())
    assert set(result.counts.splits) == {"train", "valid", "test"}
    assert result.counts.splits != ingest(path, "other", seed=1, valid_fraction=0.2, test_fraction=0.2).counts.splits


def test_max_pairs_is_counted(tmp_path, ingest):
    result = ingest(write(tmp_path / "rows.jsonl", [row(i) for i in range(NUM_ROWS)]), max_pairs=100)
    assert (result.counts.used, result.counts.sampled_out) == (100, NUM_ROWS - 100)
    assert result.dataset.count() == 100


def test_duplicates_across_files_and_chunks(tmp_path, ingest):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.jsonl", [row(i) for i in range(NUM_ROWS)])
    write(data / "b.jsonl", [row(NUM_ROWS - 1, id="again"), row(3, chosen="no", rejected="c3", id="turned")])
    result = ingest(data)
    assert result.counts.quarantined == {"duplicate_row": 1}
    assert result.counts.contradictions == 1
    assert [(Path(r["path"]).name, r["line"]) for r in quarantined(result)] == [("b.jsonl", 1)]


def test_an_earlier_result_is_replaced(tmp_path, ingest):
    ingest(write(tmp_path / "many.jsonl", [row(i) for i in range(NUM_ROWS)]))
    result = ingest(write(tmp_path / "few.jsonl", [row(i) for i in range(10)]))
    assert result.dataset.count() == 10
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pairs", "quarantine.jsonl"}


def test_too_many_bad_rows_stop_the_run(tmp_path, ingest):
    from raylign.runtime.ingest_job import read_pairs

    path = write(tmp_path / "rows.jsonl", [row(1), row(2), row(3, rejected="c3"), b"{"])
    with pytest.raises(QuarantineLimitError, match=r"2 of 4 rows .*chosen_equals_rejected 1, invalid_json 1") as caught:
        ingest(path, max_bad_fraction=0.49)
    assert str(tmp_path / "out" / "quarantine.jsonl") in str(caught.value)
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataNotFoundError, match="run ingest"):
        read_pairs(tmp_path / "out")
    assert ingest(path, max_bad_fraction=0.5).counts.used == 2


def test_no_valid_pair(tmp_path, ingest):
    with pytest.raises(DataError, match=r"no valid pair: all 2 rows were quarantined \(invalid_json 2\)"):
        ingest(write(tmp_path / "rows.jsonl", [b"{", b"{"]))


def test_blank_lines_only(tmp_path, ingest):
    with pytest.raises(DataError, match="holds no rows"):
        ingest(write(tmp_path / "rows.jsonl", [b"", b"  "]))


def test_empty_file(tmp_path, ingest):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        ingest(tmp_path / "rows.jsonl")


def test_empty_dataset(ingest):
    import ray

    with pytest.raises(DataError, match="the given Dataset holds no rows"):
        ingest(ray.data.from_items([row(1)]).limit(0))


def test_error_inside_a_task_arrives_as_itself(tmp_path, ingest):
    (tmp_path / "rows.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read") as caught:
        ingest(tmp_path / "rows.jsonl.gz")
    assert type(caught.value) is DataError  # Ray's own is a subclass whose message is the task's traceback


def test_tokenizer_without_template_stops_before_reading(tmp_path, make_tokenizer):
    from raylign.runtime.ingest_job import run_ingest

    make_tokenizer(None).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="has no chat template"):
        run_ingest(
            "nowhere", config=DataSection(), model_path=str(tmp_path / "model"), output_dir=tmp_path / "out", seed=0
        )
    assert not (tmp_path / "out").exists()
