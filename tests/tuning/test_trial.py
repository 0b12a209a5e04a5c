"""What Tune sees of a trial, without Ray: records in order, nothing twice, and stops that stay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raylign.config import to_yaml
from raylign.errors import CacheMismatchError, ConfigError
from raylign.runtime.phases import CONFIG_FILE, MANIFEST, write_json
from raylign.runtime.trainer import METRICS_FILE
from tuning.run import _cause, _domain, _optuna, _scheduler, check_same, run_sweep
from tuning.sweep_config import Sweep, SweepSection, load_sweep
from tuning.trial import (
    IS_DONE,
    IS_REPLAYED,
    STOPPED_FILE,
    TRIAL_FILE,
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
    records = [{"step": 1, "loss": 2.0}]
    check_metric(records, None, has_rounds=False)
    check_metric(records, "loss", has_rounds=False)
    check_metric([], "los", has_rounds=False)
    check_metric(records, "score", has_rounds=True)  # the last record of the round is to come
    with pytest.raises(ConfigError, match=r"sweep\.metric=los is not recorded .* step, loss"):
        check_metric(records, "los", has_rounds=False)


def test_records_without_the_compared_metric_are_passed_over() -> None:
    records: list[dict[str, Any]] = [{"step": 1}, {"step": 2, "score": 0.5}, {"step": 3}, {"step": 4, "score": 0.7}]
    shown = next_record(records, after=0, until=9, metric="score")
    assert shown == {"step": 2, "score": 0.5}
    assert next_record(records, after=2, until=9, metric="score") == {"step": 4, "score": 0.7}
    assert next_record(records, after=2, until=3, metric="score") is None


def tell(scheduler: Any, name: str, *scores: float, replayed: bool) -> list[str]:
    """What the scheduler decides about one record after the other of a trial."""
    trial = SimpleNamespace(trial_id=name, status="RUNNING", config={})
    scheduler.on_trial_add(None, trial)
    results = [{"step": 2**index, "score": score, IS_REPLAYED: replayed} for index, score in enumerate(scores)]
    return [scheduler.on_trial_result(None, trial, {"trial_id": name, "config": {}, **result}) for result in results]


def test_records_of_an_earlier_session_set_thresholds_but_stop_nothing() -> None:
    """The better trial is told first, unlike the first time; what is new is judged by both."""
    scheduler = _scheduler(SweepSection(scheduler="asha", grace_steps=1, reduction_factor=2))
    scheduler.set_search_properties("score", "max")
    assert tell(scheduler, "better", 0.6, replayed=True) == ["CONTINUE"]
    assert tell(scheduler, "kept", 0.5, replayed=True) == ["CONTINUE"]
    assert tell(scheduler, "new", 0.4, replayed=False) == ["STOP"]
    assert tell(scheduler, "good", 0.7, replayed=False) == ["CONTINUE"]


def test_records_that_are_told_again_are_marked(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = sweep.trial(KEYS, 0).directory
    record(directory, 1, 2)
    mark(directory, "started")
    monkeypatch.setattr(TuneTrial, "_start_runner", staticmethod(lambda: Runner()))
    trial = started(sweep)
    monkeypatch.setattr("tuning.trial.ray.wait", lambda refs, timeout: ([], refs))
    first = [trial.step(), trial.step()]
    record(directory, 1, 2, 3)
    assert [(one["step"], one[IS_REPLAYED]) for one in (*first, trial.step())] == [(1, True), (2, True), (3, False)]


class Runner:
    """Stands for the actor that trains."""

    class Run:
        def remote(self, *_: Any) -> object:
            return object()

    run = Run()


@pytest.mark.parametrize("key", ["train.learning_rate=1e-6", "confidence.alpha=3", "data.max_length=100"])
def test_a_training_of_another_configuration_is_not_counted(tmp_path: Path, key: str) -> None:
    space = tmp_path / "own.yaml"
    space.write_text("train.beta: {grid: [0.1, 0.3]}")
    where = [f"run.storage={tmp_path}", "run.name=s"]
    (trial, _) = load_sweep(str(space), overrides=where).trials
    (trial.directory / "train").mkdir(parents=True)
    (trial.directory / CONFIG_FILE).write_text(to_yaml(trial.config))
    (changed, _) = load_sweep(str(space), overrides=[*where, key]).trials
    check_same(changed)  # nothing was trained yet
    mark(trial.directory, "done")
    (moved, _) = load_sweep(str(space), overrides=[*where, "features.num_actors=2", "evaluate.num_prompts=20"]).trials
    check_same(moved)
    with pytest.raises(CacheMismatchError, match=rf"{key.partition('=')[0]}: was .*, now"):
        check_same(changed)


def test_optuna_goes_on_with_new_points(tmp_path: Path) -> None:
    """A resumed search is shown the points of the first session, and draws others."""
    pytest.importorskip("optuna")
    space = tmp_path / "own.yaml"
    space.write_text("train.beta: {uniform: [0.1, 0.5]}")
    overrides = [f"run.storage={tmp_path}", "run.name=s", "sweep.search=optuna", "sweep.metric=loss"]
    sweep = load_sweep(str(space), overrides=overrides)

    def suggested(num: int) -> list[float]:
        search = _optuna(sweep)
        domain = {"keys": {axis.key: _domain(axis) for axis in sweep.space.axes}}
        assert search.set_search_properties("loss", "min", domain)
        return [search.suggest(str(index))["keys"]["train.beta"] for index in range(num)]

    first = suggested(3)
    for beta in first:
        trial = sweep.trial({"train.beta": beta}, 0)
        trial.directory.mkdir(parents=True)
        write_json(trial.directory / TRIAL_FILE, {"keys": dict(trial.keys), "seed": 0})
    again = suggested(6)
    assert sorted(again[:3]) == pytest.approx(sorted(first))
    assert len({round(beta, 9) for beta in again}) == 6


def test_optuna_is_not_resumed_with_another_seed(tmp_path: Path) -> None:
    """Its points would be trained again, and the old ones have no answers to be judged by."""
    pytest.importorskip("optuna")
    space = tmp_path / "own.yaml"
    space.write_text("train.beta: {uniform: [0.1, 0.5]}")
    overrides = [f"run.storage={tmp_path}", "run.name=s", "sweep.search=optuna", "sweep.seeds=[4]"]
    trial = load_sweep(str(space), overrides=overrides).trial({"train.beta": 0.2}, 0)
    trial.directory.mkdir(parents=True)
    write_json(trial.directory / TRIAL_FILE, {"keys": dict(trial.keys), "seed": 0})
    with pytest.raises(ConfigError, match=r"sweep\.seeds=\[4\], but the points in .* have \[0\]: .* resume with the"):
        run_sweep(load_sweep(str(space), overrides=overrides, is_resumed=True))


def test_a_failure_is_told_by_its_cause() -> None:
    error = RuntimeError("wrapped")
    error.cause = ValueError("Traceback\n  line\nbeta is 3")  # type: ignore[attr-defined]
    assert _cause(error) == "ValueError: beta is 3"
    assert _cause(KeyError()) == "KeyError: no message"
