"""When a comparison samples several answers to every prompt, and what it makes of them. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_up_comparison import CONSTRAINED, METHODS, calls_of, load_methods

from raylign.assets import asset_path
from raylign.compare_config import Comparison
from raylign.errors import ConfigError
from raylign.runtime.compare import BEFORE, _evaluate, prompt_safety
from raylign.runtime.evaluate_job import COMPLETIONS_FILE


def sampled(comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a comparison of made-up phases asks `sample_policies` for."""
    asked: list[tuple[object, ...]] = []

    def sample(phases, models, *, seed, reward, reward_key, cost, name):
        asked.append((name, sorted(models), seed, cost))
        return tmp_path

    module = "raylign.runtime.compare"
    monkeypatch.setattr(f"{module}.sample_policies", sample)
    monkeypatch.setattr(f"{module}.measure_samples", lambda files, policies, **settings: {})
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


def evaluation_key(comparison: Comparison, tmp_path: Path, reward_key: str = "r") -> dict[str, Any]:
    """What the evaluation of a seed is made of, without a trained policy."""
    keys: list[dict[str, Any]] = []
    phase = SimpleNamespace(phase=lambda name, key, work: keys.append(key) or (tmp_path, {}))
    (tmp_path / COMPLETIONS_FILE).touch()
    shared = SimpleNamespace(model=asset_path("tiny_chat"), run=phase)
    _evaluate(shared, comparison, 0, {}, tmp_path, reward_key)
    return keys[0]


def test_a_finished_evaluation_is_kept_when_several_answers_are_asked_for(tmp_path):
    """The answers of the evaluation do not depend on how many are sampled besides."""
    one, other = (
        evaluation_key(
            load_methods(tmp_path, CONSTRAINED, evaluate={"constraint_samples": number, "num_prompts": 6}), tmp_path
        )
        for number in (0, 8)
    )
    assert one == other and one["evaluate"]["num_prompts"] == 6


def test_answers_chosen_by_another_reward_or_rule_are_not_kept(tmp_path):
    def key(rule: str, reward_key: str) -> dict[str, Any]:
        sections = {"reward": {"kind": "ensemble"}, "robust": {"rule": rule}, "evaluate": {"best_of": 4}}
        return evaluation_key(load_methods(tmp_path, METHODS, **sections), tmp_path, reward_key)

    assert key("min", "r") == key("min", "r")
    assert key("min", "r") != key("mean", "r")
    assert key("min", "r") != key("min", "another")


@pytest.mark.parametrize(
    ("safeties", "expected"), [({}, 0.95), ({"repo": 0.5}, 0.95), ({"repo": 0.5, "rectified": 0.75}, 0.75)]
)
def test_a_prompt_is_safe_by_the_strictest_of_the_constraints(tmp_path, safeties, expected):
    methods = {name: dict(keys) for name, keys in CONSTRAINED.items()}
    for name, safety in safeties.items():
        methods[name]["constraint.prompt_safety"] = safety
    assert prompt_safety(load_methods(tmp_path, methods)) == expected


def test_without_a_constraint_a_prompt_is_safe_by_what_all_share(tmp_path):
    shared = {"cost_model": {"source": "labels"}, "constraint": {"prompt_safety": 0.5}}
    assert prompt_safety(load_methods(tmp_path, METHODS, **shared)) == 0.5
    assert prompt_safety(load_methods(tmp_path, METHODS)) == 0.95
