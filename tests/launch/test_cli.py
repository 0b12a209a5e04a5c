"""The command line: what it prints, how it fails, and how fast it answers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import CONFIGS, main
from raylign.config import load_config


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_print_config_is_yaml_that_loads_back(tmp_path):
    result = run("align", "--print-config", "train.objective=rdpo", "train.beta=0.2")
    assert result.exit_code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(result.output)
    config = load_config(path)
    assert (config.train.objective, config.train.beta) == ("rdpo", 0.2)


def test_typo_exits_2_and_names_the_nearest_key():
    result = run("align", "train.betta=0.2")
    assert result.exit_code == 2
    assert "did you mean train.beta?" in result.output
    assert "Traceback" not in result.output


def test_missing_config_file_exits_2():
    result = run("check", "--config", "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml" in result.output


def test_missing_data_exits_1_and_names_the_path(tmp_path):
    result = run("check", f"data.path={tmp_path / 'absent.jsonl'}")
    assert result.exit_code == 1
    assert "absent.jsonl" in result.output
    assert "Traceback" not in result.output


def test_model_without_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run("check", f"policy.model={tmp_path}")
    assert result.exit_code == 1
    assert "ModelError" in result.output
    assert str(tmp_path) in result.output


def test_check_of_the_embedded_default_passes():
    result = run("check")
    assert result.exit_code == 0, result.output
    assert "demand   training worker   1 x (1 CPU) = 1 CPU\n" in result.output
    assert result.output.endswith("ok\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load_by_bare_name(path):
    command = "check" if {"compare", "calibrate"} & set(yaml.safe_load(path.read_text())) else "align"
    result = run(command, "--config", path.name, "--print-config")
    assert result.exit_code == 0, result.output
    for document in yaml.safe_load_all(result.output):
        assert document["train"]["objective"] if "objective" in document["train"] else document["policy_gradient"]


def test_data_inspect_shows_masks():
    result = run("data", "inspect", "--rows", "1")
    assert result.exit_code == 0, result.output
    assert "chosen" in result.output
    assert "rejected" in result.output


def test_align_refuses_a_directory_in_use(tmp_path):
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("")
    result = run("align", "run.name=busy", f"run.storage={tmp_path}")
    assert result.exit_code == 1
    assert "OutputExistsError" in result.output
    assert "run.resume=true" in result.output


@pytest.mark.parametrize("verb", ["align", "compare", "calibrate", "check", "data", "evaluate", "env", "assets"])
def test_every_verb_has_help(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0


def test_module_form_works_for_ray_job_entrypoints():
    out = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "raylign" in out.stdout
