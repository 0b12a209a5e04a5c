"""What a sweep says of its points, from answers and ledgers whose numbers are given. No Ray is started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from synthetic_sweep import answers

from raylign.cost.ledger import Ledger
from raylign.runtime.compare import BEFORE
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.phases import MANIFEST, write_json
from raylign.types import Completion
from tuning.collect import REWARDS, SHARED, collect
from tuning.result import SweepResult
from tuning.sweep_config import Sweep, Trial, load_sweep
from tuning.trial import STOPPED_FILE, reward_group

# multiplier -> cost and reward of its answers: 1 beats 2 in both
SAID = {0.0: (1.0, 3.0), 1.0: (-1.0, 2.0), 2.0: (-0.5, 1.0), 3.0: (-9.0, 9.0)}


class Clock:
    """Stands in for the time module of the ledger; only tests move it."""

    now = 100.0
    sleep = staticmethod(time.sleep)

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def spend(directory: Path, clock: Clock, **seconds: float) -> None:
    ledger = Ledger(directory / LEDGER_DIR)
    for phase, amount in seconds.items():
        with ledger.measure(phase.replace("_", "-"), devices={"cpu": 2.0}):
            clock.now += amount


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    space = tmp_path / "own.yaml"
    space.write_text("constraint.kind: rectified\nconstraint.multiplier: {grid: [0.0, 1.0, 2.0, 3.0]}")
    where = [f"run.storage={tmp_path}", "run.name=s", "sweep.seeds=[0, 1]", "evaluate.bootstrap_samples=100"]
    return load_sweep(str(space), overrides=where)


@pytest.fixture
def result(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> SweepResult:
    clock = Clock()
    monkeypatch.setattr("raylign.cost.ledger.time", clock)
    spend(sweep.directory / SHARED, clock, ingest=1, features=2, cost=3, evaluate_seed0=50)
    spend(sweep.directory / REWARDS / reward_group(sweep.base), clock, reward=4)
    spend(sweep.directory / REWARDS / "another", clock, reward=100)
    found: dict[int, dict[str, tuple[Completion, ...]]] = {0: {}, 1: {}}
    for seed in (0, 1):
        found[seed][BEFORE] = tuple(answers(1.0, 0.0, seed=seed))
    for trial in sweep.trials:
        finish(trial, clock, found)
    return collect(sweep, sweep.trials, found, failed={}, screened=(), screen_s=0.0, num_concurrent=2)


def finish(trial: Trial, clock: Clock, found: dict[int, dict[str, tuple[Completion, ...]]]) -> None:
    """Trials spend 10 and 20 s; the last point is stopped with its second seed."""
    multiplier = float(trial.keys["constraint.multiplier"])
    spend(trial.directory, clock, rank=10, train=20)
    if (multiplier, trial.seed) == (3.0, 1):
        write_json(trial.directory / STOPPED_FILE, {"step": 7})
        return
    (trial.directory / "train").mkdir()
    facts = {"checkpoint": str(trial.directory / "train" / "policy")}
    write_json(trial.directory / "train" / MANIFEST, {"status": "done", "facts": facts})
    found[trial.seed][trial.name] = tuple(answers(*SAID[multiplier], seed=trial.seed))


def test_the_front_is_of_points_with_all_their_seeds(result: SweepResult) -> None:
    assert [point.is_on_front for point in result.points] == [True, True, False, False]
    shares = [point.front_share for point in result.points]
    assert shares[3] is None
    assert shares[:2] == [1.0, 1.0]
    assert shares[2] is not None
    assert shares[2] < 0.05
    assert (result.points[3].stopped, [seed.seed for seed in result.points[3].seeds]) == ({1: 7}, [0])


def test_numbers_of_a_point_are_those_of_its_answers(result: SweepResult) -> None:
    point = result.points[1]
    assert point.keys == {"constraint.multiplier": 1.0}
    for seed in point.seeds:
        said = answers(*SAID[1.0], seed=seed.seed)
        assert seed.reward == pytest.approx(sum(answer.reward for answer in said) / 40)
        assert seed.cost == pytest.approx(sum(answer.cost for answer in said[:20]) / 20)  # harmful ones alone
        assert seed.checkpoint.parts[-3:] == (f"multiplier-1-seed{seed.seed}", "train", "policy")
    assert point.comparison is not None
    assert point.comparison.difference.mean_cost.high < 0


def test_costs_are_own_and_shared_ones(result: SweepResult) -> None:
    """Two CPUs; own: 30 s for each of two seeds; shared: 1 + 2 + 3 + 4 s for each seed that would run by itself."""
    for point in result.points:
        assert point.cost.device_s == pytest.approx({"cpu": 2 * 2 * 30})
        assert point.unshared_cost.device_s == pytest.approx({"cpu": 2 * 2 * (30 + 10)})
    assert result.shared_cost.device_s == pytest.approx({"cpu": 2 * (1 + 2 + 3 + 50 + 4 + 100)})


def test_the_exported_point_is_the_safe_one_with_the_most_reward(result: SweepResult) -> None:
    assert result.best == "multiplier-1"
    assert "most reward" in result.best_reason
