"""What Tune sees of a trial, without Ray: records in order, nothing twice, and stops that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raylign.errors import ConfigError
from raylign.runtime.phases import MANIFEST, write_json
from raylign.runtime.trainer import METRICS_FILE
from tuning.run import _cause
from tuning.sweep_config import Sweep, load_sweep
from tuning.trial import (
    IS_DONE,
    STOPPED_FILE,
    TuneTrial,
    check_metric,
    is_trained,
    mark_stopped,
    next_record,
    read_records,
    reward_group,
    stopped_at,
)

KEYS = {"train.beta": 0.1}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    space = tmp_path / "own.yaml"
    space.write_text("train.beta: {grid: [0.1, 0.3]}")
    return load_sweep(str(space), overrides=[f"run.storage={tmp_path}", "run.name=s"])


def record(directory: Path, *steps: int) -> None:
    (directory / "train").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps)
    (directory / "train" / METRICS_FILE).write_text(lines + '{"step": 9')


def mark(directory: Path, status: str) -> None:
    write_json(directory / "train" / MANIFEST, {"status": status, "facts": {}})


def started(sweep: Sweep) -> Any:
    trial = TuneTrial.__new__(TuneTrial)
    trial.setup({"trial": {"keys": KEYS, "seed": 0}}, sweep=sweep, shared=None)
    return trial


def test_a_line_in_the_making_is_left_out(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none") == []
    record(tmp_path, 1, 2)
    assert [one["step"] for one in read_records(tmp_path / "train" / METRICS_FILE)] == [1, 2]


def test_repeated_updates_are_not_shown_again() -> None:
    records = [{"step": step} for step in (1, 2, 3, 2, 3, 4)]
    assert next_record(records, after=3, until=9) == {"step": 4}
    assert next_record(records, after=4, until=9) is None
    assert next_record(records, after=0, until=0) is None


def test_a_finished_trial_tells_its_records_again_and_starts_nothing(sweep: Sweep) -> None:
    directory = sweep.trial(KEYS, 0).directory
    record(directory, 1, 2)
    mark(directory, "done")
    trial = started(sweep)
    results = [trial.step() for _ in range(3)]
    assert [(one["step"], one[IS_DONE], one.get("done", False)) for one in results] == [
        (1, False, False),
        (2, False, False),
        (2, True, True),
    ]
    trial.cleanup()


def test_a_stopped_trial_stays_stopped_where_it_was(sweep: Sweep) -> None:
    directory = sweep.trial(KEYS, 0).directory
    record(directory, 1, 2, 3)
    mark(directory, "started")
    write_json(directory / STOPPED_FILE, {"step": 2})
    assert (stopped_at(directory), is_trained(directory)) == (2, False)
    trial = started(sweep)
    assert [trial.step()["step"] for _ in range(3)] == [1, 2, 2]
    assert trial._runner is None


def test_the_first_word_of_a_scheduler_counts(tmp_path: Path) -> None:
    mark_stopped(tmp_path, {"step": 3, "loss": 0.5}, "loss")
    mark_stopped(tmp_path, {"step": 1, "loss": 0.9}, "loss")
    assert json.loads((tmp_path / STOPPED_FILE).read_text()) == {"step": 3, "loss": 0.5}
    finished = tmp_path / "finished"
    record(finished, 1)
    mark(finished, "done")
    mark_stopped(finished, {"step": 1}, "loss")
    assert is_trained(finished)


def test_points_with_the_same_heads_share_a_reward_whatever_their_confidence(tmp_path: Path) -> None:
    configs = [trial.config for name in ("confidence", "beta") for trial in load_sweep(name).trials]
    assert len({reward_group(config) for config in configs}) == 1
    assert len({reward_group(trial.config) for trial in load_sweep("ensembles").trials}) == 5


def test_cheap_settings_are_each_judged_once(tmp_path: Path) -> None:
    space = tmp_path / "own.yaml"
    space.write_text("confidence.alpha: {grid: [1, 2, 4]}\ntrain.beta: {grid: [0.1, 0.2]}")
    settings = load_sweep(str(space)).cheap_settings
    assert [keys for keys, _ in settings] == [{"confidence.alpha": alpha} for alpha in (1, 2, 4)]
    assert [config.confidence.alpha for _, config in settings] == [1, 2, 4]
    assert load_sweep("beta").cheap_settings == ()
    with pytest.raises(ConfigError, match=r"sweep\.keep is set but no axis of space beta"):
        load_sweep("beta", overrides=["sweep.keep=2"])
    with pytest.raises(ConfigError, match=r"sweep\.replicates is set but no axis"):
        load_sweep("ensembles", overrides=["train.objective=dpo", "sweep.replicates=2"])


def test_a_metric_that_is_not_recorded_is_refused_with_those_that_are() -> None:
    check_metric({"step": 1, "loss": 2.0}, None)
    check_metric({"step": 1, "loss": 2.0}, "loss")
    with pytest.raises(ConfigError, match=r"sweep\.metric=los is not recorded .* step, loss"):
        check_metric({"step": 1, "loss": 2.0}, "los")


def test_a_failure_is_told_by_its_cause() -> None:
    error = RuntimeError("wrapped")
    error.cause = ValueError("Traceback\n  line\nbeta is 3")  # type: ignore[attr-defined]
    assert _cause(error) == "ValueError: beta is 3"
    assert _cause(KeyError()) == "KeyError: no message"
