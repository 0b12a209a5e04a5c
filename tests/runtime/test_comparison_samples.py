"""When a comparison samples several answers to every prompt, and what it makes of them. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_comparison import CONSTRAINED, METHODS, calls_of, load_methods

from raylign.assets import asset_path
from raylign.compare_config import Comparison
from raylign.errors import ConfigError
from raylign.runtime.compare import BEFORE, _evaluate, prompt_safety, sampled_measures
from raylign.runtime.evaluate_job import COMPLETIONS_FILE


def sampled(comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a comparison of made-up phases asks `sample_policies` for."""
    asked: list[tuple[object, ...]] = []

    def sample(phases, models, *, seed, reward, reward_key, cost, name):
        asked.append((name, sorted(models), seed, cost))
        return tmp_path

    module = "raylign.runtime.compare"
    monkeypatch.setattr(f"{module}.sample_policies", sample)
    monkeypatch.setattr(f"{module}.sampled_measures", lambda comparison, samples: dict(samples))
    monkeypatch.setattr(f"{module}.checkpoints", lambda training: {2: Path("early"), 4: Path("late")})
    calls_of(comparison, monkeypatch)
    return asked


def test_every_method_and_the_policy_before_answer_several_times_when_asked(tmp_path, monkeypatch):
    found = load_methods(tmp_path, CONSTRAINED, evaluate={"constraint_samples": 3})
    everybody = sorted([BEFORE, *CONSTRAINED])
    assert sampled(found, tmp_path, monkeypatch) == [
        ("samples-seed0", everybody, 0, "priced"),
        ("samples-seed1", everybody, 1, "priced"),
    ]


def test_nobody_answers_several_times_unless_asked(tmp_path, monkeypatch):
    assert sampled(load_methods(tmp_path, CONSTRAINED), tmp_path, monkeypatch) == []


def test_several_answers_need_costs(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.constraint_samples is set but none of compare\.methods reads it"):
        load_methods(tmp_path, METHODS, evaluate={"constraint_samples": 3})


def test_a_finished_evaluation_is_kept_when_several_answers_are_asked_for(tmp_path):
    """The answers of the evaluation do not depend on how many are sampled besides."""
    keys = []
    for number in (0, 8):
        found = load_methods(tmp_path, CONSTRAINED, evaluate={"constraint_samples": number, "num_prompts": 6})
        phase = SimpleNamespace(phase=lambda name, key, work: keys.append(key) or (tmp_path, {}))
        (tmp_path / COMPLETIONS_FILE).touch()
        _evaluate(SimpleNamespace(model=asset_path("tiny_chat"), run=phase), found, 0, {}, None)
    assert keys[0] == keys[1] and keys[0]["evaluate"]["num_prompts"] == 6


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
    found = load_methods(tmp_path, CONSTRAINED, evaluate={"constraint_samples": 2, "bootstrap_samples": 100})
    before, after = [1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, -1.0]
    files = {
        0: write_samples(tmp_path / "0.parquet", {BEFORE: before, "dpo": after, "repo": after}),
        1: write_samples(tmp_path / "1.parquet", {BEFORE: before, "dpo": before}),
    }
    measures = sampled_measures(found, files)
    assert sorted(measures) == [BEFORE, "dpo"]  # repo has no answers of seed 1
    by_model, by_judge = measures["dpo"].by_model, measures["dpo"].by_judge
    assert by_model.safety_rate.by_seed == (0.75, 0.5)
    assert by_model.unsafe_prompts.by_seed == (0.5, 1.0)
    assert by_judge.safety_rate.by_seed == (0.25, 0.5)
    assert by_model.safety_rate.change.mean == 0.125
    assert sampled_measures(found, {}) == {}


@pytest.mark.parametrize(
    ("safeties", "expected"), [({}, 0.95), ({"repo": 0.5}, 0.95), ({"repo": 0.5, "rectified": 0.75}, 0.75)]
)
def test_a_prompt_is_safe_by_the_strictest_of_the_constraints(tmp_path, safeties, expected):
    methods = {name: dict(keys) for name, keys in CONSTRAINED.items()}
    for name, safety in safeties.items():
        methods[name]["constraint.prompt_safety"] = safety
    assert prompt_safety(load_methods(tmp_path, methods)) == expected
