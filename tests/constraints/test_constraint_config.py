"""Which keys of the constraint have an effect together."""

from __future__ import annotations

import pytest

from raylign.config import ConstraintSection, RunConfig, idle_keys, load_config, to_yaml
from raylign.errors import ConfigError

KINDS = ("rectified", "split", "expected", "rectified_mean", "fixed_penalty")
ALL = {f"constraint.{name}" for name in ConstraintSection.model_fields}


def constrained(*overrides: str) -> RunConfig:
    return load_config(None, ["train.method=policy_gradient", *(f"constraint.{override}" for override in overrides)])


def test_without_a_policy_gradient_or_a_kind_nothing_is_read():
    for elsewhere in ("train.method=online_dpo", "train.objective=dpo"):
        assert set(idle_keys(load_config(None, [elsewhere]))) >= ALL
        with pytest.raises(ConfigError, match=r"constraint\.kind is set but has no effect.*policy_gradient"):
            load_config(None, [elsewhere, "constraint.kind=rectified"])
    assert set(idle_keys(constrained())) & ALL == ALL - {"constraint.kind"}
    with pytest.raises(ConfigError, match=r"constraint\.multiplier is set but has no effect.*kind=rectified"):
        constrained("multiplier=2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_reads_its_own_keys(kind: str):
    idle = {key.removeprefix("constraint.") for key in set(idle_keys(constrained(f"kind={kind}"))) & ALL}
    assert ("threshold" in idle) == (kind not in ("expected", "rectified_mean"))
    assert ("tolerance" in idle) == (kind not in ("rectified", "split"))
    assert ("split_normalise" in idle) == ("split_reduction" in idle) == (kind != "split")
    assert ("multiplier_max" in idle) == ("multiplier_window" in idle) == (kind == "fixed_penalty")
    assert not idle & {"kind", "multiplier", "prompt_safety", "cvar_level"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_printed_constraint_loads_back(tmp_path, kind: str):
    config = constrained(f"kind={kind}", "multiplier=0.5")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml").constraint == config.constraint


def test_the_cap_suits_the_kind_unless_set():
    caps = {kind: constrained(f"kind={kind}").constraint.multiplier_max for kind in KINDS}
    assert caps == {"rectified": 20, "split": 20, "expected": 5, "rectified_mean": 5, "fixed_penalty": 20}
    assert constrained("kind=expected", "multiplier_max=9").constraint.multiplier_max == 9


def test_a_multiplier_that_cannot_move_is_refused():
    with pytest.raises(ConfigError, match=r"constraint\.multiplier=0 never moves in log space.*linear"):
        constrained("kind=rectified", "multiplier=0")
    assert constrained("kind=rectified", "multiplier=0", "multiplier_space=linear").constraint.multiplier == 0
    assert constrained("kind=fixed_penalty", "multiplier=0").constraint.multiplier == 0
    with pytest.raises(ConfigError, match=r"constraint\.multiplier=7 is above its cap.*multiplier_max=5"):
        constrained("kind=expected", "multiplier=7")
    assert constrained("kind=fixed_penalty", "multiplier=70").constraint.multiplier == 70
