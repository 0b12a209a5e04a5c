"""Storage of jobs, and what is said of nodes that do not see it; nodes that look are in `test_multi_node.py`."""

from __future__ import annotations

import pytest

from raylign.errors import ConfigError
from raylign.runtime.storage import check_job_storage, is_in_job_copy, missing_report


def test_a_relative_storage_is_refused_for_jobs() -> None:
    check_job_storage("/shared/runs")
    check_job_storage("~/runs")
    for storage in ("runs", "./runs", "../runs"):
        with pytest.raises(ConfigError, match=rf"run\.storage={storage} is relative: .*run\.storage=/shared/runs"):
            check_job_storage(storage)


def test_only_the_entrypoint_of_a_job_runs_in_a_copy() -> None:
    name = "RAY_JOB_CONFIG_JSON_ENV_VAR"
    assert is_in_job_copy({name: '{"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}'})
    assert not is_in_job_copy({name: '{"runtime_env": {"env_vars": {}}}'})  # nothing was shipped
    assert not is_in_job_copy({})


def test_every_unseen_path_is_told_with_the_nodes_that_miss_it() -> None:
    paths = {"run.storage": "/runs", "policy.model": "/models/a", "data.path": "/data/pairs.jsonl"}
    nodes = {"n1": "10.0.0.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}
    assert missing_report({"n1": [], "n2": [], "n3": []}, paths, nodes) is None
    assert missing_report({"n1": [], "n2": ["data.path"], "n3": ["run.storage", "data.path"]}, paths, nodes) == (
        "not seen: run.storage=/runs by 10.0.0.3; data.path=/data/pairs.jsonl by 10.0.0.2, 10.0.0.3; put it on storage "
        "that every node of the cluster mounts at the same path"
    )
