"""When a run prices responses, with what, and which keys are read then."""

from __future__ import annotations

import pytest

from raylign.config import CostModelSection, RunConfig, cost_source, idle_keys, load_config, needs_cost, to_yaml
from raylign.errors import ConfigError

ALL = {f"cost_model.{name}" for name in CostModelSection.model_fields}
CONSTRAINED = ["train.method=policy_gradient", "constraint.kind=rectified"]
OWN = ["policy.model=/models/mine"]


def config(*overrides: str) -> RunConfig:
    return load_config(None, overrides)


def idle(*overrides: str) -> set[str]:
    return {key.removeprefix("cost_model.") for key in set(idle_keys(config(*overrides))) & ALL}


def test_costs_are_needed_by_a_constraint_or_when_a_source_is_named():
    assert not needs_cost(config())
    assert needs_cost(config(*CONSTRAINED))
    assert needs_cost(config("cost_model.source=embedded"))  # to look at costs of a run without a constraint


def test_auto_is_the_shipped_head_for_the_embedded_model_and_your_verdicts_for_yours():
    assert cost_source(config(*CONSTRAINED)) == "embedded"
    assert cost_source(config(*CONSTRAINED, *OWN)) == "labels"
    assert cost_source(config(*CONSTRAINED, "cost_model.source=labels")) == "labels"


def test_a_source_reads_its_own_keys():
    texts, lora = {"model", "label", "batch_tokens"}, {"lora_rank", "lora_alpha"}
    names = {name.removeprefix("cost_model.") for name in ALL}
    assert idle() == names - {"source"}
    assert idle("cost_model.source=labels") == texts | lora
    assert idle("cost_model.source=fine_tuned") == {"model", "label", "ridge", "weight_decay"}
    assert idle("cost_model.source=embedded") == names - {"source"}
    assert idle("cost_model.source=external", "cost_model.model=/judge") == names - {"source"} - texts
    assert idle(*CONSTRAINED, *OWN) == texts | lora
    steps = {"batch_size", "learning_rate", "weight_decay", "regularization"}
    assert idle("cost_model.source=labels", "cost_model.epochs=0") == texts | lora | steps


def test_members_have_steps_of_their_own_unless_given():
    def found(*overrides: str) -> tuple[float, ...]:
        section = config(*overrides).cost_model
        return section.folds, section.epochs, section.batch_size, section.learning_rate

    assert found("cost_model.source=labels") == (5, 10, 32, 1e-4)
    assert found("cost_model.source=fine_tuned") == (2, 1, 16, 1e-3)
    assert found("cost_model.source=fine_tuned", "cost_model.folds=3", "cost_model.epochs=2") == (3, 2, 16, 1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cost_model.epochs=3"], r"cost_model\.epochs is set but has no effect.*cost_model\.source=labels"),
        ([*CONSTRAINED, "cost_model.folds=2"], r"cost_model\.folds is set but has no effect"),
        (["cost_model.source=external"], r"needs cost_model\.model"),
        (["cost_model.source=fine_tuned", "cost_model.epochs=0"], r"leaves the head of a member as it was drawn"),
        (["cost_model.source=fine_tuned", "cost_model.ridge=2"], r"cost_model\.ridge.*set cost_model\.source=labels"),
        (["cost_model.source=labels", "cost_model.lora_rank=2"], r"lora_rank.*set cost_model\.source=fine_tuned"),
        (["cost_model.source=embedded", *OWN], r"not of policy\.model=/models/mine"),
        (["cost_model.source=embedded", "features.layers=[1,2]"], r"features\.layers=\[1, 2\] keeps some"),
        ([*CONSTRAINED, "features.layers=[1,2]"], r"features\.layers=\[1, 2\] keeps some"),
    ],
)
def test_sources_that_cannot_be_are_refused(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_a_printed_cost_model_loads_back(tmp_path):
    wanted = config("cost_model.source=labels", "cost_model.num_heads=3", "cost_model.pair_order=chosen")
    (tmp_path / "run.yaml").write_text(to_yaml(wanted))
    assert load_config(tmp_path / "run.yaml").cost_model == wanted.cost_model
