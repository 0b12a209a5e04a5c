"""Comparisons: what is shared, what a method may change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import main
from raylign.compare_config import load_comparison
from raylign.config import load_config
from raylign.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "launch" / "configs" / "compare_tiny.yaml"
METHODS = {"dpo": {"train.objective": "dpo"}, "rerank": {}, "online": {"train.method": "online_dpo"}}


def write(directory: Path, **sections: Any) -> Path:
    file = directory / "compare.yaml"
    content = {"compare": {"methods": METHODS, "seeds": [4, 5], "rerank": "rerank"}, **sections}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_every_method_gets_the_shared_keys_that_it_reads(tmp_path: Path) -> None:
    file = write(tmp_path, train={"batch_size": 4, "max_steps": 6}, online={"num_rounds": 3}, run={"name": "c"})
    trials = load_comparison(file).trials
    assert [(trial.method, trial.seed) for trial in trials] == [
        (method, seed) for seed in (4, 5) for method in ("dpo", "rerank", "online")
    ]
    dpo, rerank, online = (trial.config for trial in trials[:3])
    assert [config.train.batch_size for config in (dpo, rerank, online)] == [4, 4, 4]
    assert (dpo.train.max_steps, rerank.train.max_steps, online.train.max_steps) == (6, 6, None)
    assert online.online.num_rounds == 3
    assert (dpo.train.objective, rerank.train.objective, online.train.objective) == ("dpo", "label_confidence", "dpo")
    assert (online.run.storage, online.run.name, online.run.seed) == ("runs/c", "online-seed4", 4)


def test_the_shipped_comparison_has_four_methods_and_three_seeds() -> None:
    comparison = load_comparison(SHIPPED)
    assert len(comparison.trials) == 12
    assert {trial.config.train.method for trial in comparison.trials} == {"offline", "online_dpo", "policy_gradient"}
    assert comparison.base.train.method == "offline"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"sampler": {"gpu_memory_utilization": 0.3}}, r"sampler\.gpu_memory_utilization .* none of compare\.methods"),
        ({"trian": {"beta": 1}}, r"unknown config key trian"),
        ({"compare": {"methods": METHODS, "baseline": "sft"}}, r"compare\.baseline='sft' is none of"),
        ({"compare": {"methods": {**METHODS, "x": {"data.max_pairs": 9}}}}, r"x sets data\.max_pairs, which all"),
        (
            {"compare": {"methods": {**METHODS, "x": {"online.num_rounds": 9}}}},
            r"methods\.x: online\.num_rounds is set",
        ),
        ({"compare": {"methods": {**METHODS, "x": {"beta": 9}}}}, r"'beta' must look like section\.key"),
        *(
            ({"compare": {"methods": {**METHODS, "x": {key: value}}}}, rf"x sets {key}, which all methods must share")
            for key, value in {
                "policy.model": "other",
                "policy.dtype": "float32",
                "policy.adapter": "lora",
                "resources.num_workers": 2,
                "cost.prices": {"cpu": 1},
            }.items()
        ),
        ({"compare": {"methods": METHODS, "seeds": [1, 2, 1]}}, r"compare\.seeds=\[1, 2, 1\] names 1 more than once"),
        (
            {"compare": {"methods": METHODS, "projections": ["7B", "9B"]}},
            r"compare\.projections: sizes 9B are not known",
        ),
        ({"compare": {"methods": METHODS, "baseline": "online"}}, r"baseline='online' has train\.method=online_dpo"),
        ({"compare": {"methods": METHODS, "baseline": "rerank"}}, r"baseline and compare\.rerank are both 'rerank'"),
        ({"evaluate": {"drift_prompts": 8}}, r"evaluate\.drift_prompts is set but a comparison measures no drift"),
        (
            {"evaluate": {"drift_candidates": 4}},
            r"evaluate\.drift_candidates is set but a comparison measures no drift",
        ),
        ({"online": None}, r"^online=None: Input should be a valid dictionary"),
        ({"evaluate": 3}, r"^evaluate=3: Input should be a valid dictionary"),
        ({"compare": {"methods": METHODS, "seed": [1]}}, r"compare\.seed: Extra inputs"),
        ({"compare": 3}, r"needs a section compare"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_comparison(write(tmp_path, **sections))


def test_an_empty_section_is_refused_as_in_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as of_comparison:
        load_comparison(write(tmp_path, online=None))
    file = tmp_path / "run.yaml"
    file.write_text("online:\n")
    with pytest.raises(ConfigError) as of_run:
        load_config(file)
    assert str(of_comparison.value) == str(of_run.value)


def test_prices_reach_the_comparison(tmp_path: Path) -> None:
    comparison = load_comparison(write(tmp_path, cost={"prices": {"cpu": 0.05}, "currency": "EUR"}))
    assert (comparison.base.cost.prices, comparison.base.cost.currency) == ({"cpu": 0.05}, "EUR")


def test_check_looks_at_every_method_once() -> None:
    result = CliRunner().invoke(main, ["check", "--config", SHIPPED.name])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [*shipped_methods(), "ok"]
    after_online = lines[lines.index("online_dpo") + 1 : lines.index("policy_gradient")]
    assert any(line.startswith("  method   online dpo") for line in after_online)


def test_check_prints_the_configuration_of_every_method() -> None:
    result = CliRunner().invoke(main, ["check", "--config", SHIPPED.name, "--print-config", "compare.seeds=[7, 8]"])
    assert result.exit_code == 0, result.output
    runs = list(yaml.safe_load_all(result.output))
    assert [run["run"]["name"] for run in runs] == [f"{name}-seed7" for name in shipped_methods()]


def test_check_refuses_what_compare_refuses() -> None:
    result = CliRunner().invoke(main, ["check", "--config", SHIPPED.name, "compare.seeds=[1, 1]"])
    assert result.exit_code == 2
    assert "compare.seeds=[1, 1] names 1 more than once" in result.output


def shipped_methods() -> list[str]:
    return list(yaml.safe_load(SHIPPED.read_text())["compare"]["methods"])
