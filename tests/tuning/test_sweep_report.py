"""What a sweep shows and exports, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_sweep import point, result

from tuning.collect import choose
from tuning.plots import number_axes
from tuning.report import write_sweep
from tuning.result import PointResult


@pytest.fixture
def points(tmp_path: Path) -> tuple[PointResult, ...]:
    for name in ("free", "held", "strict"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    return (
        point(0.0, reward=3.0, cost=1.0, violation_rate=0.6, is_on_front=True, checkpoint=tmp_path / "free"),
        point(1.0, reward=2.0, cost=-1.0, violation_rate=0.2, is_on_front=True, checkpoint=tmp_path / "held"),
        point(2.0, reward=1.0, cost=-2.0, violation_rate=0.1, is_on_front=True, checkpoint=tmp_path / "strict"),
        point(3.0, reward=9.0, cost=0.5, violation_rate=0.0, is_on_front=False, checkpoint=tmp_path, stopped={1: 6}),
        point(4.0, reward=0.0, cost=0.0, violation_rate=0.0, is_on_front=False, checkpoint=tmp_path,
              stopped={0: 3, 1: 3}),
        point(5.0, reward=0.0, cost=0.0, violation_rate=0.0, is_on_front=False, checkpoint=tmp_path,
              stopped={0: 3}, failed={1: "TrainingError: the loss is not finite"}),
    )  # fmt: skip


def test_the_exported_point_has_the_most_reward_among_the_safe_ones(points: tuple[PointResult, ...]) -> None:
    best, seed, reason = choose(points, target=0.2)
    assert best is not None
    assert (best.name, seed) == ("multiplier-1", 0)
    assert "at most 0.2" in reason


def test_without_a_safe_point_it_is_the_safest(points: tuple[PointResult, ...]) -> None:
    best, _, reason = choose(points, target=0.05)
    assert best is not None
    assert best.name == "multiplier-2"
    assert "no point is at or below" in reason
    assert choose(points[3:], target=0.2)[:2] == (None, None)


def test_everything_is_written(tmp_path: Path, points: tuple[PointResult, ...]) -> None:
    written = write_sweep(result(tmp_path, points, best="multiplier-1", best_seed=0), tmp_path)
    assert written.best is not None
    assert (written.best / "config.json").read_text() == "held"
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["points"][3]["stopped"] == {"1": 6}
    html = written.html.read_text()
    assert html.count("<img") == 4  # front, rate along the multiplier, calibration, device-seconds
    assert "http://" not in html
    assert "data-key='points.1.comparison.after.mean_reward'" in html
    lines = written.text.splitlines()
    assert (
        next(line for line in lines if "multiplier=3" in line)
        .rstrip()
        .endswith("1 of 2 seeds; stopped at update 6 (seed 1)")
    )
    assert (
        next(line for line in lines if "multiplier=4" in line)
        .rstrip()
        .endswith("stopped at update 3 (seed 0), 3 (seed 1)")
    )
    assert (
        next(line for line in lines if "multiplier=5" in line)
        .rstrip()
        .endswith("stopped at update 3 (seed 0); seed 1 failed")
    )
    assert "Failed: TrainingError: the loss is not finite" in written.text
    assert content["points"][5]["failed"] == {"1": "TrainingError: the loss is not finite"}
    assert "on it (75%)" in written.text
    assert "1 of 7 points were left out" in written.text


def test_cells_name_their_place_in_the_json(tmp_path: Path, points: tuple[PointResult, ...]) -> None:
    written = write_sweep(result(tmp_path, points, best=None, best_seed=None), tmp_path)
    assert written.best is None
    content = json.loads((tmp_path / "sweep.json").read_text())
    keys = [part.split("'")[0] for part in written.html.read_text().split("data-key='")[1:]]
    assert len(keys) > 30
    for key in keys:
        place = content
        for part in key.split("."):
            place = place[int(part)] if isinstance(place, list) else place[part]


def test_only_axes_of_numbers_get_a_curve(tmp_path: Path, points: tuple[PointResult, ...]) -> None:
    assert number_axes(result(tmp_path, points, best=None, best_seed=None)) == ["constraint.multiplier"]
    assert number_axes(result(tmp_path, points[:1], best=None, best_seed=None)) == []
