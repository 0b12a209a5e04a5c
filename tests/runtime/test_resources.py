"""The resource plan is arithmetic; no Ray is needed to test it."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from safetensors.numpy import save_file

from raylign.config import load_config
from raylign.errors import ResourceError
from raylign.runtime.resources import (
    KINDS,
    Demand,
    ResourcePlan,
    Resources,
    can_place,
    check_demand,
    check_plan,
    describe_demand,
    describe_supply,
)


def plan(*overrides: str) -> ResourcePlan:
    return ResourcePlan.from_config(load_config(overrides=list(overrides)))


def test_totals_are_actors_times_each() -> None:
    demand = plan("resources.num_workers=3", "resources.cpus_per_worker=2", "resources.gpus_per_worker=1").training
    assert (demand.total("CPU"), demand.total("GPU")) == (6, 3)
    demand = plan("features.num_actors=4", "features.gpus_per_actor=0.5").features
    assert (demand.total("CPU"), demand.total("GPU")) == (4, 2)


def test_phases_follow_each_other_so_the_largest_must_fit() -> None:
    check_plan(plan("resources.num_workers=2", "evaluate.num_actors=2"), {"CPU": 2.0}, [{"CPU": 2.0}])


def test_feature_actors_leave_a_cpu_to_the_tasks_that_feed_them() -> None:
    """One actor on one CPU, or two on two, were admitted and then waited for rows that no CPU was left to read."""
    with pytest.raises(ResourceError, match=r"1 feature actor\(s\) x 1 CPU leave less than 1 of the cluster's 1 CPU"):
        check_plan(plan(), {"CPU": 1.0}, [{"CPU": 1.0}])
    check_plan(plan(), {"CPU": 2.0}, [{"CPU": 2.0}])
    with pytest.raises(ResourceError, match=r"2 feature actor\(s\) x 1 CPU leave less than 1 of the cluster's 2 CPU"):
        check_plan(plan("features.num_actors=2"), {"CPU": 2.0}, [{"CPU": 2.0}])
    check_plan(plan("features.num_actors=2", "features.cpus_per_actor=0.5"), {"CPU": 2.0}, [{"CPU": 2.0}])
    check_plan(plan("features.num_actors=2"), {"CPU": 3.0}, [{"CPU": 3.0}])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resources.num_workers=5"], r"5 training worker\(s\) x 1 CPU ask for 5 CPU, the cluster has 4; lower res"),
        (["features.num_actors=9"], r"9 feature actor\(s\) x 1 CPU ask for 9 CPU, the cluster has 4; lower features"),
        (["evaluate.num_actors=6"], r"6 evaluation actor\(s\) x 1 CPU ask for 6 CPU, the cluster has 4; lower evalu"),
        (["resources.gpus_per_worker=1"], r"1 training worker\(s\) x 1 GPU ask for 1 GPU, the cluster has 0"),
    ],
)
def test_both_numbers_and_the_keys_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        check_plan(plan(*overrides), {"CPU": 4.0})


def test_an_actor_is_not_spread_over_two_nodes() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    check_plan(plan("resources.num_workers=2", "resources.cpus_per_worker=2"), {"CPU": 4.0}, nodes)
    with pytest.raises(ResourceError, match=r"3 CPU \+ 0 GPU do not fit onto the nodes \(2 CPU \+ 0 GPU, 2 CPU"):
        check_plan(plan("resources.cpus_per_worker=3"), {"CPU": 4.0}, nodes)


def test_tenths_of_a_cpu_add_up() -> None:
    check_plan(plan("features.num_actors=3", "features.cpus_per_actor=0.1"), {"CPU": 1.3}, [{"CPU": 1.3}])
    check_demand(
        plan("resources.num_workers=3", "resources.cpus_per_worker=0.1").training, {"CPU": 0.3}, [{"CPU": 0.3}]
    )


def test_demand_and_supply_are_listed_by_role_and_node_shape() -> None:
    lines = describe_demand(
        plan(
            "train.method=online_dpo",
            "resources.num_workers=2",
            "resources.gpus_per_worker=1",
            "sampler.num_engines=2",
            "sampler.gpus_per_engine=1",
        )
    )
    assert lines == [
        "feature actor     1 x (1 CPU) = 1 CPU, and 1 CPU for the tasks that feed them",
        "training worker   2 x (1 CPU + 1 GPU) = 2 CPU + 2 GPU",
        "evaluation actor  1 x (1 CPU) = 1 CPU",
        "sampling engine   2 x (0.5 CPU + 1 GPU) = 1 CPU + 2 GPU",
        "scorer            1 x (0.5 CPU) = 0.5 CPU",
        "training worker + sampling engine + scorer at the same time = 3.5 CPU + 4 GPU",
    ]
    nodes = [{"CPU": 8.0}, {"CPU": 32.0, "GPU": 8.0, "memory": 1e9}, {"CPU": 32.0, "GPU": 8.0}]
    assert describe_supply(nodes) == ["2 node(s) of 32 CPU + 8 GPU", "1 node(s) of 8 CPU", "in total 72 CPU + 16 GPU"]


def test_groups_that_exist_together_must_fit_onto_nodes_and_not_only_in_sum() -> None:
    """Two workers of 1.5 CPU and an engine of 1 ask for the 4 CPU that two nodes of 2 have, and fit in no way."""
    asked = plan(
        "train.method=online_dpo",
        "resources.num_workers=2",
        "resources.cpus_per_worker=1.5",
        "sampler.cpus_per_engine=0.75",
        "sampler.scorer_cpus=0.25",
    )
    with pytest.raises(ResourceError, match=r"do not fit onto the nodes \(2 node\(s\) of 2 CPU\): the sum would"):
        check_plan(asked, {"CPU": 4.0}, [{"CPU": 2.0}, {"CPU": 2.0}])
    check_plan(asked, {"CPU": 4.0}, [{"CPU": 1.5}, {"CPU": 2.5}])
    check_plan(asked, {"CPU": 4.0}, [{"CPU": 4.0}])


def test_memory_of_engines_is_part_of_the_plan(tmp_path) -> None:
    """A float32 copy of the weights, the cache and a process for each; on GPUs the weights lie elsewhere."""
    save_file({"w": np.zeros((2**10, 2**10), np.float16), "b": np.zeros(2**10, np.float16)}, tmp_path / "a.safetensors")
    keys = (f"policy.model={tmp_path}", "train.method=online_dpo", "sampler.num_engines=3", "sampler.cache_mib=1024")
    asked = plan(*keys)
    (engines, _) = asked.online
    assert engines.memory == 4 * (2**20 + 2**10) + 2**30 + 1280 * 2**20
    assert plan(*keys, "policy.dtype=bfloat16").online[0].memory == engines.memory - 2 * (2**20 + 2**10)
    assert plan(*keys[:-1], "sampler.gpus_per_engine=1").online[0].memory == 0
    assert plan("train.method=online_dpo", "policy.model=an/unknown").online[0].memory == 0
    assert "3 x (0.5 CPU + 2.3 GiB) = 1.5 CPU + 6.8 GiB" in describe_demand(asked)[3]
    node = {"CPU": 8.0, "memory": 4.0 * 2**30}
    with pytest.raises(
        ResourceError, match=r"3 sampling engine\(s\) x 2\.3 GiB ask for 6\.8 GiB, .* has 4\.0 GiB; .*cache"
    ):
        check_plan(asked, node, [node])
    with pytest.raises(ResourceError, match=r"onto the nodes \(8 CPU \+ 0 GPU \+ 4\.0 GiB, .* only 2 can be placed"):
        check_plan(asked, {"CPU": 16.0, "memory": 8.0 * 2**30}, [node, node])
    check_plan(asked, {"CPU": 24.0, "memory": 12.0 * 2**30}, [node] * 3)
    check_plan(asked, {"CPU": 8.0}, [{"CPU": 8.0}])  # a cluster that states none


def test_memory_counts_where_groups_are_placed_together() -> None:
    """The node with the memory has no CPU left beside the training workers."""
    asked = plan("train.method=online_dpo", "resources.num_workers=3", "resources.cpus_per_worker=2")
    nodes = [{"CPU": 5.0, "memory": 2.0**30}, {"CPU": 2.0, "memory": 2.0 * 2**30}]
    with pytest.raises(
        ResourceError, match=r"0\.5 CPU \+ 1\.3 GiB .* of 2 CPU with 1\.0 GiB, 2\.0 GiB\): the sum would"
    ):
        check_plan(asked, {"CPU": 7.0, "memory": 3.0 * 2**30}, nodes)
    check_plan(asked, {"CPU": 7.0, "memory": 4.0 * 2**30}, [{**nodes[0], "memory": 2.0 * 2**30}, nodes[1]])


def exhaustive(demands: Sequence[Demand], nodes: Sequence[Resources]) -> bool:
    """Every actor on every node in turn."""
    actors = [demand for demand in demands for _ in range(demand.num_actors)]
    for places in itertools.product(range(len(nodes)), repeat=len(actors)):
        held = [
            {name: sum(a.each(name) for a, p in zip(actors, places, strict=True) if p == i) for name in KINDS}
            for i in range(len(nodes))
        ]
        if all(h[name] <= n.get(name, 0) + 1e-9 for h, n in zip(held, nodes, strict=True) for name in KINDS):
            return True
    return False


def test_placing_agrees_with_trying_every_way() -> None:
    rng = random.Random(0)
    answers = Counter()
    for _ in range(120):
        demands = [
            Demand(
                role="actor",
                num_actors=rng.randint(1, 2),
                num_cpus=rng.choice((0.5, 1, 1.5, 2)),
                num_gpus=rng.choice((0, 0.5, 1)),
                memory=rng.choice((0, 0, 1, 2)),
                keys="",
            )
            for _ in range(3)
        ]
        nodes = [
            {
                "CPU": rng.choice((1.0, 2.0, 3.0)),
                "GPU": rng.choice((0.0, 1.0, 2.0)),
                "memory": rng.choice((1.0, 2.0, 4.0)),
            }
            for _ in range(3)
        ]
        answers[can_place(demands, nodes)] += 1
        assert can_place(demands, nodes) == exhaustive(demands, nodes)
    assert min(answers.values()) > 20


def test_a_large_cluster_is_placed_at_once() -> None:
    asked = plan("train.method=online_dpo", "resources.num_workers=256", "sampler.num_engines=64")
    start = time.monotonic()
    assert can_place((asked.training, *asked.online), [{"CPU": 6.0}] * 64)
    assert not can_place((asked.training, *asked.online), [{"CPU": 4.25}] * 64)
    assert time.monotonic() - start < 5
