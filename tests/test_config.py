"""Configuration: defaults, overrides, errors that name the cure, and the printed form that loads back."""

from __future__ import annotations

import pickle

import pytest
import yaml

from raylign.config import RunConfig, check_devices, idle_keys, known_keys, load_config, to_yaml
from raylign.errors import ConfigError


def test_overrides_win_over_file_and_file_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  beta: 0.3\n  epochs: 2\n")
    config = load_config(path, ["train.beta=0.5"])
    assert (config.train.beta, config.train.epochs, config.train.batch_size) == (0.5, 2, RunConfig().train.batch_size)


def test_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  learning_rate: 3e-5\n")
    assert load_config(path).train.learning_rate == 3e-5
    assert load_config(None, ["train.learning_rate=1e-6"]).train.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        ([], 5e-5),
        (["policy.model=org/name"], 1e-6),
        (["policy.model=org/name", "policy.adapter=lora"], 1e-5),
        (["policy.model=org/name", "train.learning_rate=3e-6"], 3e-6),
    ],
)
def test_learning_rate_suits_the_model_unless_set(overrides, step):
    config = load_config(None, overrides)
    assert config.train.learning_rate == step
    assert yaml.safe_load(to_yaml(config))["train"]["learning_rate"] == step


def test_a_run_does_not_mix_number_types():
    check_devices(load_config())
    check_devices(load_config(None, ["features.gpus_per_actor=1", "resources.gpus_per_worker=1"]))
    check_devices(load_config(None, ["features.gpus_per_actor=1", "policy.dtype=float32"]))
    with pytest.raises(ConfigError, match=r"different devices.*policy\.dtype"):
        check_devices(load_config(None, ["features.gpus_per_actor=1"]))


def test_quoted_numbers_stay_text(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  name: '2024'\npolicy:\n  model: '1e3'\n")
    config = load_config(path)
    assert (config.run.name, config.policy.model) == ("2024", "1e3")
    assert load_config(None, ["run.name=2024"]).run.name == "2024"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.betta=0.1", "train.beta"),
        ("trian.beta=0.1", "train"),
        ("data.max_lenght=64", "data.max_length"),
        ("policy.beta=0.1", "train.beta"),
    ],
)
def test_unknown_key_names_the_nearest(override, nearest):
    with pytest.raises(ConfigError, match=f"unknown config key.*did you mean {nearest}"):
        load_config(None, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.beta=-1"], r"train.beta=-1.*greater than 0"),
        (["train.label_smoothing=0.2"], r"train.label_smoothing is set but has no effect.*objective=cdpo or rdpo"),
        (["train.objective=rdpo", "train.label_smoothing=0.5"], r"label_smoothing=0.5"),
        (["train.objective=ipo", "train.beta=0.1"], r"train.beta is set but has no effect.*ipo_tau"),
        (["train.objective=dpo", "confidence.alpha=3"], r"confidence.alpha is set but has no effect.*label_confidence"),
        (["confidence.track=anchor"], r"confidence.track is set but has no effect.*source=live"),
        (["policy.lora_rank=4"], r"policy.lora_rank is set but has no effect.*adapter=lora"),
        (["data.max_prompt_length=512", "data.max_length=512"], r"leaves no room for an answer"),
        (["resources.gpus_per_worker=0.5"], r"gpus_per_worker=0.5 must be 0 or 1"),
        (["resources.gpus_per_worker=2"], r"gpus_per_worker=2 must be 0 or 1.*resources.num_workers"),
        (["train.beta"], r"must look like section.key=value"),
        (["train=3", "train.beta=0.1"], r"must look like"),
        (["run.name=a/b"], r"run.name"),
        (["confidence.squash=none", "confidence.temperature=-1"], r"greater than 0"),
        (["train.beta=.inf"], r"finite number"),
        (["data.format=hh", "data.prefer=better"], r"data.prefer is set but has no effect"),
        (["train.objective=[dpo"], r"not valid YAML"),
    ],
)
def test_bad_values_are_config_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize("content", ["train: [1, 2", "- a\n- b\n", "train: 3\n"])
def test_bad_files_are_config_errors(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_config(path)


def test_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read config file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("objective", ["label_confidence", "dpo", "cdpo", "rdpo", "ipo"])
def test_printed_config_loads_back(tmp_path, objective):
    config = load_config(None, [f"train.objective={objective}", "policy.adapter=lora"])
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path).model_dump() == config.model_dump()


def test_idle_keys_exist_and_are_not_printed():
    config = load_config(None, ["train.objective=dpo"])
    idle = idle_keys(config)
    assert set(idle) <= set(known_keys())
    printed = yaml.safe_load(to_yaml(config))
    assert not [key for key in idle if key.split(".")[1] in printed.get(key.split(".")[0], {})]
    assert "confidence.alpha" in idle
    assert "train.label_smoothing" in idle


@pytest.mark.parametrize("key", ["batch_size", "learning_rate", "weight_decay", "bce_weight", "margin_target"])
def test_probes_without_an_epoch_read_no_steps(key):
    with pytest.raises(ConfigError, match=rf"reward\.{key} is set but has no effect.*reward\.epochs above 0"):
        load_config(None, ["reward.epochs=0", f"reward.{key}=1"])
    with pytest.raises(ConfigError, match=r"reward\.train_probes is set but has no effect"):
        load_config(None, ["reward.epochs=0", "reward.train_probes=false"])


@pytest.mark.parametrize("key", ["batch_size=8", "learning_rate=0.1", "weight_decay=0.1", "regularization=0.1"])
def test_cost_heads_without_an_epoch_read_no_steps(key):
    with pytest.raises(ConfigError, match=r"is set but has no effect.*cost_model\.epochs above 0"):
        load_config(None, ["cost_model.source=labels", "cost_model.epochs=0", f"cost_model.{key}"])
    assert load_config(None, ["cost_model.source=fine_tuned", "cost_model.regularization=0.1"])


@pytest.mark.parametrize("method", ["train.objective=dpo", "train.method=online_dpo", "train.method=policy_gradient"])
def test_what_is_reported_of_costs_needs_costs_and_no_constraint(tmp_path, method):
    levels = ["constraint.prompt_safety=0.5", "constraint.cvar_level=0.2"]
    for level in levels:
        with pytest.raises(ConfigError, match=r"is set but has no effect.*cost_model\.source=labels"):
            load_config(None, [method, level])
    config = load_config(None, [method, "cost_model.source=labels", *levels])
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "run.yaml").constraint == config.constraint
    with pytest.raises(ConfigError, match=r"constraint\.multiplier is set but has no effect"):
        load_config(None, [method, "cost_model.source=labels", "constraint.multiplier=2"])


def test_config_is_frozen_and_picklable():
    config = load_config(None, ["train.beta=0.4"])
    with pytest.raises(Exception, match="frozen"):
        config.train.beta = 1.0
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.kind=ensemble", "reward.num_heads=1", "evaluate.best_of=4", "robust.rule=min"], "num_heads above 1"),
        (["reward.kind=laplace", "reward.num_heads=1", "evaluate.best_of=4", "robust.rule=min"], "num_heads above 1"),
        (["reward.kind=warm", "train.method=online_dpo", "robust.rule=min"], r"reward\.kind=ensemble"),
        (["reward.kind=ensemble", "reward.head_data=shards", "reward.num_heads=1"], "num_heads above 1"),
        (
            [
                "reward.kind=ensemble",
                "robust.rule=min",
                "evaluate.best_of=4",
                "robust.set_type=heads_pointwise",
            ],
            r"train\.method=online_dpo",
        ),
        (["reward.kind=warm", "reward_model.diversity_weight=1", "reward.num_heads=1"], "num_heads above 1"),
        (["reward.kind=laplace", "reward.head_data=all"], r"reward\.kind=ensemble"),
        (["reward.kind=hybrid", "reward.num_heads=3"], r"reward\.kind=ensemble"),
        (["reward.kind=external"], r"reward_model\.model"),
        (["reward.kind=ensemble", "robust.rule=brme", "train.method=online_dpo"], "none: use min"),
        (["reward.kind=lora_ensemble", "confidence.source=live"], "reads texts"),
        (["reward.kind=brme", "confidence.source=live", "confidence.track=anchor"], "none "),
        (
            [
                "reward.kind=ensemble",
                "reward.standardize=false",
                "reward.bce_weight=0",
                "train.method=online_dpo",
                "robust.rule=min",
            ],
            "whose zero nothing ties",
        ),
    ],
)
def test_rewards_and_rules_that_do_not_fit_are_refused_with_the_cure(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_defaults_suit_the_reward():
    assert load_config(None, ["reward.kind=brme", "train.method=online_dpo"]).robust.rule == "brme"
    assert load_config(None, ["reward.kind=brme", "evaluate.best_of=4"]).robust.rule == "brme"
    assert load_config(None, ["reward.kind=brme", "reward.num_heads=1", "evaluate.best_of=4"]).robust.rule == "mean"
    assert [load_config(None, [f"reward.kind={kind}"]).reward.folds for kind in ("hybrid", "warm")] == [5, 2]
