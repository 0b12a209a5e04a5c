"""The layers of the design: what a module may import, measured by importing it in a fresh process."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import raylign

ROOT = Path(raylign.__file__).parent
HEAVY = ("ray", "vllm", "wandb", "transformers", "peft", "torch")


def loaded_after(*modules: str) -> set[str]:
    """Top-level heavy packages in sys.modules after importing `modules` in a fresh process."""
    code = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(m) for m in {list(modules)!r}]\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(out.stdout))


def submodules(*packages: str) -> list[str]:
    names = []
    for package in packages:
        names += [f"raylign.{package}.{m.name}" for m in pkgutil.iter_modules([str(ROOT / package)])]
    return names


def test_pure_layers_load_no_framework():
    modules = [*submodules("losses", "rewards", "constraints"), "raylign.types", "raylign.errors", "raylign.cost.flops"]
    assert len(modules) > 6
    assert loaded_after(*modules) <= {"torch"}


def test_config_types_and_cli_load_neither_torch_nor_ray():
    modules = (
        "raylign",
        "raylign.types",
        "raylign.errors",
        "raylign.config",
        "raylign.calibrate_config",
        "raylign.compare_config",
        "launch.cli",
    )
    assert loaded_after(*modules) == set()


def test_only_runtime_loads_ray():
    modules = submodules("data", "models", "training", "evaluation", "report", "cost")
    assert len(modules) > 15
    assert not loaded_after(*modules) & {"ray", "vllm", "wandb"}


@pytest.mark.parametrize(
    "package", ["data", "losses", "rewards", "constraints", "models", "training", "evaluation", "report", "cost"]
)
def test_lower_layers_do_not_name_upper_ones(package):
    """Also catches imports inside functions, which the process tests above cannot see."""
    upper = ("ray", "vllm", "wandb", "tuning", "launch", "raylign.runtime")
    for path in (ROOT / package).glob("*.py"):
        named = set(imported_names(path))
        assert not {n for n in named for u in upper if n == u or n.startswith(u + ".")}, path


def imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names
