"""Sweeps: what trials run, what is shared, and the assertion that swept keys really differ."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.cli import main
from raylign.config import RunConfig, load_config
from raylign.errors import ConfigError
from tuning.search_space import SPACES
from tuning.sweep_config import check_differ, load_sweep, point_name


def space(directory: Path, text: str) -> str:
    file = directory / "own.yaml"
    file.write_text(text)
    return str(file)


def test_trials_have_their_keys_their_seed_and_a_directory_of_their_own(tmp_path: Path) -> None:
    sweep = load_sweep(
        space(tmp_path, "run.name: s\ntrain.max_steps: 6\ntrain.beta: {grid: [0.1, 0.3]}"),
        overrides=["sweep.seeds=[4, 5]", f"run.storage={tmp_path}"],
    )
    assert [(t.config.train.beta, t.seed, t.name) for t in sweep.trials] == [
        (0.1, 4, "beta-0.1-seed4"),
        (0.3, 4, "beta-0.3-seed4"),
        (0.1, 5, "beta-0.1-seed5"),
        (0.3, 5, "beta-0.3-seed5"),
    ]
    first = sweep.trials[0]
    assert first.directory == tmp_path / "s" / "trials" / "beta-0.1-seed4"
    assert (first.config.run.seed, first.config.train.max_steps, first.config.run.resume) == (4, 6, True)
    assert sweep.trial_of({"keys": {"train.beta": 0.2}}).name == "beta-0.2-seed4"
    assert pickle.loads(pickle.dumps(sweep)).trials[3].config == sweep.trials[3].config


def test_trials_stay_where_they_are_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Tune gives the process of a trial a directory of its own; run.storage is "runs" by default."""
    own = space(tmp_path, "train.beta: {grid: [0.1, 0.3]}")
    for name in ("started", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "started")
    sweep = load_sweep(own)
    monkeypatch.chdir(tmp_path / "other")
    moved = pickle.loads(pickle.dumps(sweep))
    assert moved.directory == tmp_path / "started" / "runs" / sweep.base.run.name
    assert moved.trials[0].directory == moved.directory / "trials" / "beta-0.1-seed0"


def test_metrics_of_pairs_are_refused_where_there_are_none(tmp_path: Path) -> None:
    own = space(tmp_path, "train.method: policy_gradient\nonline.num_samples: {grid: [2, 4]}")
    with pytest.raises(ConfigError, match=r"sweep\.metric=rewards/accuracies is one of pairs, .*critic/score/mean"):
        load_sweep(own, overrides=["sweep.scheduler=asha"])
    load_sweep(own, overrides=["sweep.scheduler=asha", "sweep.metric=critic/score/mean"])


@pytest.mark.parametrize("metric", ["loss", "rewards/accuracies"])
def test_points_that_turn_pairs_round_are_compared_by_a_metric_that_was_asked_for(tmp_path: Path, metric: str) -> None:
    own = space(tmp_path, "confidence.alpha: {grid: [1, 2]}")
    sweep = load_sweep(own, overrides=["sweep.scheduler=asha", f"sweep.metric={metric}"])
    assert sweep.compared_metric == metric
    assert load_sweep(own).compared_metric is None


def test_later_sources_win(tmp_path: Path) -> None:
    config = tmp_path / "base.yaml"
    config.write_text("train: {max_steps: 3, epochs: 2, batch_size: 4}\nrun: {name: x}")
    own = space(tmp_path, "train.max_steps: 6\ntrain.epochs: 3\ntrain.beta: {grid: [0.1, 0.3]}")
    base = load_sweep(own, config, ["train.epochs=5"]).base
    assert (base.train.batch_size, base.train.max_steps, base.train.epochs) == (4, 6, 5)


def test_constraints_belong_to_points_and_their_costs_to_all() -> None:
    sweep = load_sweep("multipliers")
    assert sweep.base.constraint.kind == "none"
    assert sweep.base.cost_model.source == "embedded"
    assert {trial.config.constraint.multiplier for trial in sweep.trials} == {0.0, 0.5, 1.0, 2.0, 5.0}


@pytest.mark.parametrize("name", sorted(path.stem for path in SPACES.glob("*.yaml")))
def test_shipped_spaces_can_be_swept(name: str) -> None:
    sweep = load_sweep(name)
    assert len(sweep.points) >= 4
    assert sweep.base.run.name == f"sweep-{name.replace('_', '-')}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train.betta: {grid: [1, 2]}", [], r"point train\.betta=1: unknown config key train\.betta: did you mean tr"),
        ("train.ipo_tau: {grid: [1, 2]}", [], r"train\.ipo_tau is set but has no effect here; .*objective=ipo"),
        ("train.beta: {grid: [1, 2]}", ["train.beta=3"], r"sweeps train\.beta, which is set as well"),
        ("data.max_pairs: {grid: [10, 20]}", [], r"sweeps data\.max_pairs, which all points share"),
        ("run.seed: {grid: [1, 2]}", [], r"seeds are sweep\.seeds"),
        ("train.beta: {grid: [1, 2]}\nonline.num_rounds: 3", [], r"online\.num_rounds is set but no point .* reads it"),
        ("train.beta: {grid: [1, 2]}\nevaluate.drift_prompts: 9", [], r"drift_prompts is set but a sweep does not"),
        ("train.beta: {grid: [1, -2]}", [], r"train\.beta=-2: Input should be greater than 0"),
        ("train.beta: {uniform: [1, 2]}", [], r"sweep\.search=grid goes through listed values, train\.beta has none"),
        ("train.beta: {grid: [1, 2]}", ["sweep.num_samples=3"], r"sweep\.num_samples is set but has no effect"),
        ("train.beta: {grid: [1, 2]}", ["sweep.grace_steps=3"], r"sweep\.grace_steps is set .*scheduler=asha"),
        ("train.beta: {grid: [1, 2]}", ["sweep.metric=loss"], r"sweep\.metric is set .*=asha or sweep\.search=optuna"),
        ("train.beta: {grid: [1, 2]}", ["sweep.search=random", "sweep.mode=min"], r"sweep\.mode is set but has no eff"),
        ("train.beta: {grid: [1, 2]}", ["sweep.screen_metric=ece"], r"remove it or set sweep\.keep"),
        ("train.beta: {grid: [1, 2]}", ["sweep.seeds=[1, 1]"], r"one seed or more, each once"),
        ("train.beta: {grid: [1, 2]}", ["sweep.sedes=[1]"], r"sweep\.sedes=.* \(keys are search, "),
        ("train.beta: {grid: [1, 2]}", ["sweep.search=optuna", "sweep.seeds=[1, 2]"], r"use one seed"),
        ("train.beta: {grid: [1, 2]}", ["sweep.scheduler=asha", "sweep.seeds=[1, 2]"], r"asha stops .*seeds='\[0\]'"),
        ("confidence.alpha: {grid: [1, 2]}", ["sweep.scheduler=asha"], r"default, .*order, and confidence\.alpha"),
        (
            "constraint.kind: rectified\nconstraint.multiplier: {grid: [1, 2]}",
            ["sweep.search=optuna"],
            r"and constraint\.multiplier decides .* set sweep\.metric to what",
        ),
        ("reward.max_pairs: {grid: [50, 60]}", ["sweep.keep=1"], r"sweep\.keep is set but no axis"),
        ("reward.folds: {grid: [2, 3]}", ["sweep.keep=1"], r"sweep\.keep is set but no axis"),
        (
            "reward.kind: brme\nrobust.w_nominal: {grid: [0.1, 0.2]}\nevaluate.best_of: 2\n",
            [],
            r"robust\.w_nominal is swept, but train\.method=offline never maximises",
        ),
        ("train: {beta: 1}", [], r"'train' must look like section\.key"),
    ],
)
def test_mistakes_are_told_before_ray_starts(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(space(tmp_path, text), overrides=overrides)


def test_points_of_a_search_that_finds_them_are_checked_at_their_ends(tmp_path: Path) -> None:
    own = space(tmp_path, "train.beta: {loguniform: [0.01, 1]}")
    assert load_sweep(own, overrides=["sweep.search=optuna"]).points == ()
    with pytest.raises(ConfigError, match=r"confidence\.floor=1"):
        load_sweep(space(tmp_path, "confidence.floor: {uniform: [0, 1]}"), overrides=["sweep.search=optuna"])


def config(**train: object) -> RunConfig:
    return load_config(values={"train": train})


def test_what_was_swept_must_differ_in_what_ran() -> None:
    points = [({"train.beta": beta}, config(beta=beta)) for beta in (0.1, 0.2)]
    check_differ(points, where="here")
    with pytest.raises(ConfigError, match=r"here: train\.beta was to be 0\.2, a trial runs with 0\.1"):
        check_differ([points[0], (points[1][0], points[0][1])], where="here")
    with pytest.raises(ConfigError, match="run alike"):
        check_differ([points[0], ({}, points[0][1])], where="here")


def test_names_are_fit_for_directories_and_tell_points_apart() -> None:
    assert point_name({"train.beta": 0.1, "reward.num_heads": 3}) == "beta-0.1_num_heads-3"
    assert point_name({"train.learning_rate": 1e-5, "reward.learning_rate": 2.0}) == (
        "train.learning_rate-1e-05_reward.learning_rate-2"
    )
    names = {
        point_name({"features.layers": value})
        for value in ("a b", "a-b", [1, 2], 0.1, 0.10000001, "x" * 200, "x" * 201)
    }
    assert len(names) == 7
    assert all(load_config(values={"run": {"name": name}}).run.name == name for name in names)


def test_checking_a_sweep_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from tuning.sweep_config import load_sweep; load_sweep('confidence').cheap_settings; "
        "print(*(m for m in ('ray', 'torch', 'transformers') if m in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == []


def test_a_dry_run_prints_the_points_and_starts_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sweep", "--space", "beta", "--dry-run", f"run.storage={tmp_path}"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[:2] == ["4 points x 1 seed(s)", "beta-0.02"]
    assert not any(tmp_path.iterdir())
