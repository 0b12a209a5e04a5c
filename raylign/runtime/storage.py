"""Storage of a run on a cluster: refused where a job would lose it, and looked for from every node beforehand."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylign.errors import ConfigError, ResourceError

_PROBE_TIMEOUT_S = 60.0  # a node starts a worker process, and perhaps unpacks the job's files first


def check_job_storage(storage: str) -> None:
    """Refuse a relative `run.storage` for a job.

    Raises:
        ConfigError: it would lie in a directory that Ray makes for the job and removes later.
    """
    if not Path(storage).expanduser().is_absolute():
        raise ConfigError(
            f"run.storage={storage} is relative: inside a job that is a copy of the working directory on one node, "
            "which Ray removes when it needs the room; name storage that every node sees, for example "
            "run.storage=/shared/runs"
        )


def is_in_job_copy(environment: Mapping[str, str]) -> bool:
    """Whether this process is the entrypoint of a Ray job that was shipped a working directory.

    Args:
        environment: of the process; the job server describes the job in it.
    """
    job = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return "working_dir" in job.get("runtime_env", {})


def check_visible(storage: Path, inputs: Mapping[str, str], nodes: Mapping[str, str]) -> None:
    """Look from every node at a file that this process writes below `storage`, and at what the run reads.

    Args:
        storage: `run.storage`, absolute; made when it is not there.
        inputs: local paths that tasks and actors read, by config key.
        nodes: address by Ray's id of the nodes to look from.

    Raises:
        ConfigError: a node does not see one of them.
        ResourceError: a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not nodes:
        return
    storage.mkdir(parents=True, exist_ok=True)
    probe = storage / f".raylign-probe-{uuid.uuid4().hex}"
    probe.write_text("", encoding="utf-8")
    paths = {"run.storage": str(probe)} | dict(inputs)
    look = ray.remote(num_cpus=0, max_retries=0)(_missing)
    try:
        asked = {
            node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths)
            for node in nodes
        }
        answers: dict[str, list[str]] = {
            node: _answer(ref, nodes[node], timeout_s=_PROBE_TIMEOUT_S) for node, ref in asked.items()
        }
    finally:
        probe.unlink()
    report = missing_report(answers, {"run.storage": str(storage)} | dict(inputs), nodes)
    if report is not None:
        raise ConfigError(report)


def missing_report(
    missing: Mapping[str, Sequence[str]], paths: Mapping[str, str], nodes: Mapping[str, str]
) -> str | None:
    """One sentence on what which nodes do not see; None when they see everything.

    Args:
        missing: config keys of unseen paths, by node.
        paths: by config key.
        nodes: address of each node.
    """
    blind = {key: [nodes[node] for node, keys in missing.items() if key in keys] for key in paths}
    shown = [f"{key}={paths[key]} by {', '.join(sorted(addresses))}" for key, addresses in blind.items() if addresses]
    if not shown:
        return None
    return f"not seen: {'; '.join(shown)}; put it on storage that every node of the cluster mounts at the same path"


def _missing(paths: Mapping[str, str]) -> list[str]:
    """Keys of the paths that do not exist where this runs."""
    return [key for key, path in paths.items() if not Path(path).exists()]


def _answer(reference: Any, address: str, *, timeout_s: float) -> list[str]:
    import ray

    try:
        answer: list[str] = ray.get(reference, timeout=timeout_s)
        return answer
    except ray.exceptions.GetTimeoutError as error:
        raise ResourceError(
            f"node {address} did not start a task within {timeout_s:g} s; see `ray status` and that node's logs"
        ) from error
    except ray.exceptions.RayError as error:
        raise ResourceError(f"node {address} cannot run a task: {str(error).strip().splitlines()[-1]}") from error
