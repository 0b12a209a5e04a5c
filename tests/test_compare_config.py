"""Comparisons: what is shared, what a method may change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raylign.compare_config import load_comparison
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
        ({"compare": {"methods": METHODS, "seed": [1]}}, r"compare\.seed: Extra inputs"),
        ({"compare": 3}, r"needs a section compare"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_comparison(write(tmp_path, **sections))
