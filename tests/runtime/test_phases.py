"""Run directories: a phase is done once for its inputs, redone after a crash, and never mixed with other inputs."""

from __future__ import annotations

import json

import pytest

from raylign.config import load_config
from raylign.errors import CacheMismatchError, OutputExistsError
from raylign.runtime.phases import Run, digest, open_run


def test_phase_runs_once_and_returns_its_facts_again(tmp_path):
    calls = []

    def work(directory):
        calls.append(directory)
        return {"rows": 3}

    for _ in range(2):
        run = Run(tmp_path)
        assert run.phase("ingest", {"seed": 1}, work) == (tmp_path / "ingest", {"rows": 3})
    assert calls == [tmp_path / "ingest"]
    assert run.skipped == ["ingest"]
    assert run.seconds["ingest"] >= 0


def test_a_phase_whose_work_lies_elsewhere_is_redone_when_that_is_gone(tmp_path):
    cache = tmp_path / "cache"

    def work(_):
        cache.mkdir()
        return {"cache": str(cache)}

    for is_there in (False, True, False):
        if not is_there and cache.exists():
            cache.rmdir()
        run = Run(tmp_path / "run")
        _, facts = run.phase("features", {"seed": 1}, work, is_kept=lambda facts: cache.is_dir())
        assert facts == {"cache": str(cache)}
        assert run.skipped == (["features"] if is_there else [])
        assert cache.is_dir()


def test_other_inputs_are_refused_and_named(tmp_path):
    Run(tmp_path).phase("rank", {"seed": 1, "alpha": 7.5}, lambda _: {})
    with pytest.raises(CacheMismatchError, match=r"alpha: was 7\.5, now 3\.0"):
        Run(tmp_path).phase("rank", {"seed": 1, "alpha": 3.0}, lambda _: {})


def test_crashed_phase_is_redone_and_its_seconds_stay_counted(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 100.0, 105.0])
    monkeypatch.setattr("raylign.runtime.phases.time.monotonic", lambda: next(clock))

    def crash(_):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        Run(tmp_path).phase("train", {"seed": 1}, crash)
    run = Run(tmp_path)
    run.phase("train", {"seed": 1}, lambda _: {})
    assert run.seconds == {"train": 15.0}
    assert run.skipped == []


def test_key_survives_json(tmp_path):
    """Tuples and paths in a key must compare equal after a round trip."""
    for _ in range(2):
        Run(tmp_path).phase("x", {"layers": (1, 2), "path": tmp_path}, lambda _: {})


def test_open_run_writes_what_reproduces_it(tmp_path):
    config = load_config(None, [f"run.storage={tmp_path}", "run.name=a", "train.beta=0.3"])
    run = open_run(config)
    assert load_config(run.directory / "config.yaml").train.beta == 0.3
    assert json.loads((run.directory / "environment.json").read_text())["versions"]["torch"]
    with pytest.raises(OutputExistsError, match="in use"):
        open_run(config)
    open_run(load_config(None, [f"run.storage={tmp_path}", "run.name=a", "train.beta=0.3", "run.resume=true"]))


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
