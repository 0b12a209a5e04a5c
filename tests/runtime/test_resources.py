"""The resource plan is arithmetic; no Ray is needed to test it."""

from __future__ import annotations

import pytest

from raylign.config import load_config
from raylign.errors import ResourceError
from raylign.runtime.resources import ResourcePlan, check_demand, check_plan


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
