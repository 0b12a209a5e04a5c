"""Before anything starts: what a run asks for against what the cluster has, and whether every node sees its files."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import ray

from raylign.config import EMBEDDED, RunConfig
from raylign.runtime.progress import phase_line
from raylign.runtime.resources import ResourcePlan, check_plan, describe_demand, describe_supply
from raylign.runtime.storage import check_job_storage, check_visible, is_in_job_copy


def check_cluster(config: RunConfig) -> None:
    """Compare a run with the cluster that is initialised; shows both when the cluster was there before.

    Raises:
        ResourceError: the plan does not fit, with the arithmetic, or a node does not answer.
        ConfigError: results would be lost, or a node does not see storage, model or data.
    """
    living = [node for node in ray.nodes() if node["Alive"]]
    resources = [node["Resources"] for node in living]
    plan = ResourcePlan.from_config(config)
    if "RAY_ADDRESS" in os.environ or len(living) > 1:
        _show("demand", tuple(describe_demand(plan)))
        _show("supply", tuple(describe_supply(resources)))
    check_plan(plan, ray.cluster_resources(), resources)
    if is_in_job_copy(os.environ):
        check_job_storage(config.run.storage)
    here = ray.get_runtime_context().get_node_id()
    others = {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in living
        if node["NodeID"] != here and (node["Resources"].keys() & {"CPU", "GPU"})
    }
    if others:
        check_visible(Path(config.run.storage).expanduser().absolute(), local_inputs(config), others)


def local_inputs(config: RunConfig) -> dict[str, str]:
    """Directories and files that actors read, by config key; what is read over a network is left out."""
    from raylign.data.sources import list_files
    from raylign.models.loading import resolve_model

    found = {"policy.model": str(Path(resolve_model(config.policy.model)).absolute())}
    for key, name in {
        "evaluate.judge": None if config.evaluate.judge == EMBEDDED else config.evaluate.judge,
        "reward_model.model": config.reward_model.model,
        "cost_model.model": config.cost_model.model,
    }.items():
        if name is not None:
            found[key] = str(Path(resolve_model(name, key=key)).absolute())
    if "://" not in config.data.path:
        found["data.path"] = str(Path(list_files(config.data.path)[0]).absolute())
    return found


@functools.cache
def _show(name: str, lines: tuple[str, ...]) -> None:
    """Print once what several runs of one process ask for alike."""
    for line in lines:
        phase_line(name, line)
