"""The cluster manifests: fields, commands and resources are what Ray, KubeRay, Slurm and raylign take.

No Kubernetes or Slurm runs here; the Slurm script runs with stand-ins for srun, scontrol, ray and raylign.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

import raylign
from launch.cli import main
from launch.job_target import ENTRYPOINT, parse_target
from raylign.errors import ResourceError
from raylign.runtime.resources import ResourcePlan, check_plan
from raylign.runtime.storage import check_job_storage

ROOT = Path(raylign.__file__).parents[1]
CLUSTERS = ROOT / "launch" / "clusters"
RAYJOBS = sorted(CLUSTERS.glob("rayjob-*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def object_of(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required.split(),
    }


TEXT, COUNT, FLAG = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
AMOUNTS = object_of(
    "cpu memory",
    cpu={"type": "string", "pattern": r"^\d+$"},
    memory={"type": "string", "pattern": r"^\d+Gi$"},
    **{"nvidia.com/gpu": {"type": "string", "pattern": r"^\d+$"}},
)


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = object_of(
    "name image resources volumeMounts",
    name=TEXT,
    image=TEXT,
    envFrom=list_of(object_of("secretRef", secretRef=object_of("name", name=TEXT, optional=FLAG))),
    ports=list_of(object_of("containerPort name", containerPort=COUNT, name=TEXT)),
    resources=object_of("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=list_of(object_of("name mountPath", name=TEXT, mountPath=TEXT)),
)
VOLUME = object_of(
    "name",
    name=TEXT,
    persistentVolumeClaim=object_of("claimName", claimName=TEXT),
    emptyDir=object_of("", medium={"enum": ["", "Memory"]}, sizeLimit=TEXT),
)
TEMPLATE = object_of(
    "spec", spec=object_of("containers volumes", containers=list_of(CONTAINER), volumes=list_of(VOLUME))
)
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
RAYJOB = object_of(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=object_of("name", name={"type": "string", "pattern": "^[a-z0-9-]{1,47}$"}),
    spec=object_of(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=object_of(
            "rayVersion headGroupSpec workerGroupSpecs",
            rayVersion=TEXT,
            authOptions=object_of("mode", mode={"enum": ["token", "disabled"]}),
            headGroupSpec=object_of("rayStartParams template", rayStartParams=PARAMETERS, template=TEMPLATE),
            workerGroupSpecs=list_of(
                object_of(
                    "groupName replicas minReplicas maxReplicas rayStartParams template",
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=PARAMETERS,
                    template=TEMPLATE,
                )
            ),
        ),
    ),
)


def groups(job: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Head and worker groups with their numbers of pods."""
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"], 1
    for group in cluster["workerGroupSpecs"]:
        yield group, group["replicas"]


def nodes_of(job: dict[str, Any]) -> list[dict[str, float]]:
    """Resources that KubeRay gives to `ray start`: the container's limits, unless rayStartParams say otherwise."""
    nodes = []
    for group, replicas in groups(job):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        cpus = group["rayStartParams"].get("num-cpus", limits["cpu"])
        nodes += [{"CPU": float(cpus), "GPU": float(limits.get("nvidia.com/gpu", 0))}] * replicas
    return nodes


def arguments_of(job: dict[str, Any]) -> list[str]:
    words = shlex.split(job["spec"]["entrypoint"])
    assert tuple(words[:3]) == ENTRYPOINT
    return words[3:]


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda p: p.name)
def test_rayjobs_have_the_fields_of_kuberay(path: Path) -> None:
    job = load(path)
    jsonschema.validate(job, RAYJOB)
    cluster = job["spec"]["rayClusterSpec"]
    [pin] = [item for item in PROJECT["dependencies"] if item.startswith("ray[")]
    assert f">={cluster['rayVersion'].rpartition('.')[0]}," in pin
    assert cluster["authOptions"]["mode"] == "token"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]  # the plan is checked at the start
    for group, _ in groups(job):
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert container["image"].partition(":")[2].startswith(PROJECT["version"])


def test_the_schema_refuses_what_it_does_not_know() -> None:
    job = load(RAYJOBS[0])
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(job, RAYJOB)


@pytest.mark.parametrize("path", RAYJOBS, ids=lambda p: p.name)
def test_rayjobs_run_a_command_whose_plan_fits_their_nodes(path: Path) -> None:
    job = load(path)
    arguments = arguments_of(job)
    printed = CliRunner().invoke(main, [*arguments, "--print-config"])
    assert printed.exit_code == 0, printed.output
    [config] = parse_target(main, arguments, root=ROOT).configs
    nodes = nodes_of(job)
    total = {name: sum(node[name] for node in nodes) for name in ("CPU", "GPU")}
    plan = ResourcePlan.from_config(config)
    check_plan(plan, total, nodes)
    with pytest.raises(ResourceError):
        check_plan(plan, nodes[0], nodes[:1])  # the head alone
    assert (config.run.resume, job["spec"]["backoffLimit"] > 0) == (True, True)  # a retry is another pod, same storage
    check_job_storage(config.run.storage)
    paths = [config.run.storage, config.policy.model, config.data.path, config.evaluate.judge]
    for group, _ in groups(job):
        mounts = [mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]]
        for value in paths:
            assert not value.startswith("/") or any(value.startswith(f"{mount}/") for mount in mounts), value


# what ssh and Slurm start


def ray_start(words: list[str]) -> dict[str, Any]:
    """Options of a `ray start` line, by Ray's own parser."""
    from ray.scripts.scripts import start

    assert words[:2] == ["ray", "start"]
    with start.make_context("start", words[2:], resilient_parsing=False) as context:
        return dict(context.params)


def without_variables(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables before a command, and the command."""
    words = shlex.split(command)
    first = next(i for i, word in enumerate(words) if not re.match(r"^[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def test_the_ray_cluster_is_one_to_ray_itself() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    path = CLUSTERS / "ray-cluster.yaml"
    config = prepare_config(load(path))
    validate_config(config)
    workers = len(config["provider"]["worker_ips"])
    [kind] = config["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"], config["max_workers"]) == (workers, workers, workers)
    variables, words = without_variables(config["head_start_ray_commands"][-1])
    head = ray_start(words)
    assert (head["head"], head["dashboard_host"], variables["RAY_AUTH_MODE"]) == (True, "127.0.0.1", "token")
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    joining, words = without_variables(config["worker_start_ray_commands"][-1])
    worker = ray_start(words)
    assert (worker["address"], joining) == (f"$RAY_HEAD_IP:{head['port']}", variables)
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_the_ray_cluster_names_a_submission_that_is_accepted() -> None:
    lines = (CLUSTERS / "ray-cluster.yaml").read_text().splitlines()
    [line] = [line.lstrip("# ") for line in lines if "raylign submit" in line]
    words = shlex.split(line)
    result = CliRunner().invoke(main, ["submit", "--dry-run", "--working-dir", str(CLUSTERS), *words[2:]])
    assert result.exit_code == 0, result.output


STAND_INS = {
    "scontrol": "printf 'node1\\nnode2\\nnode3\\n'",
    "hostname": "echo 127.0.0.2 172.17.0.1",
    # runs a command as srun would, and says where
    "srun": """
while [[ $1 == --* ]]; do options="${options:-} $1"; shift; done
echo "srun$options: $*" >>log
exec "$@" """,
    "ray": """
echo "ray $* (token $(stat -c %a "$RAY_AUTH_TOKEN_PATH"), $RAY_AUTH_MODE, ${RAY_ADDRESS-no address})" >>log
if [[ $* == *"start --head"* ]]; then
  [[ -z ${DEAF:-} ]] || exec sleep 60
  exec python3 -c 'import os, socket, time
time.sleep(1)
head = socket.create_server(("127.0.0.2", int(os.environ["RAYLIGN_PORT"])))
time.sleep(1)
dashboard = socket.create_server(("127.0.0.1", int(os.environ["RAYLIGN_DASHBOARD_PORT"])))
while True: dashboard.accept()'
fi
if [[ $1 == start ]]; then
  (exec 3<>"/dev/tcp/127.0.0.2/$RAYLIGN_PORT") && echo "found the head" >>log
  exec sleep 60
fi""",
    "raylign": """
echo "raylign $*" >>log
cp "$RAY_AUTH_TOKEN_PATH" seen
touch submitted
[[ -z ${SLEEP:-} ]] || exec sleep "$SLEEP"
exit 3""",
}


@pytest.fixture
def allocation(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory with stand-ins, and the variables of a Slurm job that runs in it."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    with socket.create_server(("127.0.0.2", 0)) as free, socket.create_server(("127.0.0.1", 0)) as also_free:
        port, dashboard = free.getsockname()[1], also_free.getsockname()[1]
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "12",
        "RAYLIGN_ENV": "HF_TOKEN",
        "RAYLIGN_PORT": str(port),
        "RAYLIGN_DASHBOARD_PORT": str(dashboard),
        "RAY_ADDRESS": "of another cluster",
    }
    return tmp_path, environment


def slurm(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    script = CLUSTERS / "slurm.sh"
    return subprocess.Popen(
        ["bash", str(script), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_slurm_starts_every_node_submits_to_the_head_and_ends_with_the_jobs_code(
    allocation: tuple[Path, dict[str, str]],
) -> None:
    directory, environment = allocation
    process = slurm(environment, "align", "--config", "my file.yaml")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    log = (directory / "log").read_text()
    starts = {
        where: ray_start(shlex.split(command))
        for where, command in re.findall(r"^srun(.*?): (ray start .*)$", log, re.MULTILINE)
    }
    (head_where, head), (others_where, others) = sorted(starts.items(), key=lambda item: "--exclude" in item[0])
    assert "--nodelist=node1" in head_where and "--nodes=2" in others_where and "--exclude=node1" in others_where
    assert "--cpus-per-task=12" in head_where and "--cpus-per-task=12" in others_where
    assert (head["head"], head["node_ip_address"], head["dashboard_host"]) == (True, "127.0.0.2", "127.0.0.1")
    assert (others["address"], others["num_cpus"], head["num_cpus"]) == (f"127.0.0.2:{head['port']}", 12, 12)
    assert log.count("(token 600, token, no address)") == 2
    assert "found the head" in log
    [submitted] = [line for line in log.splitlines() if line.startswith("raylign")]
    assert submitted.endswith(
        f"--address http://127.0.0.1:{environment['RAYLIGN_DASHBOARD_PORT']} --wait 300 --submission-id raylign-77 "
        "--env HF_TOKEN -- align --config my file.yaml"
    )
    assert len((directory / "seen").read_text()) == 64
    assert not list(directory.glob(".raylign-token*"))


def test_slurm_stops_the_job_when_its_time_is_over(allocation: tuple[Path, dict[str, str]]) -> None:
    directory, environment = allocation
    process = slurm(environment | {"SLEEP": "60"}, "align")
    for _ in range(300):
        if (directory / "submitted").exists():
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert "job stop --address" in (directory / "log").read_text()
    assert not list(directory.glob(".raylign-token*"))


def test_slurm_gives_up_on_a_head_that_does_not_listen(allocation: tuple[Path, dict[str, str]]) -> None:
    process = slurm(allocation[1] | {"DEAF": "1", "RAYLIGN_HEAD_START_S": "1"}, "align")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"does not listen on 127.0.0.2:{allocation[1]['RAYLIGN_PORT']} after 1 s; raise RAYLIGN_HEAD_START_S" in out
    assert (allocation[0] / "log").read_text().count("ray start") == 2  # srun and the head's own line


def test_slurm_without_a_command_says_what_to_give(allocation: tuple[Path, dict[str, str]]) -> None:
    process = slurm(allocation[1])
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, "give a command of raylign" in out) == (2, True)


def test_the_image_is_of_the_pinned_ray_and_of_extras_that_exist() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    versions = {load(path)["spec"]["rayClusterSpec"]["rayVersion"] for path in RAYJOBS}
    assert set(re.findall(r"RAY=(\d+\.\d+\.\d+)-", text)) == versions
    named = {extra for group in re.findall(r"EXTRAS=([\w,]+)", text) for extra in group.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])
    for source in re.findall(r"^COPY --chown=\S+ (.*) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists()
