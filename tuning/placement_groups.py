"""Placement groups that trials leave: what holds devices although nobody uses them any more.

At the end of a sweep Ray Tune 2.60 kills the actor of a trial 10 s after it told it to stop. A training that takes
longer to end leaves the placement group of its workers, which lives until the job ends and would keep the evaluation
waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from raylign.runtime.progress import phase_line


def live_groups() -> frozenset[str]:
    """Ids of the placement groups of this job that are not removed."""
    return groups_of(ray.util.placement_group_table(), job=ray.get_runtime_context().get_job_id())


def groups_of(table: Mapping[str, Mapping[str, Any]], *, job: str) -> frozenset[str]:
    """Those of one job.

    Args:
        table: of the whole cluster, by id in hex.
        job: id in hex, which ends the ids of its groups.
    """
    return frozenset(id for id, group in table.items() if group["state"] != "REMOVED" and id.endswith(job))


def remove_left(earlier: frozenset[str]) -> None:
    """Remove the placement groups of this job that are no earlier ones, with whatever runs in them."""
    left = live_groups() - earlier
    for id in left:
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(id))))
    if left:
        phase_line("trial", f"removed {len(left)} placement group(s) that stopped trials had left")
