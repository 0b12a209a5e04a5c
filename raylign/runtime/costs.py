"""What a run reserves in each of its phases, and the ledger that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raylign.config import RunConfig
from raylign.cost.ledger import Ledger
from raylign.cost.rows import Cost, read_ledger
from raylign.runtime.phases import digest
from raylign.runtime.resources import Demand, ResourcePlan, Resources

LEDGER_DIR = "ledger"
_ACCELERATOR = "accelerator_type:"  # Ray's resource that names the GPUs of a node


def open_ledger(config: RunConfig, directory: Path, cluster: Resources) -> Ledger:
    """The ledger of a run, in `ledger/` of its directory; a resumed run goes on with it.

    Args:
        config: of the run.
        directory: of the run.
        cluster: total resources, as `ray.cluster_resources()` gives them.
    """
    kind = gpu_kind(cluster)
    return Ledger(
        directory / LEDGER_DIR,
        run=config.run.name,
        method=config.train.method,
        fingerprint=cost_fingerprint(config, kind),
        kinds={"gpu": kind},
    )


def record_reuse(ledger: Ledger, phase: str, made: tuple[str, Cost] | None, *, key: str) -> None:
    """Say in a run's ledger what an artefact that it found ready had cost, unless the run made it itself.

    Args:
        ledger: of the run.
        phase: that makes the artefact.
        made: ledger entry that made it, and what it cost; None when nobody knows.
        key: of the artefact.
    """
    if made is not None and made[0] not in {row.id for row in read_ledger(ledger.directory)}:
        ledger.reuse(phase, made[1], key=key)


def gpu_kind(cluster: Resources) -> str:
    """The cluster's GPUs by name, for example "H200"; "gpu" when it has none, several kinds, or does not say."""
    kinds = [name.removeprefix(_ACCELERATOR) for name in cluster if name.startswith(_ACCELERATOR)]
    return kinds[0] if len(kinds) == 1 else "gpu"


def cost_fingerprint(config: RunConfig, kind: str) -> str:
    """Hash of what two runs must share before their costs are compared: model, number types, data, devices, workers.

    What differs between methods by design is not in it.

    Args:
        config: of the run.
        kind: of its GPUs.
    """
    return digest(
        {
            "policy": config.policy.model_dump(),
            "data": config.data.model_dump(exclude={"max_bad_fraction"}),
            "parallel": config.train.parallel,
            "resources": config.resources.model_dump(exclude={"start_timeout_s"}),
            "gpu": kind,
        }
    )


def phase_devices(plan: ResourcePlan, cluster: Resources, *, driver_cpus: int) -> dict[str, Mapping[str, float]]:
    """Devices that each phase keeps others from using, by kind ("cpu", "gpu").

    The tasks of ingest, cost and rank take whatever CPUs are free, so these phases are charged with all of the
    cluster's: an upper bound. Feature actors come with the CPU that reads and writes for them. Tasks that fit members,
    and actors that score and price texts, have entries of their own inside reward and cost.

    Args:
        plan: of the run.
        cluster: total resources.
        driver_cpus: threads that the driver computes with, which Ray does not know of.
    """
    tasks = {"cpu": cluster.get("CPU", 0.0)}
    return {
        "ingest": tasks,
        "features": _held(plan.features) | {"cpu": plan.features.total("CPU") + plan.features.spare_cpus},
        "reward": {"cpu": float(driver_cpus)},
        "cost": tasks,
        "rank": tasks,
        "train": plan.training_devices,
        "evaluate": _held(plan.evaluation),
    }


def _held(demand: Demand) -> dict[str, float]:
    held = {"cpu": demand.total("CPU"), "gpu": demand.total("GPU")}
    return {kind: amount for kind, amount in held.items() if amount}
