"""launch/setup.sh with a stand-in for Python, which says how pip is configured and notes what it is to install."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import raylign

SETUP = Path(raylign.__file__).parents[1] / "launch" / "setup.sh"
STAND_IN = """#!/bin/bash
case "$*" in
  *"config list"*) cat "$PIP_CONFIG" ;;
  *" install "*) echo "${@: -1} from ${PIP_EXTRA_INDEX_URL:-where pip looks}" >>"$LOG" ;;
esac
"""
TORCH = "https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("extras", "config", "source"),
    [
        ("cpu,wandb", "global.cert='/ca.crt'\n", TORCH),
        ("dev,cpu", "", TORCH),
        ("gpu,wandb", "", "where pip looks"),
        ("cpu", "global.index-url='https://mirror/simple'\nglobal.cert='/ca.crt'\n", "where pip looks"),
        ("cpu", ":env:.extra-index-url='file:///pypi'\n", "where pip looks"),
        ("cpu", ":env:.find-links='/wheels'\n", "where pip looks"),
    ],
)
def test_the_cpu_build_of_torch_comes_from_its_index_unless_one_is_configured(
    tmp_path: Path, extras: str, config: str, source: str
) -> None:
    for name, text in (
        ("launch/setup.sh", SETUP.read_text()),
        ("pyproject.toml", ""),
        (".venv/bin/python", STAND_IN),
        ("pip_config", config),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    python = tmp_path / ".venv/bin/python"
    python.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": str(python),
        "PIP_CONFIG": str(tmp_path / "pip_config"),
        "LOG": str(tmp_path / "log"),
    }
    setup = ["bash", str(tmp_path / "launch/setup.sh"), "--extras", extras]
    subprocess.run(setup, env=environment, check=True, timeout=20, capture_output=True)
    assert (tmp_path / "log").read_text() == f".[{extras}] from {source}\n"
