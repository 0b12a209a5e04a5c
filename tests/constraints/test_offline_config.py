"""Which keys an offline constraint reads, and what it cannot be combined with."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylign.config import ConstraintSection, RunConfig, idle_keys, load_config, to_yaml
from raylign.constraints.offline import stepwise_beta
from raylign.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "launch" / "configs"
ALL = set(ConstraintSection.model_fields)
ALWAYS = {"kind", "multiplier", "labels", "multiplier_max", "prompt_safety", "cvar_level"}


def offline(*overrides: str) -> RunConfig:
    return load_config(None, list(overrides))


def read_keys(config: RunConfig) -> set[str]:
    return ALL - {key.removeprefix("constraint.") for key in idle_keys(config) if key.startswith("constraint.")}


@pytest.mark.parametrize(("kind", "bound"), [("expected", "threshold"), ("rectified", "tolerance")])
def test_a_fixed_multiplier_reads_no_bound_and_a_dual_one_its_own(kind: str, bound: str) -> None:
    fixed = offline(f"constraint.kind={kind}", "constraint.multiplier=0")
    assert read_keys(fixed) == ALWAYS
    dual = offline(f"constraint.kind={kind}", "constraint.multiplier=dual", "confidence.squash=none")
    assert (read_keys(dual), dual.constraint.multiplier) == (ALWAYS | {bound}, "dual")
    with pytest.raises(ConfigError, match=rf"constraint\.{bound} is set but has no effect.*multiplier=dual"):
        offline(f"constraint.kind={kind}", f"constraint.{bound}=1")
    with pytest.raises(ConfigError, match=r"multiplier_learning_rate is set .*train\.method=policy_gradient"):
        offline(f"constraint.kind={kind}", "constraint.multiplier_learning_rate=1")


def test_labels_are_of_stored_pairs() -> None:
    with pytest.raises(ConfigError, match=r"constraint\.labels is set but has no effect.*train\.method=offline"):
        offline("train.method=policy_gradient", "constraint.kind=rectified", "constraint.labels=hard")


def test_hard_labels_read_no_confidence_beyond_the_scale_of_the_dual_loop() -> None:
    def idle(*overrides: str) -> set[str]:
        keys = idle_keys(offline("constraint.kind=expected", "constraint.labels=hard", *overrides))
        return {key for key in keys if key.startswith("confidence.")}

    sharp = {"confidence.alpha", "confidence.center", "confidence.floor"}
    assert idle() >= sharp | {"confidence.squash", "confidence.temperature"}
    dual = idle("constraint.multiplier=dual", "confidence.squash=none")
    assert dual >= sharp
    assert not dual & {"confidence.squash", "confidence.temperature"}
    with pytest.raises(ConfigError, match=r"confidence\.alpha is set but has no effect.*labels=confidence"):
        idle("confidence.alpha=2")


@pytest.mark.parametrize("kind", ["split", "rectified_mean", "fixed_penalty"])
def test_kinds_of_sampled_responses_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"constraint\.kind={kind} is of sampled responses.*use rectified or"):
        offline(f"constraint.kind={kind}")


def test_what_would_not_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"confidence\.source=live reads the reward.*and no cost"):
        offline("constraint.kind=rectified", "confidence.source=live")
    with pytest.raises(ConfigError, match=r"squash=sigmoid bounds what a cost can take.*set confidence\.squash=none"):
        offline("constraint.kind=expected", "constraint.multiplier=dual")
    with pytest.raises(
        ConfigError, match=r"multiplier=dual is solved for over stored responses.*train\.method=offline"
    ):
        offline("train.method=policy_gradient", "constraint.kind=expected", "constraint.multiplier=dual")
    with pytest.raises(ConfigError, match=r"multiplier=6 is above its cap constraint\.multiplier_max=5"):
        offline("constraint.kind=expected", "constraint.multiplier=6")
    with pytest.raises(ConfigError, match=r"constraint\.multiplier"):
        offline("constraint.kind=expected", "constraint.multiplier=duel")


@pytest.mark.parametrize("multiplier", ["0.5", "dual"])
def test_a_printed_constraint_loads_back(tmp_path, multiplier: str) -> None:
    config = offline("constraint.kind=expected", f"constraint.multiplier={multiplier}", "confidence.squash=none")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml").constraint == config.constraint


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("constrained_dpo", ("expected", "dual", "sampled")),
        ("rerank_rectified", ("rectified", "dual", "confidence")),
        ("sacpo_helpful", ("none", 1.0, "confidence")),
        ("sacpo_safe", ("expected", 1e6, "hard")),
    ],
)
def test_shipped_configurations_are_the_methods_they_name(name: str, chosen: tuple[object, ...]) -> None:
    config = load_config(SHIPPED / f"{name}.yaml")
    constraint = config.constraint
    assert (constraint.kind, constraint.multiplier, constraint.labels) == chosen
    assert config.run.name == name.replace("_", "-")
    if name.startswith("sacpo"):
        betas = [load_config(SHIPPED / f"sacpo_{stage}.yaml").train.beta for stage in ("helpful", "safe")]
        assert betas[1] == pytest.approx(stepwise_beta(betas[0], 4))
