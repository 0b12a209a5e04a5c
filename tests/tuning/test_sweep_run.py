"""Sweeps on real Ray: what is stopped frees everything, what is finished is kept, what was killed goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylign.errors import OutputExistsError
from tuning.sweep_config import Sweep, load_sweep
from tuning.trial import STOPPED_FILE, read_records, train_manifest

pytestmark = pytest.mark.timeout(900)  # several runs each, on a machine that may be busy
SMALL = [
    "data.max_pairs=160",
    "data.max_length=192",
    "data.max_bad_fraction=1",
    "data.test_fraction=0.2",
    "reward.folds=2",
    "reward.epochs=2",
    "train.batch_size=8",
    "train.log_every=1",
    "evaluate.num_prompts=8",
    "evaluate.max_new_tokens=8",
    "evaluate.bootstrap_samples=100",
]
# Ray Data's own helpers stay for the session, with no resource
HELPERS = ("_StatsActor", "_AutoscalingCoordinatorActor", "AutoscalingRequester", "ActorLocationTracker")
# asha compares the learning rate after the first update: that of the long trial has hardly begun to warm up
ASHA = [
    "sweep.scheduler=asha",
    "sweep.metric=learning_rate",
    "sweep.grace_steps=1",
    "sweep.reduction_factor=2",
    "sweep.max_concurrent=1",
]
LONG = 5000


def small(directory: Path, space: str, *overrides: str, is_resumed: bool = False) -> Sweep:
    file = directory / "own.yaml"
    file.write_text(space)
    where = [f"run.storage={directory}", "run.name=s"]
    return load_sweep(str(file), None, [*where, *SMALL, *overrides], is_resumed=is_resumed)


def wait_for(is_true: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not after {seconds:g} s: {what}"
        time.sleep(0.5)


def left_over() -> dict[str, Any]:
    """What is not free: amounts of resources by name, placement groups and actors by id."""
    import ray
    from ray._private.state import actors  # asks the control store; the public call needs a dashboard

    cluster, free = ray.cluster_resources(), ray.available_resources()
    taken: dict[str, Any] = {
        name: amount - free.get(name, 0.0)
        for name, amount in cluster.items()
        if not name.startswith("object_store") and amount - free.get(name, 0.0) > 1e-9
    }
    taken |= {id: one["state"] for id, one in ray.util.placement_group_table().items() if one["state"] != "REMOVED"}
    alive = {id: one["ActorClassName"] for id, one in actors().items() if one["State"] != "DEAD"}
    return taken | {id: name for id, name in alive.items() if not name.endswith(HELPERS)}


@pytest.fixture(scope="module")
def before(ray_cluster: None) -> dict[str, Any]:
    """What tests of other modules left on the cluster that all share."""
    return left_over()


def assert_all_free(before: dict[str, Any], seconds: float = 30) -> None:
    """Wait for what ends on its own, such as processes that were told to."""

    def more() -> dict[str, Any]:
        found = left_over()
        return {
            name: value
            for name, value in found.items()
            if name not in before or (isinstance(value, float) and value > before[name] + 1e-9)
        }

    end = time.monotonic() + seconds
    while more() and time.monotonic() < end:
        time.sleep(0.5)
    assert more() == {}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


SPACE = f"train.epochs: 500\ntrain.max_steps: {{grid: [3, {LONG}]}}"


@pytest.fixture(scope="module")
def swept(before: dict[str, Any], directory: Path) -> Any:
    from tuning.run import run_sweep

    return run_sweep(small(directory, SPACE, *ASHA))


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_asha_stops_leaves_nothing_behind(swept: Any, before: dict[str, Any], directory: Path) -> None:
    stopped, finished = swept.points[1], swept.points[0]
    assert list(stopped.stopped) == [0]
    assert 1 <= stopped.stopped[0] < LONG
    assert (stopped.seeds, stopped.comparison, stopped.is_on_front) == ((), None, False)
    assert [seed.seed for seed in finished.seeds] == [0]
    assert finished.is_on_front
    assert_all_free(before)


@pytest.mark.ray
@pytest.mark.slow
def test_every_trial_is_a_run_and_features_are_made_once(swept: Any, directory: Path) -> None:
    from raylign.cost.rows import read_ledger

    root = directory / "s"
    assert len(list((directory / "cache").glob("features-*"))) == 1  # of all runs below the storage
    assert not (root / "cache").exists()
    assert len(list(root.glob("rewards/*/reward/manifest.json"))) == 1
    trials = sorted(path.name for path in (root / "trials").iterdir())
    assert trials == ["max_steps-3-seed0", f"max_steps-{LONG}-seed0"]
    for name in trials:
        assert (root / "trials" / name / "config.yaml").exists()
        stages = {row.stage for row in read_ledger(root / "trials" / name / "ledger")}
        assert stages == {"rank", "train"}
    shared = [row.phase for row in read_ledger(root / "shared" / "ledger")]
    assert [shared.count(phase) for phase in ("ingest", "features", "extract")] == [1, 1, 1]
    assert sum(phase.startswith("evaluate-seed0-") for phase in shared) == 1
    cost, alone = swept.points[0].cost, swept.points[0].unshared_cost
    assert 0 < cost.device_s["cpu"] < alone.device_s["cpu"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_resumed_sweep_does_nothing_again(swept: Any, directory: Path) -> None:
    from tuning.report import write_sweep
    from tuning.run import run_sweep

    with pytest.raises(OutputExistsError, match="--resume"):
        run_sweep(small(directory, SPACE, *ASHA))
    root = directory / "s" / "trials"
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}
    again = run_sweep(small(directory, SPACE, *ASHA, is_resumed=True))
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file() and file in before} == before
    assert [point.comparison for point in again.points] == [point.comparison for point in swept.points]
    assert [point.stopped for point in again.points] == [point.stopped for point in swept.points]
    written = write_sweep(again, directory / "s")
    assert (directory / "s" / "best" / "config.json").exists()
    assert written.html.stat().st_size > 10_000


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_trial_does_not_end_the_others(
    before: dict[str, Any], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step so large that the loss is not finite. The storage is relative, as it is by default."""
    from tuning.report import write_sweep
    from tuning.run import run_sweep

    monkeypatch.chdir(directory)
    space = "train.max_steps: 2\ntrain.learning_rate: {grid: [1e-4, 1e30]}"
    sweep = small(directory, space, "run.name=f", "run.storage=own")
    result = run_sweep(sweep)
    good, bad = sweep.trials
    assert good.directory.parents[2] == directory / "own"
    manifests = [train_manifest(trial.directory) for trial in (good, bad)]
    assert [manifest and manifest["status"] for manifest in manifests] == ["done", "started"]
    assert [len(point.seeds) for point in result.points] == [1, 0]
    assert (result.best, list(result.points[1].failed)) == (result.points[0].name, [0])
    assert "lower train.learning_rate" in result.points[1].failed[0]
    assert "seed 0 failed" in write_sweep(result, sweep.directory).text
    assert_all_free(before)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_is_continued_where_it_was(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    from tuning.run import run_sweep

    space = "train.max_steps: 60\ntrain.epochs: 9\ntrain.checkpoint_every: 2\ntrain.beta: {grid: [0.1, 0.3]}"
    sweep = small(tmp_path, space)
    arguments = [*(f"run.storage={tmp_path}", "run.name=s"), *SMALL]
    driver = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "sweep", "--space", str(tmp_path / "own.yaml"), *arguments],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    files = [trial.directory / "train" / "metrics.jsonl" for trial in sweep.trials]
    try:
        wait_for(lambda: any(len(read_records(file)) >= 6 for file in files), "six updates of a trial", 400)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not all((trial.directory / "train" / "manifest.json").exists() and
                   json.loads((trial.directory / "train" / "manifest.json").read_text())["status"] == "done"
                   for trial in sweep.trials)  # fmt: skip
    wait_for(lambda: ray.available_resources().get("CPU") == 2.0, "all CPUs free after the kill", 60)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")}
    assert made
    result = run_sweep(small(tmp_path, space, is_resumed=True))
    assert [len(point.seeds) for point in result.points] == [1, 1]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.parquet")} == made
    for file in files:
        assert [record["step"] for record in read_records(file)] == list(range(1, 61))
    assert not list((tmp_path / "s" / "trials").rglob(STOPPED_FILE))
