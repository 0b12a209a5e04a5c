"""What is removed at the end of a sweep, with real placement groups; what Tune does is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuning.placement_groups import groups_of, live_groups, remove_left
from tuning.sweep_config import load_sweep


def test_groups_of_other_jobs_are_left_alone() -> None:
    import ray

    mine, theirs = (ray.PlacementGroupID.of(ray.JobID.from_int(number)).hex() for number in (1, 2))
    gone = ray.PlacementGroupID.of(ray.JobID.from_int(1)).hex()
    table = {mine: {"state": "CREATED"}, theirs: {"state": "CREATED"}, gone: {"state": "REMOVED"}}
    assert groups_of(table, job=ray.JobID.from_int(1).hex()) == {mine}


@pytest.mark.ray
def test_what_came_since_is_removed_and_frees_its_devices(
    ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    def group() -> Any:
        made = ray.util.placement_group([{"CPU": 0.25}])
        assert made.wait(30)
        return made

    old, before = group(), live_groups()
    remove_left(before)
    assert capsys.readouterr().err == ""
    new = group()
    assert live_groups() - before == {new.id.hex()}
    remove_left(before)
    assert capsys.readouterr().err == "trial        removed 1 placement group(s) that stopped trials had left\n"
    assert old.id.hex() in live_groups()
    assert new.id.hex() not in live_groups()
    ray.util.remove_placement_group(old)


@pytest.mark.ray
def test_no_group_outlives_the_trials(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from tuning.run import _train

    class Tuner:
        """Stands for Ray Tune, whose trial left a group."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> list[Any]:
            assert ray.util.placement_group([{"CPU": 1}]).wait(30)
            return []

    space = tmp_path / "own.yaml"
    space.write_text("train.beta: {grid: [0.1, 0.3]}")
    sweep = load_sweep(str(space), overrides=[f"run.storage={tmp_path}", "run.name=s"])
    monkeypatch.setattr("tuning.run.tune.Tuner", Tuner)
    before = live_groups()
    assert _train(sweep, [], None, 1) == ([], {})  # type: ignore[arg-type]
    assert live_groups() == before
