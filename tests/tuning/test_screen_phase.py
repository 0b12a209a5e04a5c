"""The screen as a phase of a sweep, on real Ray and made-up states."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.cost.ledger import Ledger
from raylign.cost.rows import read_ledger
from raylign.data.states import states_to_column
from raylign.errors import ResourceError
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.phases import Run
from raylign.runtime.run_phases import Phases
from tuning.run import _screen
from tuning.sweep_config import Sweep, load_sweep

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty training pairs, ten of each other split."""
    directory = tmp_path_factory.mktemp("features")
    splits = ["train"] * 20 + ["valid"] * 10 + ["test"] * 10
    chosen, rejected = np.random.default_rng(0).normal(size=(2, 40, 2, 8)).astype(np.float32)
    names = [f"p{index:02}" for index in range(40)]
    table = pa.table(
        {
            "row_id": names,
            "prompt_key": names,
            "split": splits,
            "chosen_states": states_to_column(chosen + 0.3),
            "rejected_states": states_to_column(rejected - 0.3),
        }
    )
    (directory / "rows").mkdir()
    pq.write_table(table, directory / "rows" / "0.parquet")
    (directory / "manifest.json").write_text(json.dumps({"key": {}}))
    return directory


@pytest.fixture
def shared(ray_cluster: None, tmp_path: Path) -> Phases:
    run = Run(tmp_path / "shared", ledger=Ledger(tmp_path / "shared" / LEDGER_DIR))
    return Phases(None, run, "model")  # type: ignore[arg-type]


def sweep(directory: Path, alphas: list[float]) -> Sweep:
    space = directory / "own.yaml"
    space.write_text(f"confidence.alpha: {{grid: {alphas}}}")
    return load_sweep(str(space), overrides=[f"run.storage={directory}", "sweep.replicates=1", "reward.epochs=1"])


def test_a_sweep_with_more_cheap_settings_is_screened_anew(shared: Phases, features: Path, tmp_path: Path) -> None:
    first, _ = _screen(shared, sweep(tmp_path, [1.0, 2.0]), features, "digest")
    more, _ = _screen(shared, sweep(tmp_path, [1.0, 2.0, 4.0]), features, "digest")
    assert list(more[:2]) == list(first)
    assert [row.keys["confidence.alpha"] for row in more] == [1.0, 2.0, 4.0]
    again, _ = _screen(shared, sweep(tmp_path, [1.0, 2.0]), features, "digest")
    assert again == first
    assert len(shared.run.skipped) == 1
    rows = [row for row in read_ledger(shared.run.directory / LEDGER_DIR) if row.phase.startswith("screen-")]
    assert len(rows) == 2
    assert all(row.cost.device_s["cpu"] > 0 for row in rows)


def test_a_screen_that_takes_too_long_is_ended_and_told(
    shared: Phases, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def sleep(*_: Any) -> None:
        time.sleep(600)

    monkeypatch.setattr("tuning.run.timed_screen", sleep)
    monkeypatch.setattr("tuning.run._SCREEN_TIMEOUT_S", 3.0)
    with pytest.raises(ResourceError, match=r"2 cheap settings .* 3 s: .*sweep\.replicates=1 or reward\.max_pairs=20"):
        _screen(shared, sweep(tmp_path, [1.0, 2.0]), features, "digest")
    end = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, "the task holds its CPU"
        time.sleep(0.2)
