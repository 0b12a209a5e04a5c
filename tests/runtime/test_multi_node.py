"""A cluster of four nodes on this machine, and the online job submitted to its job server.

Real here: four raylets (a head without CPUs, two nodes of one CPU, one of two), the token, the job server, the upload,
and in the job Ray Data, a vLLM engine, the scorer and Ray Train. Made up: that all nodes share one file system.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raylign.config import load_config
from raylign.errors import ConfigError
from raylign.runtime.storage import check_visible
from raylign.runtime.trainer import _scaling

ROOT = Path(__file__).parents[2]
NODES = """
import signal, sys
from ray.cluster_utils import Cluster
head, *others = {nodes}
cluster = Cluster(initialize_head=True, head_node_args=dict(
    num_cpus=head, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port={port},
    dashboard_agent_listen_port={agent}, object_store_memory=200 * 2**20))
for index, cpus in enumerate(others):
    # nodes of one machine would remove each other's copies of the job's files
    cluster.add_node(num_cpus=cpus, runtime_env_dir_name=f"runtime_{{index}}")
cluster.wait_for_nodes()
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
cluster.shutdown()
"""
SMALL = {
    "data": {"max_pairs": 60},
    "features": {"num_actors": 2, "cpus_per_actor": 0.5, "layers": [6]},
    "reward": {"folds": 2, "epochs": 1},
    "train": {"method": "online_dpo", "batch_size": 4, "checkpoint_every": 1, "log_every": 1, "learning_rate": 1e-3},
    "online": {"num_rounds": 2, "prompts_per_round": 8, "num_samples": 2},
    # only the node of two CPUs holds the engine, with or without the scorer, and then no worker
    "sampler": {"cpus_per_engine": 1.5, "scorer_cpus": 0.4, "max_new_tokens": 12, "timeout_s": 120},
    "resources": {"num_workers": 2, "cpus_per_worker": 0.6, "placement": "spread"},
    "evaluate": {
        "num_prompts": 4,
        "max_new_tokens": 8,
        "drift_prompts": 4,
        "drift_candidates": 2,
        "bootstrap_samples": 100,
    },
}


@dataclass(frozen=True)
class Nodes:
    """A started cluster.

    Attributes:
        address: of its job server.
        environment: of a process that may talk to it.
    """

    address: str
    environment: dict[str, str]

    def submit(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """`raylign submit` in a process of its own."""
        command = [sys.executable, "-m", "launch.cli", "submit", "--address", self.address, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def places(self) -> dict[str, set[str]]:
        """Nodes on which tasks ran, by their name, and methods of actors, by their class; from the state API."""
        script = (
            "import json\nfrom ray.util import state\n"
            f"tasks = state.list_tasks(address={self.address!r}, limit=9000, timeout=60)\n"
            "print(json.dumps([(task.name, task.node_id) for task in tasks]))"
        )
        environment = self.environment | {"RAY_AUTH_MODE": "token"}
        out = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=90, check=True
        )
        found: dict[str, set[str]] = {}
        for name, node in json.loads(out.stdout):
            if node is not None:
                found.setdefault(name.partition(".")[0], set()).add(node)
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Four nodes with a token of their own; in a process of their own, beside whatever Ray this one has."""
    directory = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))  # paths of sockets are short
    token = directory / "token"
    token.write_text("0123456789abcdef" * 4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(directory),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", NODES.format(nodes=(0, 1, 1, 2), port=port, agent=free_port())],
        env=environment | {"RAY_AUTH_MODE": "token"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield Nodes(f"http://127.0.0.1:{port}", environment)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        finally:
            process.kill()
            process.communicate()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_refused_in_seconds(nodes: Nodes, tmp_path: Path) -> None:
    asked = ("resources.num_workers=2", "resources.cpus_per_worker=1.5", f"run.storage={tmp_path}")
    start = time.monotonic()
    done = nodes.submit("--", "align", *asked, timeout_s=60)
    assert done.returncode == 1
    assert "2 training worker(s) of 1.5 CPU + 0 GPU do not fit onto the nodes" in done.stderr
    assert "only 1 can be placed" in done.stderr
    for line in ("supply   2 node(s) of 1 CPU", "supply   1 node(s) of 2 CPU", "supply   in total 4 CPU"):
        assert line in done.stderr
    assert time.monotonic() - start < 30


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with this raylign in it, as a user would ship it."""
    directory = tmp_path_factory.mktemp("project")
    for package in ("raylign", "launch", "tuning"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.mark.ray
@pytest.mark.slow
def test_a_failed_job_passes_on_its_exit_code_and_its_reason(nodes: Nodes, project: Path, tmp_path: Path) -> None:
    arguments = ("--", "check", f"run.storage={tmp_path}", "data.path=/nowhere.jsonl")
    done = nodes.submit("--working-dir", str(project), *arguments, timeout_s=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed with exit code 1: DataNotFoundError" in done.stderr
    assert "/nowhere.jsonl" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_line_that_a_dry_run_prints_works_by_hand(nodes: Nodes, project: Path, tmp_path: Path) -> None:
    arguments = ("--dry-run", "--working-dir", str(project), "--", "check", f"run.storage={tmp_path}")
    line = nodes.submit(*arguments, timeout_s=60).stdout
    assert "ray job submit --address" in line
    done = subprocess.run(
        ["bash", "-c", line], env=nodes.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(540)
def test_workers_train_on_two_nodes_while_a_third_samples(nodes: Nodes, project: Path, tmp_path: Path) -> None:
    import yaml

    (project / "small.yaml").write_text(yaml.safe_dump(SMALL))
    storage = tmp_path / "shared"
    arguments = ("--config", str(project / "small.yaml"), f"run.storage={storage}", "run.name=job")
    done = nodes.submit("--working-dir", str(project), "--", "align", *arguments, timeout_s=480)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "note     raylign itself is shipped" in done.stderr
    assert "Attack success" in done.stdout
    assert (storage / "job" / "checkpoint" / "config.json").is_file()
    places = nodes.places()
    assert len(places["RayTrainWorker"]) == 2
    assert len(places["SamplerEngine"]) == 1
    assert not places["SamplerEngine"] & places["RayTrainWorker"]
    [extractors] = [found for name, found in places.items() if "FeatureExtractor" in name]
    assert len(extractors) == 2
    readers = [found for name, found in places.items() if name.startswith("Read")]
    assert len(set.union(*readers)) >= 2


@pytest.mark.parametrize(("placement", "strategy"), [("pack", "PACK"), ("spread", "SPREAD")])
def test_placement_is_ray_trains(placement: str, strategy: str) -> None:
    """The job above has workers of which a node holds only one, whatever the strategy."""
    config = load_config(values={"resources": {"num_workers": 2, "placement": placement}})
    assert _scaling(config).placement_strategy == strategy


@pytest.mark.ray
def test_a_path_that_a_node_does_not_see_is_told(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    here = {ray.get_runtime_context().get_node_id(): "10.0.0.7"}
    seen = tmp_path / "pairs.jsonl"
    seen.write_text("")
    check_visible(tmp_path / "runs", {"data.path": str(seen)}, here)
    assert list((tmp_path / "runs").iterdir()) == []
    with pytest.raises(ConfigError, match=r"not seen: policy\.model=/absent by 10\.0\.0\.7; put it on storage"):
        check_visible(tmp_path / "runs", {"data.path": str(seen), "policy.model": "/absent"}, here)
    assert list((tmp_path / "runs").iterdir()) == []
