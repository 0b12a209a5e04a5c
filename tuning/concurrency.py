"""How many trials a cluster holds at a time, as arithmetic; no ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raylign.config import RunConfig
from raylign.errors import ResourceError
from raylign.runtime.resources import Demand, ResourcePlan, Resources, can_place, describe_supply

# a trial that trains on GPUs, or on shares of a CPU, still reads, ranks and writes its pairs
_TASKS = Demand(role="task of the rank phase", num_actors=1, num_cpus=1, num_gpus=0, keys="sweep.max_concurrent")


def trials_at_once(configs: Sequence[RunConfig], nodes: Sequence[Resources], *, limit: int) -> int:
    """The largest number of trials whose workers the nodes can hold together.

    Args:
        configs: of the trials; the one that fits least often decides.
        nodes: resources of each living node.
        limit: trials there are, or `sweep.max_concurrent`.

    Raises:
        ResourceError: not even one fits, with the arithmetic.
    """
    plans = {repr(plan): plan for plan in map(ResourcePlan.from_config, configs)}
    return min(_fits(trial_demands(plan), nodes, limit) for plan in plans.values())


def trial_demands(plan: ResourcePlan) -> tuple[Demand, ...]:
    """What one trial holds while it trains, which is the most it ever holds."""
    groups = (plan.training, *plan.online)
    return groups if sum(group.total("CPU") for group in groups) >= 1 else (*groups, _TASKS)


def _fits(demands: Sequence[Demand], nodes: Sequence[Resources], limit: int) -> int:
    """Copies of the groups that can be placed at once, at most `limit`.

    Raises:
        ResourceError: none.
    """
    totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    asked = {name: sum(demand.total(name) for demand in demands) for name in totals}
    bound = min(int(totals[name] / amount + 1e-9) for name, amount in asked.items() if amount > 0)
    for copies in range(min(bound, limit), 0, -1):
        if can_place([dataclasses.replace(d, num_actors=copies * d.num_actors) for d in demands], nodes):
            return copies
    shares = " + ".join(f"{d.num_actors} {d.role}(s) of {d.num_cpus:g} CPU and {d.num_gpus:g} GPU" for d in demands)
    raise ResourceError(
        f"one trial asks for {shares} = {asked['CPU']:g} CPU and {asked['GPU']:g} GPU, the cluster has "
        f"{'; '.join(describe_supply(nodes))}; lower {'; '.join(d.keys for d in demands)}, or add nodes"
    )
