"""What phases reserve, what makes costs comparable, and what was paid for by others. No Ray is started."""

from __future__ import annotations

import pytest

from raylign.config import load_config
from raylign.cost.ledger import Ledger
from raylign.cost.rows import Cost, read_ledger, total_reused
from raylign.runtime.costs import cost_fingerprint, gpu_kind, open_ledger, phase_devices, record_reuse
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import held_devices, read_cost
from raylign.runtime.resources import ResourcePlan


@pytest.mark.parametrize(
    ("cluster", "kind"),
    [
        ({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0}, "H200"),
        ({"CPU": 8.0}, "gpu"),
        ({"accelerator_type:H200": 1.0, "accelerator_type:T4": 1.0}, "gpu"),
    ],
)
def test_gpus_are_named_when_there_is_one_kind(cluster, kind):
    assert gpu_kind(cluster) == kind


def test_every_phase_of_a_run_reserves_something():
    config = load_config(
        overrides=[
            *("features.num_actors=2", "features.cpus_per_actor=0.5", "features.gpus_per_actor=1"),
            *("resources.num_workers=4", "resources.cpus_per_worker=3", "resources.gpus_per_worker=1"),
            "evaluate.num_actors=3",
        ]
    )
    devices = phase_devices(ResourcePlan.from_config(config), {"CPU": 32.0, "GPU": 8.0}, driver_cpus=6)
    assert devices == {
        "ingest": {"cpu": 32},
        "features": {"cpu": 2, "gpu": 2},
        "reward": {"cpu": 6},
        "cost": {"cpu": 32},
        "rank": {"cpu": 32},
        "train": {"cpu": 12, "gpu": 4},
        "evaluate": {"cpu": 1.5, "gpu": 3},
    }
    assert held_devices(config.features) == devices["features"]


def test_a_pool_comes_with_the_cpu_that_reads_and_writes_for_it():
    assert ActorOptions(num_actors=2, num_cpus=0.5, num_gpus=1).pool_devices == {"cpu": 2, "gpu": 2}
    assert ActorOptions(num_actors=3, num_cpus=2).pool_devices == {"cpu": 7}


def test_samplers_are_reserved_while_the_policy_trains():
    config = load_config(overrides=["train.method=online_dpo", "sampler.num_engines=2", "sampler.gpus_per_engine=1"])
    devices = phase_devices(ResourcePlan.from_config(config), {"CPU": 8.0}, driver_cpus=1)
    assert devices["train"] == {"cpu": 1 + 2 * 0.5 + 0.5, "gpu": 2}


def test_methods_and_seeds_are_comparable_and_other_hardware_is_not():
    offline = load_config()
    same = load_config(overrides=["train.method=online_dpo", "run.seed=7", "run.name=b", "train.learning_rate=0.1"])
    assert cost_fingerprint(offline, "H200") == cost_fingerprint(same, "H200")
    for change in ("policy.adapter=lora", "data.max_length=300", "resources.num_workers=2", "train.parallel=fsdp"):
        assert cost_fingerprint(load_config(overrides=[change]), "H200") != cost_fingerprint(offline, "H200")
    assert cost_fingerprint(offline, "T4") != cost_fingerprint(offline, "H200")


def test_the_ledger_of_a_run_names_it(tmp_path):
    config = load_config(overrides=["run.name=a"])
    with open_ledger(config, tmp_path, {"accelerator_type:H200": 1.0}).measure("train", devices={"gpu": 1}):
        pass
    [row] = read_ledger(tmp_path / "ledger")
    assert (row.run, row.method, row.devices) == ("a", "offline", {"H200": 1})
    assert row.fingerprint == cost_fingerprint(config, "H200")


def test_what_a_run_made_itself_is_not_charged_again(tmp_path):
    ledger = Ledger(tmp_path)
    with ledger.measure("extract", devices={"cpu": 1}) as entry:
        pass
    cost = Cost(device_s={"cpu": 5.0})
    record_reuse(ledger, "features", (entry.id, cost), key="k")
    record_reuse(ledger, "features", None, key="k")
    assert total_reused(read_ledger(tmp_path)) == Cost()
    record_reuse(ledger, "features", ("another run's", cost), key="k")
    assert total_reused(read_ledger(tmp_path)) == cost


def test_a_cache_of_unknown_cost(tmp_path):
    assert read_cost(tmp_path) is None
