"""The main job with costs: a constraint over stored pairs reads what the cost phase wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raylign.config import load_config

SMALL = [
    "data.max_pairs=120",
    "data.max_length=192",
    "data.max_bad_fraction=1",
    "data.test_fraction=0.2",
    "reward.folds=2",
    "reward.epochs=1",
    "train.max_steps=2",
    "train.batch_size=4",
    "evaluate.num_prompts=4",
    "evaluate.max_new_tokens=4",
    "evaluate.drift_prompts=4",
    "evaluate.drift_candidates=2",
    "evaluate.bootstrap_samples=100",
]


@pytest.mark.ray
@pytest.mark.slow
def test_a_constrained_run_prices_its_pairs_before_it_ranks_them(ray_cluster: None, tmp_path: Path):
    from raylign.runtime.pipeline import align

    overrides = [f"run.storage={tmp_path}", *SMALL, "constraint.kind=rectified", "constraint.multiplier=5"]
    phases = ["ingest", "features", "reward", "cost", "rank", "train", "evaluate"]
    result = align(load_config(None, overrides))
    assert list(result.seconds) == phases
    assert result.data.constraint.sampled is None
    facts = json.loads((result.directory / "cost" / "manifest.json").read_text())["facts"]
    assert facts["source"] == "embedded"
    assert facts["known_answers"]["auc"]["low"] > 0.5
    assert facts["num_unlabelled_pairs"] == facts["num_pairs"] == 120  # the embedded pairs have no verdicts
    assert facts["held_out"] is None
    priced = pq.read_table(result.directory / "cost" / "priced").select(["row_id", "chosen_cost"]).sort_by("row_id")
    ranked = pq.read_table(result.directory / "rank" / "ranked").select(["row_id", "chosen_cost"]).sort_by("row_id")
    assert ranked.equals(priced)
    again = align(load_config(None, [*overrides, "run.resume=true", "evaluate.constraint_samples=3"]))
    assert list(again.seconds) == [*phases, "samples"]  # a finished run adds what it was not asked for
    assert {name: again.seconds[name] for name in phases} == result.seconds
    samples = pq.read_table(again.directory / "samples" / "samples.parquet")
    assert len(samples) == 2 * 4 * 3
    sampled = again.data.constraint.sampled
    costs = samples.filter(pc.equal(samples["policy"], "after"))["model_cost"].to_numpy()
    assert sampled.after.by_model.mean_cost.value.mean == pytest.approx(costs.mean(), abs=1e-6)
    assert sampled.after.by_judge.mean_cost.value.mean != sampled.after.by_model.mean_cost.value.mean
    assert "Safe answers" in again.report.read_text()
