"""The main job with costs: a constraint over stored pairs reads what the cost phase wrote."""

from __future__ import annotations

import json
from pathlib import Path

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
    result = align(load_config(None, overrides))
    assert list(result.seconds) == ["ingest", "features", "reward", "cost", "rank", "train", "evaluate"]
    facts = json.loads((result.directory / "cost" / "manifest.json").read_text())["facts"]
    assert facts["source"] == "embedded"
    assert facts["known_answers"]["auc"]["low"] > 0.5
    assert facts["num_unlabelled_pairs"] == facts["num_pairs"] == 120  # the embedded pairs have no verdicts
    assert facts["held_out"] is None
    priced = pq.read_table(result.directory / "cost" / "priced").select(["row_id", "chosen_cost"]).sort_by("row_id")
    ranked = pq.read_table(result.directory / "rank" / "ranked").select(["row_id", "chosen_cost"]).sort_by("row_id")
    assert ranked.equals(priced)
    again = align(load_config(None, [*overrides, "run.resume=true"]))
    assert again.seconds == result.seconds
