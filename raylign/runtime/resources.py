"""What a run asks of the cluster, as arithmetic, and the comparison that fails at once instead of waiting for ever."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from raylign.config import RunConfig
from raylign.errors import ResourceError
from raylign.runtime.sampler_settings import engine_memory

Resources = Mapping[str, float]
KINDS = ("CPU", "GPU", "memory")  # memory in bytes, as Ray counts it


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A group of equal actors that run at the same time.

    Attributes:
        role: what they are called in messages.
        num_actors: how many.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each.
        keys: config keys that decide it, named in the cure.
        memory: bytes of main memory that each reserves; 0 reserves none.
        memory_keys: config keys that decide that.
        spare_cpus: CPUs that must stay free for tasks beside the actors: Ray Data's reads and writes ask for one, and
            actors that hold every CPU while they wait for rows wait for ever.
    """

    role: str
    num_actors: int
    num_cpus: float
    num_gpus: float
    keys: str
    spare_cpus: float = 0
    memory: float = 0
    memory_keys: str = ""

    def each(self, resource: str) -> float:
        """CPUs ("CPU"), GPUs ("GPU") or bytes ("memory") of one actor."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory}[resource]

    def total(self, resource: str) -> float:
        """CPUs ("CPU"), GPUs ("GPU") or bytes ("memory") of the whole group."""
        return self.num_actors * self.each(resource)

    def cure(self, resource: str) -> str:
        """Config keys that decide how much of a resource is asked for."""
        return self.memory_keys if resource == "memory" else self.keys


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourcePlan:
    """What the phases of a run ask for; phases follow each other, so the cluster must hold the largest.

    Attributes:
        features: actors that hold the reference model.
        training: training workers. The controller of Ray Train asks for no CPU.
        evaluation: actors that answer and judge, each as large as a feature actor. Their rows come from the driver.
        online: sampling engines and the scorer, which exist beside the training workers; empty for stored pairs.
    """

    features: Demand
    training: Demand
    evaluation: Demand
    online: tuple[Demand, ...] = ()

    @classmethod
    def from_config(cls, config: RunConfig) -> ResourcePlan:
        """The plan of a configuration."""
        return cls(
            features=Demand(
                role="feature actor",
                num_actors=config.features.num_actors,
                num_cpus=config.features.cpus_per_actor,
                num_gpus=config.features.gpus_per_actor,
                keys="features.num_actors, features.cpus_per_actor or features.gpus_per_actor",
                spare_cpus=1,
            ),
            training=Demand(
                role="training worker",
                num_actors=config.resources.num_workers,
                num_cpus=config.resources.cpus_per_worker,
                num_gpus=config.resources.gpus_per_worker,
                keys="resources.num_workers, resources.cpus_per_worker or resources.gpus_per_worker",
            ),
            evaluation=Demand(
                role="evaluation actor",
                num_actors=config.evaluate.num_actors,
                num_cpus=config.features.cpus_per_actor,
                num_gpus=config.features.gpus_per_actor,
                keys="evaluate.num_actors, features.cpus_per_actor or features.gpus_per_actor",
            ),
            online=() if config.train.method == "offline" else _online_demands(config),
        )

    @property
    def demands(self) -> tuple[Demand, ...]:
        """All groups, in the order of the phases."""
        return self.features, self.training, self.evaluation, *self.online

    @property
    def training_devices(self) -> dict[str, float]:
        """Devices that are held while the policy trains, samplers and scorer included, by kind ("cpu", "gpu")."""
        groups = (self.training, *self.online)
        held = {kind: sum(group.total(kind.upper()) for group in groups) for kind in ("cpu", "gpu")}
        return {kind: amount for kind, amount in held.items() if amount}


def describe_demand(plan: ResourcePlan) -> list[str]:
    """One line per group of actors, in the order of the phases, and what exists at the same time.

    Args:
        plan: what will be asked for.
    """
    width = max(len(demand.role) for demand in plan.demands)
    lines = []
    for demand in plan.demands:
        each = _amount({name: demand.each(name) for name in KINDS})
        total = _amount({name: demand.total(name) for name in KINDS})
        spare = f", and {demand.spare_cpus:g} CPU for the tasks that feed them" if demand.spare_cpus else ""
        lines.append(f"{demand.role:<{width}}  {demand.num_actors} x ({each}) = {total}{spare}")
    if plan.online:
        groups = (plan.training, *plan.online)
        total = _amount({name: sum(demand.total(name) for demand in groups) for name in ("CPU", "GPU")})
        lines.append(f"{' + '.join(demand.role for demand in groups)} at the same time = {total}")
    return lines


def describe_supply(nodes: Sequence[Resources]) -> list[str]:
    """One line per shape of node, the most frequent first, and their sum.

    Args:
        nodes: resources of each living node.
    """
    devices = [{name: node.get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes]
    shapes = Counter(_amount(node) for node in devices)
    total = _amount({name: sum(node[name] for node in devices) for name in ("CPU", "GPU")})
    return [f"{num} node(s) of {shape}" for shape, num in shapes.most_common()] + [f"in total {total}"]


def _amount(resources: Resources) -> str:
    """Resources for people, "2 CPU + 1 GPU + 3.5 GiB"; GPUs and memory are left out where there are none."""
    shown = [f"{resources.get('CPU', 0.0):g} CPU"]
    shown += [_number(name, resources[name], unit=True) for name in ("GPU", "memory") if resources.get(name)]
    return " + ".join(shown)


def _number(resource: str, amount: float, *, unit: bool = False) -> str:
    """An amount of a resource for people; that of memory always has its unit."""
    if resource == "memory":
        return f"{amount / 2**30:.1f} GiB"
    return f"{amount:g} {resource}" if unit else f"{amount:g}"


def _supply(resource: str, there: Resources) -> float:
    """What a node or cluster has; memory that nobody stated is no limit."""
    return there.get(resource, math.inf if resource == "memory" else 0.0)


def check_plan(plan: ResourcePlan, cluster: Resources, nodes: Sequence[Resources] = ()) -> None:
    """Compare a plan with what a cluster has.

    Args:
        plan: what will be asked for.
        cluster: total resources, as `ray.cluster_resources()` gives them.
        nodes: resources of each living node; when given, the actors must also fit onto nodes, since one actor cannot
            be spread over two.

    Raises:
        ResourceError: naming the group, what it asks for, what there is, and the config keys to change.
    """
    for demand in plan.demands:
        check_demand(demand, cluster, nodes)
    if plan.online:
        check_together((plan.training, *plan.online), cluster, nodes)


def check_together(demands: Sequence[Demand], cluster: Resources, nodes: Sequence[Resources] = ()) -> None:
    """Compare groups that exist at the same time with what a cluster has.

    Raises:
        ResourceError: naming every group's share of the sum, or that no way of placing them on the nodes exists.
    """
    for resource in KINDS:
        asked, there = sum(demand.total(resource) for demand in demands), _supply(resource, cluster)
        if asked > there + 1e-9:
            holders = [demand for demand in demands if demand.total(resource)]
            shares = " + ".join(
                f"{demand.num_actors} {demand.role}(s) x {_number(resource, demand.each(resource))}"
                for demand in holders
            )
            raise ResourceError(
                f"{shares} = {_number(resource, asked, unit=True)} at the same time, the cluster has "
                f"{_number(resource, there)}; lower {'; '.join(demand.cure(resource) for demand in holders)} "
                "(fractions are allowed for CPUs), or add nodes"
            )
    if nodes and not can_place(demands, nodes):
        asked_for = " + ".join(
            f"{demand.num_actors} {demand.role}(s) of {_amount({name: demand.each(name) for name in KINDS})}"
            for demand in demands
        )
        supply = "; ".join(describe_supply(nodes)[:-1])
        if any(demand.memory for demand in demands) and all("memory" in node for node in nodes):
            supply += f" with {', '.join(_number('memory', node['memory']) for node in nodes)}"
        raise ResourceError(
            f"{asked_for} at the same time do not fit onto the nodes ({supply}): the "
            "sum would, but no actor is spread over two nodes; lower "
            f"{'; '.join(demand.keys for demand in demands)}, or add larger nodes"
        )


def can_place(demands: Sequence[Demand], nodes: Sequence[Resources]) -> bool:
    """Whether empty nodes can hold all actors of all groups at once, exactly.

    The numbers of actors placed so far, group by group, are followed from node to node; of two ways in which one has
    placed no fewer of any group, only that one is kept.

    Args:
        demands: groups that exist at the same time.
        nodes: resources of each node.
    """
    target = tuple(demand.num_actors for demand in demands)
    reached = {tuple(0 for _ in demands)}
    for node in sorted(nodes, key=lambda node: -node.get("GPU", 0.0)):
        loads = _loads(demands, node)
        reached = _best(
            tuple(min(have + more, limit) for have, more, limit in zip(state, load, target, strict=True))
            for state in reached
            for load in loads
        )
        if target in reached:
            return True
    return target in reached


def _loads(demands: Sequence[Demand], node: Resources) -> set[tuple[int, ...]]:
    """The ways to fill an empty node: actors of each group."""
    ranges = [range(min(demand.num_actors, _slots(demand, node)) + 1) for demand in demands]

    def fits(load: tuple[int, ...]) -> bool:
        pairs = list(zip(load, demands, strict=True))
        return all(
            sum(num * demand.each(name) for num, demand in pairs) <= _supply(name, node) + 1e-9 for name in KINDS
        )

    return _best(load for load in itertools.product(*ranges) if fits(load))


def _best(states: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Those that no other one equals or exceeds in every place."""
    kept: list[tuple[int, ...]] = []
    for state in sorted(set(states), key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(other, state, strict=True)) for other in kept):
            kept.append(state)
    return set(kept)


def check_demand(demand: Demand, cluster: Resources, nodes: Sequence[Resources] = ()) -> None:
    """`check_plan` for one group.

    Raises:
        ResourceError: the group does not fit.
    """
    for resource in KINDS:
        asked, there = demand.total(resource), _supply(resource, cluster)
        if asked > there + 1e-9:
            each, whole = (_number(resource, amount, unit=True) for amount in (demand.each(resource), asked))
            raise ResourceError(
                f"{demand.num_actors} {demand.role}(s) x {each} ask for {whole}, the cluster has "
                f"{_number(resource, there)}; lower {demand.cure(resource)}, or add nodes"
            )
    if demand.spare_cpus and demand.total("CPU") + demand.spare_cpus > cluster.get("CPU", 0.0) + 1e-9:
        raise ResourceError(
            f"{demand.num_actors} {demand.role}(s) x {demand.num_cpus:g} CPU leave less than {demand.spare_cpus:g} of "
            f"the cluster's {cluster.get('CPU', 0.0):g} CPU to the tasks that read and write their rows, which would "
            f"wait for ever; lower {demand.keys} (fractions are allowed), or start Ray with more CPUs"
        )
    if nodes:
        slots = sum(_slots(demand, node) for node in nodes)
        if slots < demand.num_actors:
            names = [name for name in KINDS if name != "memory" or demand.memory]
            asked_for = " + ".join(_number(name, demand.each(name), unit=True) for name in names)
            shapes = (" + ".join(_number(name, _supply(name, node), unit=True) for name in names) for node in nodes)
            keys = " or ".join(dict.fromkeys([demand.keys, *filter(None, [demand.memory_keys])]))
            raise ResourceError(
                f"{demand.num_actors} {demand.role}(s) of {asked_for} do not fit onto the nodes ({', '.join(shapes)}): "
                f"only {slots} can be placed; lower {keys}, or add larger nodes"
            )


def _online_demands(config: RunConfig) -> tuple[Demand, Demand]:
    sampler = config.sampler
    return (
        Demand(
            role="sampling engine",
            num_actors=sampler.num_engines,
            num_cpus=sampler.cpus_per_engine,
            num_gpus=sampler.gpus_per_engine,
            keys="sampler.num_engines, sampler.cpus_per_engine or sampler.gpus_per_engine",
            memory=engine_memory(config),
            memory_keys="sampler.num_engines or sampler.cache_mib",
        ),
        Demand(
            role="scorer",
            num_actors=1,
            num_cpus=sampler.scorer_cpus,
            num_gpus=sampler.scorer_gpus,
            keys="sampler.scorer_cpus or sampler.scorer_gpus",
        ),
    )


def _slots(demand: Demand, node: Resources) -> int:
    """How many actors of a group an empty node holds."""
    asked = {name: demand.each(name) for name in KINDS if demand.each(name) > 0}
    # the small term keeps 3 x 0.1 from exceeding 0.3
    fits = [_supply(name, node) / amount + 1e-9 for name, amount in asked.items()]
    return int(min(fits, default=demand.num_actors))
