"""Calibrations: what is shared, what a reward may change, what is fitted once, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import main
from raylign.calibrate_config import directory_name, load_calibration
from raylign.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "launch" / "configs" / "calibrate_tiny.yaml"
REWARDS: dict[str, Any] = {
    "single": {},
    "min": {"reward.kind": "ensemble", "robust.rule": "min"},
    "mean": {"reward.kind": "ensemble", "robust.rule": "mean"},
    "brme w=0.4": {"reward.kind": "brme", "robust.w_nominal": 0.4},
    "brme paper": {"reward.kind": "brme", "brme.loss": "mse_reparam"},
}


def write(directory: Path, **sections: Any) -> Path:
    file = directory / "calibrate.yaml"
    content = {**sections, "calibrate": {"rewards": REWARDS, "seeds": [4, 5], **sections.get("calibrate", {})}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_every_reward_gets_the_shared_keys_that_it_reads(tmp_path: Path) -> None:
    file = write(tmp_path, reward={"ridge": 0.5, "num_heads": 3, "max_pairs": 99}, run={"name": "c"})
    calibration = load_calibration(file)
    assert [(trial.name, trial.seed) for trial in calibration.trials] == [(n, s) for s in (4, 5) for n in REWARDS]
    assert all(trial.config.reward.ridge == 0.5 for trial in calibration.trials)
    assert calibration.base.reward.max_pairs == 99
    assert calibration.trial("min", 4).config.reward.num_heads == 3
    run = calibration.trial("brme w=0.4", 5).config.run
    assert (run.storage, run.name, run.seed) == ("runs/c", "brme-w-0.4-seed5", 5)
    assert calibration.directory == Path("runs/c").absolute()


def test_rewards_that_differ_in_their_rule_alone_are_fitted_once(tmp_path: Path) -> None:
    fits = load_calibration(write(tmp_path)).fits
    assert fits == (("single",), ("min", "mean"), ("brme w=0.4",), ("brme paper",))
    standardised = {**REWARDS, "mean": {**REWARDS["mean"], "reward.standardize": False}}
    assert ("min",) in load_calibration(write(tmp_path, calibrate={"rewards": standardised})).fits


def test_shares_of_flips_are_ascending(tmp_path: Path) -> None:
    assert load_calibration(write(tmp_path, calibrate={"flips": [0.3, 0, 0.1]})).calibrate.flips == [0, 0.1, 0.3]


def test_a_calibration_without_training_needs_no_sampler(tmp_path: Path) -> None:
    assert load_calibration(write(tmp_path)).base.train.method == "offline"
    trained = load_calibration(write(tmp_path, online={"num_rounds": 2}, calibrate={"trained": ["min"]}))
    assert trained.base.train.method == "policy_gradient"
    assert trained.trial("min", 4).config.online.num_rounds == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"calibrate": {"rewards": {"x": {"reward.kid": "brme"}}}}, r"x: unknown config key reward\.kid.*reward\.kind"),
        ({"calibrate": {"rewards": {"x": {"reward.kind": "gp"}}}}, r"rewards\.x: reward\.kind='gp'"),
        ({"calibrate": {"rewards": {"x": {"train.beta": 1}}}}, r"x sets train\.beta; .* reward, brme and robust"),
        ({"calibrate": {"rewards": {"x": {"kind": "brme"}}}}, r"x sets kind; .* for example reward\.kind"),
        ({"calibrate": {"rewards": {"x": {"reward.max_pairs": 9}}}}, r"reward\.max_pairs.*set it once"),
        (
            {"calibrate": {"rewards": {"x": {"robust.rule": "min"}}}},
            r"rewards\.x: robust\.rule is set but has no effect",
        ),
        ({"calibrate": {"rewards": {"x": {"reward.kind": "warm"}}}}, r"x: reward\.kind=warm is fine-tuned for minutes"),
        ({"calibrate": {"rewards": {"a=1": {}, "a-1": {}}}}, r"'a-1' and 'a=1' need directories of their own"),
        ({"calibrate": {"rewards": {"=": {}}}}, r"name '=' needs a letter or a digit"),
        ({"calibrate": {"rewards": {}}}, r"calibrate\.rewards: .*at least 1"),
        (
            {"calibrate": {"trained": ["max"]}},
            r"calibrate\.trained names max, none of calibrate\.rewards \(single, min",
        ),
        ({"calibrate": {"seeds": [1, 1]}}, r"calibrate\.seeds=\[1, 1\] names a value twice"),
        ({"calibrate": {"flips": [0.1, 0.1]}}, r"calibrate\.flips=\[0\.1, 0\.1\] names a value twice"),
        ({"calibrate": {"flips": [0.5]}}, r"calibrate\.flips\.0: .*less than 0\.5"),
        ({"calibrate": {"flip": [0.1]}}, r"calibrate\.flip: Extra inputs"),
        ({"online": {"num_rounds": 2}}, r"online\.num_rounds is set but nothing is trained"),
        ({"resources": {"num_workers": 2}}, r"resources\.num_workers is set but nothing is trained"),
        ({"train": {"method": "online_dpo"}, "calibrate": {"trained": ["min"]}}, r"trains by policy_gradient"),
        ({"calibrate": {"trained_flips": [0.1]}}, r"trained_flips is set but nothing is trained"),
        (
            {"calibrate": {"trained": ["min"], "flips": [0.0], "trained_flips": [0.1]}},
            r"trained_flips=\[0\.1\] must be among calibrate\.flips=\[0\.0\]",
        ),
        ({"evaluate": {"temperature": 0.5}}, r"evaluate\.temperature is set but a calibration does not read it"),
        ({"confidence": {"alpha": 2}}, r"confidence\.alpha is set but none of calibrate\.rewards reads it"),
        ({"reward": {"prior_precision": 2}}, r"reward\.prior_precision is set but none of calibrate\.rewards reads it"),
        ({"cost": {"prices": {"cpu": 1}}}, r"cost\.prices is set but a calibration prices nothing"),
        ({"online": None}, r"^online=None: Input should be a valid dictionary"),
        ({"brem": {"loss": "purm"}}, r"unknown config key brem"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_calibration(write(tmp_path, **sections))


def test_a_file_without_the_section_is_told_what_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: x}\n")
    with pytest.raises(ConfigError, match=r"needs a section calibrate with rewards .*calibrate_tiny\.yaml"):
        load_calibration(file)


def test_directory_names() -> None:
    assert [directory_name(name) for name in ("brme w=0.2", "a/../b", "plain_1")] == ["brme-w-0.2", "a-..-b", "plain_1"]


def test_check_of_the_shipped_calibration_tells_what_will_run() -> None:
    result = CliRunner().invoke(main, ["check", "--config", SHIPPED.name])
    assert result.exit_code == 0, result.output
    assert "fits     4 models x 3 shares of flips x 3 seeds = 36, and 0 trainings" in result.output
    assert "reward   brme w=0.4: brme, rule brme\n" in result.output
    assert result.output.endswith("ok\n")


def test_check_counts_the_harmful_prompts() -> None:
    result = CliRunner().invoke(main, ["check", "--config", SHIPPED.name, "calibrate.num_prompts=4000"])
    assert result.exit_code == 1
    assert "calibrate.num_prompts=4000 asks for more than the 150 harmful prompts" in result.output


def test_only_a_training_needs_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from raylign.runtime import check

    find = check.importlib.util.find_spec
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name))
    arguments = ["check", "--config", SHIPPED.name]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    result = CliRunner().invoke(main, [*arguments, "calibrate.trained=[min]"])
    assert result.exit_code == 1
    assert "samples with vLLM; install it" in result.output


def test_calibrate_without_its_section_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: x}\n")
    result = CliRunner().invoke(main, ["calibrate", "--config", str(file)])
    assert result.exit_code == 2
    assert "needs a section calibrate" in result.output
    assert "Traceback" not in result.output
