"""Entries that survive exceptions, kills and process borders. The kills are real; only clocks are waited for."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raylign.cost import ledger as ledger_module
from raylign.cost.ledger import Ledger, measured, measured_call
from raylign.cost.rows import Cost, Counts, LedgerRow, read_ledger, total, total_reused


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger", run="a", method="offline", fingerprint="f")


def only_row(ledger: Ledger) -> LedgerRow:
    [row] = read_ledger(ledger.directory)
    return row


def test_an_entry_says_what_it_took(ledger):
    before = time.time()
    with ledger.measure("generate", devices={"cpu": 1.5, "H200": 2}) as entry:
        time.sleep(0.05)
        entry.add(generated_tokens=3, decode_steps=2)
        entry.add(generated_tokens=4, flops=10**21)
    row = only_row(ledger)
    assert (row.phase, row.stage, row.status, row.run, row.method, row.fingerprint) == (
        *("generate", "generate", "measured"),
        *("a", "offline", "f"),
    )
    assert row.devices == {"cpu": 1.5, "H200": 2}
    assert before <= row.started_at <= before + 5
    assert 0.05 <= row.cost.wall_s < 5
    assert row.cost.device_s == {"cpu": 1.5 * row.cost.wall_s, "H200": 2 * row.cost.wall_s}
    assert row.cost.counts == Counts(generated_tokens=7, decode_steps=2, flops=10**21)
    assert row.cost.peak_rss_mib > 5
    assert row.is_finished and row.error == "" and row.reused is None


def test_an_exception_ends_the_entry_and_passes(ledger):
    with pytest.raises(KeyError), ledger.measure("score", devices={"cpu": 1}) as entry:
        entry.add(num_items=5)
        raise KeyError("gone")
    row = only_row(ledger)
    assert row.is_finished and row.error == "KeyError"
    assert row.cost.counts.num_items == 5


def test_a_call_is_measured_and_returns_what_its_work_does(ledger):
    with ledger.measure("reward", devices={"cpu": 1}):
        task = pickle.loads(pickle.dumps(ledger.below()))  # as a task gets it
    assert measured_call(task, "fit_reward", {"gpu": 1}, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        measured_call(task, "fit_reward", {"gpu": 1}, divmod, 7, 0)
    outer, *fits = read_ledger(ledger.directory)
    assert [(row.phase, row.devices, row.parent, row.error) for row in fits] == [
        ("fit_reward", {"gpu": 1}, outer.id, ""),
        ("fit_reward", {"gpu": 1}, outer.id, "ZeroDivisionError"),
    ]
    assert measured_call(None, "fit_reward", {"gpu": 1}, divmod, 7, 2) == (3, 1)


def test_an_unknown_count_is_refused(ledger):
    with ledger.measure("score", devices={}) as entry, pytest.raises(TypeError, match="tokens_generated"):
        entry.add(tokens_generated=1)


def test_a_later_session_adds_rows(ledger):
    for session in range(2):
        with Ledger(ledger.directory, run="a").measure("train", devices={"cpu": 1}) as entry:
            entry.add(num_items=session + 1)
    assert total(read_ledger(ledger.directory)).counts.num_items == 3
    assert len(list(ledger.directory.glob("*.jsonl"))) == 2


def test_nothing_is_written_before_something_is_measured(ledger):
    pickle.loads(pickle.dumps(ledger))
    assert not ledger.directory.exists()
    assert read_ledger(ledger.directory) == []


def test_a_pickled_ledger_keeps_its_labels_and_parent(ledger):
    with ledger.measure("train", devices={"cpu": 2}) as outer:
        copy = pickle.loads(pickle.dumps(ledger.below(outer)))
        thread = threading.Thread(target=lambda: copy.measure("policy_update", devices={"cpu": 2}).__enter__())
        thread.start()  # a new thread knows no surrounding entry, as a new process does
        thread.join()
    rows = {row.phase: row for row in read_ledger(ledger.directory)}
    assert rows["policy_update"].stage == "train"
    assert (rows["policy_update"].run, rows["policy_update"].method) == ("a", "offline")


def test_below_without_an_entry_means_the_one_that_is_open(ledger):
    with ledger.measure("features", devices={}), ledger.below().measure("reference_forward", devices={}):
        pass
    inner = ledger.below()  # nothing is open: the same as the ledger itself
    with inner.measure("rank", devices={}):
        pass
    rows = {row.phase: row for row in read_ledger(ledger.directory)}
    assert rows["reference_forward"].parent == rows["features"].id
    assert rows["rank"].parent == ""


def test_devices_get_the_names_of_the_machine(tmp_path):
    named = Ledger(tmp_path, kinds={"gpu": "H200"})
    with named.measure("train", devices={"cpu": 1, "gpu": 2}):
        pass
    with pickle.loads(pickle.dumps(named.below())).measure("train", devices={"gpu": 2}):
        pass
    assert [row.devices for row in read_ledger(tmp_path)] == [{"cpu": 1, "H200": 2}, {"H200": 2}]


def test_without_a_ledger_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with measured(None, "score", {"cpu": 1}) as entry:
        entry.add(num_items=1)
    assert not list(tmp_path.iterdir())


def test_reuse_is_free_and_counts_once(ledger):
    cost = Cost(wall_s=7.0, device_s={"cpu": 14.0}, counts=Counts(flops=99))
    for key in ("k1", "k1", "k2"):
        Ledger(ledger.directory).reuse("features", cost, key=key)
    rows = read_ledger(ledger.directory)
    assert total(rows).device_s == {}
    assert total(rows).wall_s < 1
    assert total_reused(rows) == cost + cost


KILLED = """
import sys, time
from raylign.cost import ledger
ledger.BEAT_S = 0.05
open_ledger = ledger.Ledger(sys.argv[1], run="killed")
with open_ledger.measure("score", devices={"cpu": 1}) as entry:
    entry.add(num_items=1)
with open_ledger.measure("train", devices={"cpu": 2}) as outer:
    with open_ledger.measure("policy_update", devices={"cpu": 2}) as inner:
        inner.add(num_items=5)
        print("open", flush=True)
        time.sleep(60)
"""


def start(code: str, directory: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_is_billed_up_to_its_last_sign_of_life(tmp_path):
    process = start(KILLED, tmp_path)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    rows = {row.phase: row for row in read_ledger(tmp_path)}
    assert rows["score"].is_finished and rows["score"].cost.counts.num_items == 1
    assert not rows["policy_update"].is_finished
    assert rows["policy_update"].cost.counts.num_items == 5
    assert 0.3 <= rows["policy_update"].cost.wall_s < 5
    assert rows["policy_update"].cost.device_s == {"cpu": 2 * rows["policy_update"].cost.wall_s}
    assert rows["train"].cost.device_s["cpu"] < 0.1  # what the nested entry took is not counted again
    with Ledger(tmp_path, run="killed").measure("train", devices={"cpu": 2}) as entry:
        entry.add(num_items=1)
    assert total(read_ledger(tmp_path)).counts.num_items == 7


TORN = """
import os, signal, sys
from raylign.cost.ledger import Ledger
from raylign.cost import ledger
open_ledger = ledger.Ledger(sys.argv[1])
with open_ledger.measure("score", devices={"cpu": 1}) as entry:
    entry.add(num_items=1)
os.write(open_ledger._writer._file, b'{"event": "sta')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    with start(TORN, tmp_path) as process:
        process.wait(timeout=60)
    assert total(read_ledger(tmp_path)).counts.num_items == 1


def test_open_entries_can_be_read_while_they_run(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "BEAT_S", 0.02)
    with ledger.measure("generate", devices={"cpu": 1}) as entry:
        entry.add(num_items=2)
        deadline = time.monotonic() + 20
        while not (row := only_row(ledger)).cost.wall_s and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not row.is_finished and row.cost.wall_s > 0 and row.cost.counts.num_items == 2
    assert only_row(ledger).is_finished
    assert not list(ledger.directory.glob("*.open.json"))


def test_the_thread_ends_when_nothing_is_open_and_comes_back(ledger, monkeypatch):
    monkeypatch.setattr(ledger_module, "BEAT_S", 0.02)

    others = set(threading.enumerate())
    for _ in range(2):
        with ledger.measure("score", devices={}):
            [beat] = [t for t in threading.enumerate() if t not in others and t.name == "raylign-ledger"]
        beat.join(timeout=20)
        assert not beat.is_alive()


def test_threads_add_to_one_entry(ledger):
    with ledger.measure("generate", devices={}) as entry:
        threads = [threading.Thread(target=lambda: [entry.add(num_items=1) for _ in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert only_row(ledger).cost.counts.num_items == 800


def test_lines_are_json_with_plain_values(ledger):
    with ledger.measure("score", devices={"cpu": 1}):
        pass
    [file] = ledger.directory.glob("*.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "finished"]
    assert events[0]["id"] == events[1]["id"]
