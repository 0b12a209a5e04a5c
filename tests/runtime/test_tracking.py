"""Weights & Biases tracking: a real offline run, read back from the file that wandb wrote."""

from __future__ import annotations

import builtins
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylign.config import load_config
from raylign.errors import ConfigError, MissingDependencyError
from raylign.runtime import tracking
from raylign.runtime.tracking import STATE_FILE, record_summary, track_run


def offline_config(**tracking_values: str):
    return load_config(values={"tracking": {"wandb": "offline", "project": "test", **tracking_values}})


def append(path: Path, *records: dict) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def wait_for_history(directory: Path, num_rows: int) -> list[dict]:
    """`logged_history` once wandb's own process has written so many rows, or what there is after 20 s."""
    deadline = time.monotonic() + 20
    while len(rows := logged_history(directory)) < num_rows and time.monotonic() < deadline:
        time.sleep(0.1)
    return rows


def logged_history(directory: Path) -> list[dict]:
    """Rows in the transaction logs of all offline runs below a directory, oldest run first."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for data in log_entries(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def log_entries(content: bytes) -> Iterator[bytes]:
    """Entries of a LevelDB log behind a 7-byte header: blocks of 32 KiB, each piece crc (4), length (2), type (1)."""
    position, entry = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        entry += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole entry, or the last piece of one
            yield entry
            entry = b""


@pytest.mark.slow
def test_offline_run_has_every_record_once_and_resume_keeps_the_run(tmp_path):
    pytest.importorskip("wandb")
    metrics = tmp_path / "metrics.jsonl"
    config = offline_config()
    with track_run(config, tmp_path, metrics):
        append(metrics, {"step": 5, "loss": 0.7, "rewards/margins": 0.1})
        append(metrics, {"step": 10, "loss": 0.6, "rewards/margins": 0.2})
    first_id = json.loads((tmp_path / STATE_FILE).read_text())["run_id"]
    with track_run(config, tmp_path, metrics):
        append(metrics, {"step": 15, "loss": 0.5, "rewards/margins": 0.3})

    names = ("_step", "train/global_step", "train/loss", "train/rewards/margins")
    shown = [tuple(row[name] for name in names) for row in wait_for_history(tmp_path, 3)]
    assert shown == [(5, 5, 0.7, 0.1), (10, 10, 0.6, 0.2), (15, 15, 0.5, 0.3)]
    assert json.loads((tmp_path / STATE_FILE).read_text()) == {"run_id": first_id, "last_step": 15}
    assert all(first_id in path.name for path in tmp_path.glob("wandb/offline-run-*"))


def test_off_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_import_wandb", lambda: pytest.fail("wandb was imported"))
    with track_run(load_config(), tmp_path, tmp_path / "metrics.jsonl"):
        pass
    record_summary(load_config(), tmp_path, {"attack_success": 0.1})
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with (
        pytest.raises(MissingDependencyError, match="pip install wandb"),
        track_run(offline_config(), tmp_path, tmp_path),
    ):
        pass


def test_online_without_key_is_an_error_not_a_prompt(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(tracking, "_import_wandb", lambda: None)
    with (
        pytest.raises(ConfigError, match="WANDB_API_KEY"),
        track_run(offline_config(wandb="online"), tmp_path, tmp_path),
    ):
        pass


def test_a_line_in_the_making_waits(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"st')
    assert tracking.read_records(metrics) == [{"step": 1}]


def test_a_failing_client_does_not_stop_training(tmp_path, monkeypatch, capsys):
    class Client:
        def log(self, _values, step):
            raise RuntimeError("no network")

    class Opened:
        def __enter__(self):
            return Client()

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(tracking, "_open_run", lambda *_: Opened())
    metrics = tmp_path / "metrics.jsonl"
    with track_run(offline_config(), tmp_path, metrics):
        append(metrics, {"step": 1, "loss": 1.0})
    assert "no network" in capsys.readouterr().err
