"""How many trials fit a cluster, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest

from raylign.config import RunConfig, load_config
from raylign.errors import ResourceError
from tuning.concurrency import trials_at_once


def config(**resources: Any) -> RunConfig:
    return load_config(values={"resources": resources, "policy": {"dtype": "float32"}})


@pytest.mark.parametrize(
    ("resources", "nodes", "expected"),
    [
        ({}, [{"CPU": 2.0}], 2),
        ({"num_workers": 2}, [{"CPU": 5.0}], 2),
        ({"num_workers": 2}, [{"CPU": 1.0}] * 5, 2),
        ({"cpus_per_worker": 2}, [{"CPU": 3.0}] * 4, 4),  # 12 CPUs hold six workers, the nodes only four
        ({"cpus_per_worker": 0.5}, [{"CPU": 3.0}], 2),  # a trial still needs a CPU to rank its pairs: 3 / 1.5
        ({"gpus_per_worker": 1, "num_workers": 4}, [{"CPU": 16.0, "GPU": 8.0}] * 2, 4),
    ],
)
def test_trials_fill_the_nodes(resources: dict[str, Any], nodes: list[dict[str, float]], expected: int) -> None:
    assert trials_at_once([config(**resources)], nodes, limit=16) == expected


def test_the_trial_that_fits_least_often_decides_and_a_limit_holds() -> None:
    configs = [config(), config(num_workers=3)]
    assert trials_at_once(configs, [{"CPU": 8.0}], limit=1) == 1
    assert trials_at_once(configs, [{"CPU": 8.0}], limit=9) == 2


def test_a_trial_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ResourceError, match=r"3 training worker\(s\) of 1 CPU and 0 GPU = 3 CPU .* 1 node\(s\) of 2 C"):
        trials_at_once([config(num_workers=3)], [{"CPU": 2.0}], limit=9)


def test_many_nodes_are_searched_no_further_than_there_are_trials() -> None:
    """Three groups on large nodes: the number of ways to fill them grows with its cube."""
    online = load_config(values={"train": {"method": "online_dpo"}, "policy": {"dtype": "float32"}})
    assert trials_at_once([online], [{"CPU": 64.0}] * 4, limit=6) == 6
