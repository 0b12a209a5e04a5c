"""Several answers to every evaluation prompt: what their phase depends on, and what is made of its file."""

from __future__ import annotations

import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.assets import asset_path
from raylign.config import load_config
from raylign.errors import ConfigError
from raylign.runtime.compare import BEFORE
from raylign.runtime.sample_job import SAMPLES_FILE, SAMPLES_PHASE, measure_samples, sampled_run, samples_key

measure = functools.partial(measure_samples, prompt_safety=0.95, num_samples=100, seed=0)


def write_samples(file: Path, costs: dict[str, list[float]]) -> Path:
    """Two prompts, two answers each, by policy; the judge has the opposite costs."""
    pq.write_table(
        pa.concat_tables(
            pa.table(
                {
                    "policy": [name] * 4,
                    "prompt": ["bad", "bad", "good", "good"],
                    "harmful": [True, True, False, False],
                    "is_refusal": [False] * 4,
                    "reward": [0.0, 1.0, 2.0, 3.0],
                    "model_cost": of_policy,
                    "cost": [-cost for cost in of_policy],
                }
            )
            for name, of_policy in costs.items()
        ),
        file,
    )
    return file


def test_samples_of_all_seeds_become_measures_by_both_prices(tmp_path):
    before, after = [1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, -1.0]
    files = [
        write_samples(tmp_path / "0.parquet", {BEFORE: before, "dpo": after, "repo": after}),
        write_samples(tmp_path / "1.parquet", {BEFORE: before, "dpo": before}),
    ]
    measures = measure(files, [BEFORE, "dpo", "repo"])
    assert sorted(measures) == [BEFORE, "dpo"]  # repo has no answers of seed 1
    by_model, by_judge = measures["dpo"].by_model, measures["dpo"].by_judge
    assert by_model.safety_rate.by_seed == (0.75, 0.5)
    assert by_model.unsafe_prompts.by_seed == (0.5, 1.0)
    assert by_judge.safety_rate.by_seed == (0.25, 0.5)
    assert by_model.safety_rate.change.mean == 0.125
    assert measure([], [BEFORE]) == {}


def test_a_run_is_measured_when_it_asked_for_answers(tmp_path):
    (tmp_path / SAMPLES_PHASE).mkdir()
    costs = {"before": [1.0, 1.0, -1.0, -1.0], "after": [-1.0, -1.0, -1.0, -1.0]}
    write_samples(tmp_path / SAMPLES_PHASE / SAMPLES_FILE, costs)
    keys = ["constraint.kind=rectified", "constraint.prompt_safety=0.5"]
    assert sampled_run(load_config(overrides=keys), tmp_path) is None
    found = sampled_run(load_config(overrides=[*keys, "evaluate.constraint_samples=2"]), tmp_path)
    assert (found.settings.num_answers, found.settings.prompt_safety) == (2, 0.5)
    assert found.settings.before.by_model.unsafe_prompts.value.mean == 0.5
    assert found.after.by_model.unsafe_prompts.value.mean == 0.0
    assert found.after.by_judge.unsafe_prompts.value.mean == 1.0


@pytest.mark.parametrize(
    ("key", "is_new"),
    [
        ("evaluate.constraint_samples=9", True),
        ("evaluate.num_prompts=10", True),
        ("evaluate.temperature=0.5", True),
        ("evaluate.batch_size=7", False),
        ("evaluate.bootstrap_samples=101", False),
        ("evaluate.drift_prompts=5", False),
    ],
)
def test_answers_are_sampled_again_only_when_they_would_differ(key, is_new):
    overrides = ["constraint.kind=rectified", "evaluate.constraint_samples=8"]
    policies = {"before": asset_path("tiny_chat")}
    first, second = (
        samples_key(policies, config=load_config(overrides=[*overrides, *more]), seed=0) for more in ([], [key])
    )
    assert (first != second) == is_new


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "evaluate.constraint_samples is set but has no effect here; remove it or set constraint.kind=rectified"),
        (["constraint.kind=rectified", "evaluate.temperature=0"], "needs evaluate.temperature above 0"),
    ],
)
def test_answers_that_nothing_prices_or_that_are_all_alike_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*overrides, "evaluate.constraint_samples=8"])
