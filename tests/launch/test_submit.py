"""What `raylign submit` sends, refuses and prints, without a cluster; `tests/runtime/test_multi_node.py` has one."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from launch.job_log import Outcome
from launch.job_target import check_target, parse_target
from launch.submit import JobRequest, hand_variables, parse_env
from launch.upload import MAX_FILES, Upload, check_size, collect_upload
from raylign.errors import ConfigError, DataNotFoundError, SubmitError

SHARED = "run.storage=/shared/runs"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config, data, and what nobody wants to ship."""
    root = tmp_path / "project"
    for name, text in {
        "my.yaml": "train: {objective: dpo}\n",
        "pairs.jsonl": "{}\n",
        "secret.yaml": "train: {objective: ipo}\n",
        ".gitignore": "secret.yaml\n/ignored/\n",
        "runs/default/report.html": "old",
        ".venv/lib/big.py": "x" * 1000,
        ".git/objects/aa": "x",
        "raylign.egg-info/PKG-INFO": "x",
        "wandb/run": "x",
        ".raylign-token-17": "x",
        ".env": "KEY=x",
        ".env.local": "KEY=x",
        ".netrc": "x",
        ".git-credentials": "x",
        "sub/.ssh/config": "x",
        "sub/.ray/auth_token": "x",
        ".docker/config.json": "{}",
        ".cache/models/big": "x",
        "sub/cluster.pem": "x",
        "id_rsa.old": "x",
        "ignored/pairs.jsonl": "{}\n",
        "sub/dé.txt": "x",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.chdir(root)
    return root


def submit(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["submit", *arguments])


def request(upload: Upload, **changes: object) -> JobRequest:
    fields = {"address": "http://h:1", "entrypoint": ("python3", "-m", "x", "a b"), "upload": upload, "env": {}}
    return JobRequest(**(fields | changes))  # type: ignore[arg-type]


# what is shipped


def test_the_upload_is_what_ray_packs_to_the_byte(project: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    upload = collect_upload(project, ["sub/*.bin"])
    assert [name for name, _ in upload.files] == [".gitignore", "my.yaml", "pairs.jsonl", "sub/dé.txt"]
    package = tmp_path / "package.zip"
    excludes = [*get_runtime_env_default_excludes(), *upload.excludes]
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    assert package.stat().st_size == upload.num_bytes
    assert "sub/dé.txt" not in dict(collect_upload(project, ["sub/"]).files)


def test_too_large_an_upload_names_the_largest_files(project: Path) -> None:
    files = tuple((f"data/{i}.bin", i * 2**20) for i in range(1, 15))
    check_size(Upload(root=project, excludes=(), files=files[:13]))  # 91 MiB
    with pytest.raises(
        SubmitError, match=r"105\.0 MiB from .*less than 100 MiB\. Largest are data/14\.bin \(14\.0 MiB"
    ):
        check_size(Upload(root=project, excludes=(), files=files))


def test_a_home_directory_is_not_walked_to_its_end(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.upload.MAX_FILES", 3)
    with pytest.raises(SubmitError, match="more than 3 files"):
        collect_upload(project, [])
    assert MAX_FILES > 1000


def test_a_missing_working_directory_is_named() -> None:
    result = submit("--working-dir", "/nowhere", "--dry-run", "--", "align", SHARED)
    assert (result.exit_code, "/nowhere" in result.output) == (1, True)


# what runs


def parsed(project: Path, *arguments: str) -> tuple[str, ...]:
    target = parse_target(main, arguments, root=project)
    check_target(target, collect_upload(project, []))
    return target.entrypoint


def test_the_command_is_the_module_form(project: Path) -> None:
    entrypoint = parsed(project, "align", "--config", "my.yaml", SHARED, "train.beta=0.2")
    assert entrypoint == ("python3", "-m", "launch.cli", "align", "--config", "my.yaml", SHARED, "train.beta=0.2")


def test_a_config_is_named_as_it_lies_in_the_working_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "sub")
    for written in (["--config", "../my.yaml"], ["--config=../my.yaml"], ["--config", str(project / "my.yaml")]):
        assert "my.yaml" in " ".join(parsed(project.resolve(), "align", *written, SHARED)).replace("=", " ").split()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["align", "--config", "../outside.yaml", SHARED],
            ConfigError,
            r"not in the working directory .*--working-dir",
        ),
        (
            ["align", "--config", "secret.yaml", SHARED],
            ConfigError,
            r"would not be shipped: \.gitignore.*!secret\.yaml",
        ),
        (["align", "--config", "absent.yaml", SHARED], ConfigError, r"cannot read config file absent\.yaml"),
        (["align", "--config", "my.yaml"], ConfigError, r"run\.storage=runs is relative.*run\.storage=/shared/runs"),
        (["align", SHARED, "train.betta=1"], ConfigError, r"did you mean train\.beta"),
        (["align", SHARED, "data.path=other.jsonl"], DataNotFoundError, r"data\.path=other\.jsonl is not in the work"),
        (["align", SHARED, "data.path=ignored/*.jsonl"], DataNotFoundError, r"is left out of the upload"),
        (["align", SHARED, "policy.model=./model"], DataNotFoundError, r"policy\.model=\./model is not in"),
        (["fly"], SubmitError, r"after -- comes a command of raylign \(align, .*found fly"),
        (["submit", "align"], SubmitError, "comes a command"),
        (["compare", "--config", "compare_tiny.yaml"], ConfigError, r"run\.storage=runs is relative"),
        (["calibrate", "--config", "calibrate_tiny.yaml"], ConfigError, r"run\.storage=runs is relative"),
        (["sweep", "--space", "beta"], ConfigError, r"run\.storage=runs is relative"),
        (
            ["sweep", "--space", "../outside.yaml", SHARED],
            ConfigError,
            r"--space \.\./outside\.yaml is not in the work",
        ),
        (
            ["evaluate", "runs/default"],
            DataNotFoundError,
            r"CHECKPOINT=runs/default is left out of the upload.*absolute",
        ),
        (["evaluate", "runs/a/policy"], DataNotFoundError, r"CHECKPOINT=runs/a/policy is not in the working directory"),
        (["evaluate", "/c", "evaluate.prompts=no.jsonl"], DataNotFoundError, r"evaluate\.prompts=no\.jsonl is not in"),
        (["check", "data.path=other.jsonl"], DataNotFoundError, r"data\.path=other\.jsonl is not in the work"),
    ],
)
def test_what_cannot_work_there_is_refused_here(
    project: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    (project.parent / "outside.yaml").write_text("train.beta: {grid: [0.1, 0.2]}\n" if "--space" in arguments else "")
    with pytest.raises(error, match=message):
        parsed(project, *arguments)


def test_what_is_no_run_needs_neither_storage_nor_what_it_does_not_read(project: Path) -> None:
    parsed(project, "evaluate", "sub", "data.path=other.jsonl")
    parsed(project, "evaluate", "org/name")
    parsed(project, "check", "--config", "my.yaml")
    target = parse_target(main, ["evaluate", "/checkpoint", "tracking.wandb=online"], root=project)
    notes = check_target(target, collect_upload(project, []))
    assert notes == [
        "CHECKPOINT=/checkpoint must exist on every node; it is not shipped",
        "raylign is not shipped: the cluster must have it",
    ]


def test_a_wrong_option_of_the_command_is_found_here(project: Path) -> None:
    with pytest.raises(click.UsageError, match="No such option"):
        parsed(project, "align", "--confg", "my.yaml")


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("data.path=/data/*.jsonl", "data.path=/data/*.jsonl must exist on every node; it is not shipped"),
        ("policy.model=/models/a", "policy.model=/models/a must exist on every node; it is not shipped"),
        ("tracking.wandb=online", "tracking.wandb=online needs WANDB_API_KEY there"),
        ("data.path=pairs.jsonl", None),
        ("policy.model=org/name", None),
        ("data.path=hf://datasets/org/name/*.parquet", None),
    ],
)
def test_what_only_the_cluster_can_tell_is_said(project: Path, override: str, note: str | None) -> None:
    target = parse_target(main, ["align", SHARED, override], root=project)
    notes = check_target(target, collect_upload(project, []))
    assert notes[-1] == "raylign is not shipped: the cluster must have it"
    assert (notes[0].startswith(note), len(notes)) == (True, 2) if note else len(notes) == 1


# variables


def test_only_named_variables_travel(project: Path) -> None:
    environment = {"HF_TOKEN": "hf_s3cret", "HOME": "/elsewhere", "WANDB_API_KEY": "other"}
    env = parse_env(["HF_TOKEN", "MODE=fast=1"], environment)
    sent = request(collect_upload(project, []), env=env).runtime_env(environment)
    assert sent["env_vars"] == {"HF_TOKEN": "hf_s3cret", "MODE": "fast=1"}
    assert (sent["working_dir"], ".venv" in sent["excludes"]) == (str(project), False)
    assert "runs/" in sent["excludes"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ABSENT", "not set here"),
        ("WANDB_API_KEY=abc", "looks like a secret"),
        ("my_password=abc", "looks like a secret"),
        ("GITHUB_TOKENS=abc", "looks like a secret"),
        ("SERVICE_APIKEY_2=abc", "looks like a secret"),
        ("PGPASSWORD=abc", "looks like a secret"),
        ("RAY_ADDRESS", "Ray sets it inside the job"),
        ("RAY_AUTH_TOKEN", "Ray sets it inside the job"),
        ("not a name", "give NAME, or NAME=VALUE"),
        ("=x", "give NAME, or NAME=VALUE"),
    ],
)
def test_variables_that_must_not_travel(word: str, message: str) -> None:
    with pytest.raises(SubmitError, match=message) as caught:
        parse_env([word], {"RAY_ADDRESS": "a", "RAY_AUTH_TOKEN": "t"})
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY_PATCH", "SECRETARY"])
def test_names_that_only_hold_such_a_word_are_no_secrets(name: str) -> None:
    assert parse_env([f"{name}=false"], {}) == {name: "false"}


# the line


def test_the_line_gives_ray_the_same_job_and_shows_no_secret(project: Path, tmp_path: Path) -> None:
    """A stand-in for `ray` prints what the shell gave it."""
    upload = collect_upload(project, ["it's *.bin"])
    environment = {"HF_TOKEN": "hf_s3cret $HOME `id`", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    job = request(
        upload, env=parse_env(["HF_TOKEN", "MODE=a 'b' $c"], environment), submission_id="my job", address="http://h:1"
    )
    line = job.command_line({"RAY_AUTH_MODE": "token"})
    assert "s3cret" not in line
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$RAY_AUTH_MODE"\nfor a in "$@"; do echo "$a"; done\n')
    ray.chmod(0o755)
    out = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True, timeout=20)
    mode, *words = out.stdout.splitlines()
    assert mode == "token"
    sent = job.runtime_env(environment)
    assert words == [
        *("job", "submit", "--address", "http://h:1", "--submission-id", "my job"),
        *("--working-dir", sent["working_dir"], "--runtime-env-json", words[9], "--", *job.entrypoint),
    ]
    assert json.loads(words[9]) == {"excludes": sent["excludes"], "env_vars": sent["env_vars"]}


def test_dry_run_prints_the_line_alone_to_stdout(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))  # no token there
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    result = submit("--address", "head:8265/", "--dry-run", "--", "align", "--config", "my.yaml", SHARED)
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    words = shlex.split(line)
    assert words[:5] == ["ray", "job", "submit", "--address", "http://head:8265"]
    assert words[words.index("--") + 1 :] == ["python3", "-m", "launch.cli", "align", "--config", "my.yaml", SHARED]
    assert "upload   4 files, 0.0 MiB" in result.stderr
    assert "demand   feature actor     1 x (1 CPU) = 1 CPU" in result.stderr


def test_rays_own_variables_do_not_lead_the_line_elsewhere() -> None:
    """Ray lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS beat --address, and sends a token when RAY_AUTH_MODE says so."""
    assert hand_variables("http://h:1", {}, has_token=False) == {}
    assert hand_variables("http://h:1", {"RAY_ADDRESS": "x:6379"}, has_token=False) == {
        "RAY_API_SERVER_ADDRESS": "http://h:1"
    }
    assert hand_variables("http://h:1", {}, has_token=True) == {"RAY_AUTH_MODE": "token"}
    assert hand_variables("http://h:1", {"RAY_AUTH_MODE": "token"}, has_token=True) == {}


# from the line to the exit code; only the server is made up


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job server that has one node of two CPUs and remembers what it was sent; "end" says how its job ends."""
    seen: dict[str, Any] = {"end": Outcome(exit_code=0, reason="succeeded")}

    def connect(address: str) -> str:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        return "client"

    def submit_job(client: str, **sent: Any) -> str:
        seen.update(sent)
        return "raysubmit_1"

    def follow(client: str, job: str, write: Any) -> Outcome:
        write("line of the job\n")
        if isinstance(seen["end"], BaseException):
            raise seen["end"]
        return seen["end"]

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("launch.submit.list_supply", lambda address: [{"CPU": 2.0}])
    for stand_in in (connect, submit_job, follow):
        monkeypatch.setattr(f"launch.submit.{stand_in.__name__}", stand_in)
    return seen


def test_the_log_goes_to_stdout_and_the_exit_code_is_the_jobs(project: Path, server: dict[str, Any]) -> None:
    server["end"] = Outcome(exit_code=2, reason="failed with exit code 2: ConfigError: so")
    result = submit("--submission-id", "mine", "--", "align", "--config", "my.yaml", SHARED)
    assert (result.exit_code, result.stdout) == (2, "line of the job\n")
    assert result.stderr.endswith("job      raysubmit_1 failed with exit code 2: ConfigError: so\n")
    assert server["entrypoint"] == f"python3 -m launch.cli align --config my.yaml {SHARED}"
    assert server["submission_id"] == "mine"
    assert server["runtime_env"]["working_dir"] == str(project)


def test_ctrl_c_lets_go_of_the_log_and_says_how_to_take_it_up_or_stop(project: Path, server: dict[str, Any]) -> None:
    server["end"] = KeyboardInterrupt()
    result = submit("--address", "http://h:1", "--", "align", SHARED)
    assert result.exit_code == 130
    assert "raysubmit_1 goes on" in result.stderr
    for words in ("logs --follow", "stop"):
        assert f"RAY_AUTH_MODE=token ray job {words} --address http://h:1 raysubmit_1" in result.stderr


def test_a_lost_server_is_an_error_that_says_the_same(project: Path, server: dict[str, Any]) -> None:
    server["end"] = SubmitError("lost the connection to the job server: gone")
    result = submit("--", "align", SHARED)
    assert result.exit_code == 1
    assert "gone; the job goes on; follow it: RAY_AUTH_MODE=token ray job logs --follow" in result.stderr


def test_a_plan_that_does_not_fit_is_not_sent(project: Path, server: dict[str, Any]) -> None:
    result = submit("--", "align", SHARED, "resources.num_workers=5")
    assert result.exit_code == 1
    assert "supply   1 node(s) of 2 CPU\n" in result.stderr
    assert "5 training worker(s) x 1 CPU ask for 5 CPU, the cluster has 2; lower resources.num_workers" in result.stderr
    assert "entrypoint" not in server


@pytest.mark.parametrize(
    ("arguments", "demand"),
    [
        (["evaluate", "/checkpoint"], "demand   evaluation actor  1 x (1 CPU) = 1 CPU\nsupply"),
        (["check"], "supply"),
    ],
)
def test_what_is_no_run_demands_only_what_it_uses(
    project: Path, server: dict[str, Any], arguments: list[str], demand: str
) -> None:
    result = submit("--", *arguments, "resources.num_workers=5")
    assert result.exit_code == 0, result.output
    assert f"raylign is not shipped: the cluster must have it\n{demand}" in result.stderr


def test_an_evaluation_that_does_not_fit_is_not_sent(project: Path, server: dict[str, Any]) -> None:
    result = submit("--", "evaluate", "/checkpoint", "evaluate.num_actors=3")
    assert result.exit_code == 1
    assert "3 evaluation actor(s) x 1 CPU ask for 3 CPU, the cluster has 2" in result.stderr
    assert "entrypoint" not in server


def test_no_follow_returns_at_once(project: Path, server: dict[str, Any]) -> None:
    server["end"] = AssertionError("followed")
    result = submit("--no-follow", "--", "align", SHARED)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "follow it: " in result.stderr
