"""How rows are merged: every reserved second once, whoever wrote it. Files are written by hand, with round numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raylign.cost.rows import Cost, Counts, LedgerRow, money, read_ledger, total, total_below, totals
from raylign.errors import DataError


def entry(name: str, start: float, seconds: float | None, cpus: float, *, parent: str = "", **counts: int) -> list[Any]:
    """The two lines of an entry with id and phase `name`; one line for an entry that is still open."""
    started = {
        **{"event": "started", "id": name, "parent": parent, "phase": name, "status": "measured", "run": "a"},
        **{"method": "offline", "fingerprint": "", "devices": {"cpu": cpus} if cpus else {}, "started_at": start},
    }
    finished = {"event": "finished", "id": name, "wall_s": seconds, "counts": counts, "peak_rss_mib": 1.0, "error": ""}
    return [started] if seconds is None else [started, finished]


def write(directory: Path, name: str, *entries: Sequence[Any]) -> None:
    lines = [json.dumps(line) for lines in entries for line in lines]
    (directory / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def read(directory: Path) -> dict[str, LedgerRow]:
    return {row.phase: row for row in read_ledger(directory)}


def test_nested_time_is_counted_where_it_was_spent(tmp_path):
    """train 100 s on 2 CPUs; an update of 30 s and one of 50 s in another process, the latter with a sync of 10 s."""
    write(tmp_path, "driver", entry("train", 0, 100, 2))
    write(
        tmp_path,
        "worker",
        entry("update", 10, 30, 2, parent="train"),
        entry("later", 40, 50, 2, parent="train"),
        entry("sync", 50, 10, 1, parent="later"),
    )
    rows = read(tmp_path)
    seconds = {name: row.cost.device_s["cpu"] for name, row in rows.items()}
    assert seconds == {"train": 40, "update": 60, "later": 90, "sync": 10}
    assert {name: row.cost.wall_s for name, row in rows.items()} == {"train": 20, "update": 30, "later": 40, "sync": 10}
    assert total(rows.values()).device_s == {"cpu": 200}
    assert {row.stage for row in rows.values()} == {"train"}


def test_what_an_entry_and_all_below_it_cost(tmp_path):
    write(
        tmp_path,
        "driver",
        entry("train", 0, 100, 2),
        entry("later", 40, 50, 2, parent="train", num_items=1),
        entry("sync", 50, 10, 1, parent="later", num_items=2),
    )
    cost = total_below(read_ledger(tmp_path), "later")
    assert cost == Cost(wall_s=50, device_s={"cpu": 100}, counts=Counts(num_items=3), peak_rss_mib=1)
    assert total_below(read_ledger(tmp_path), "train").device_s == {"cpu": 200}
    with pytest.raises(KeyError):
        total_below(read_ledger(tmp_path), "nobody")


def test_entries_side_by_side_cover_time_once_and_devices_twice(tmp_path):
    """Two actors of 1 CPU within a pool that reserves 2 for 10 s; they overlap from 3 to 7."""
    write(tmp_path, "driver", entry("pool", 0, 10, 2))
    write(tmp_path, "one", entry("one", 1, 6, 1, parent="pool"))
    write(tmp_path, "two", entry("two", 3, 6, 1, parent="pool"))
    rows = read(tmp_path)
    assert rows["pool"].cost.device_s == {"cpu": 20 - 12}
    assert rows["pool"].cost.wall_s == 10 - 8
    assert total(rows.values()).wall_s == 10
    assert total(rows.values()).device_s == {"cpu": 20}


def test_workers_that_outlive_a_killed_driver_are_billed_in_full(tmp_path):
    """The driver died at 5 s, the update went on to 12 s."""
    write(tmp_path, "driver", entry("train", 0, None, 2))
    (tmp_path / "driver.open.json").write_text(json.dumps({"train": {"wall_s": 5.0, "counts": {"num_items": 1}}}))
    write(tmp_path, "worker", entry("update", 2, 10, 2, parent="train"))
    rows = read(tmp_path)
    assert rows["train"].cost.device_s == {"cpu": 0}
    assert rows["train"].cost.wall_s == 2
    assert rows["train"].cost.counts.num_items == 1
    assert not rows["train"].is_finished
    assert total(rows.values()).device_s == {"cpu": 20}


def test_other_kinds_of_device_are_subtracted_apart(tmp_path):
    write(tmp_path, "driver", entry("online", 0, 10, 4))
    write(tmp_path, "free", entry("nap", 0, 10, 0, parent="online"))
    rows = read(tmp_path)
    assert rows["online"].cost.device_s == {"cpu": 40}
    assert rows["online"].cost.wall_s == 0


def test_a_finished_line_wins_over_signs_of_life(tmp_path):
    write(tmp_path, "driver", entry("train", 0, 100, 1, num_items=9))
    (tmp_path / "driver.open.json").write_text(json.dumps({"train": {"wall_s": 5.0, "counts": {"num_items": 1}}}))
    row = read(tmp_path)["train"]
    assert row.is_finished and row.cost.wall_s == 100 and row.cost.counts.num_items == 9


@pytest.mark.parametrize("signs", ["", "{torn"])
def test_an_entry_without_a_sign_of_life_costs_nothing(tmp_path, signs):
    write(tmp_path, "driver", entry("train", 0, None, 1))
    (tmp_path / "driver.open.json").write_text(signs)
    assert read(tmp_path)["train"].cost == Cost(device_s={"cpu": 0})


def test_a_parent_that_left_no_line_does_not_hide_its_children(tmp_path):
    write(tmp_path, "worker", entry("update", 0, 10, 1, parent="lost"))
    row = read(tmp_path)["update"]
    assert row.stage == "update" and row.cost.device_s == {"cpu": 10}


def test_damage_inside_a_file_is_an_error(tmp_path):
    write(tmp_path, "driver", entry("train", 0, 10, 1))
    file = tmp_path / "driver.jsonl"
    file.write_text("{torn\n" + file.read_text())
    with pytest.raises(DataError, match=r"driver\.jsonl, line 1"):
        read_ledger(tmp_path)
    file.write_text(file.read_text().removeprefix("{torn\n") + "{torn")
    assert len(read_ledger(tmp_path)) == 1


def test_totals_by_phase_and_stage(tmp_path):
    write(tmp_path, "driver", entry("train", 0, 10, 2), entry("rank", 20, 5, 1, num_items=3))
    write(tmp_path, "worker", entry("update", 1, 4, 2, parent="train", num_items=2))
    rows = read_ledger(tmp_path)
    by_stage, by_phase = totals(rows), totals(rows, by="phase")
    assert {name: cost.device_s["cpu"] for name, cost in by_stage.items()} == {"train": 20, "rank": 5}
    assert {name: cost.device_s["cpu"] for name, cost in by_phase.items()} == {"train": 12, "update": 8, "rank": 5}
    assert by_stage["train"].counts.num_items == 2
    assert {name: cost.wall_s for name, cost in by_stage.items()} == {"train": 10, "rank": 5}
    assert {name: cost.wall_s for name, cost in by_phase.items()} == {"train": 6, "update": 4, "rank": 5}
    assert list(by_phase) == ["train", "update", "rank"]  # in the order they started


def test_costs_add_seconds_and_counts_and_keep_peaks():
    one = Cost(wall_s=1, device_s={"cpu": 2}, counts=Counts(flops=3, synced_bytes=1), peak_rss_mib=5)
    two = Cost(wall_s=10, device_s={"H200": 4, "cpu": 1}, counts=Counts(flops=4), peak_rss_mib=2, peak_device_mib=7)
    assert one + two == Cost(
        wall_s=11,
        device_s={"cpu": 3, "H200": 4},
        counts=Counts(flops=7, synced_bytes=1),
        peak_rss_mib=5,
        peak_device_mib=7,
    )


def test_a_cost_survives_json():
    cost = Cost(wall_s=1.5, device_s={"cpu": 2.0}, counts=Counts(flops=10**20, num_items=3), peak_rss_mib=4.0)
    assert Cost.from_plain(json.loads(json.dumps(dataclasses.asdict(cost)))) == cost


def test_money_is_price_times_hours():
    assert money({"cpu": 7200, "H200": 1800}, {"cpu": 0.05, "H200": 4, "unused": 9}) == pytest.approx(0.1 + 2.0)
    assert money({}, {}) == 0


def test_a_device_without_a_price_is_no_free_device():
    with pytest.raises(DataError, match=r"no price for H200 \(it names cpu\)"):
        money({"cpu": 1, "H200": 1, "T4": 0}, {"cpu": 0.05})
