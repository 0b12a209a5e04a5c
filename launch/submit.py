"""`raylign submit`: a job as `ray job submit` would send it, checked first, followed to its end, or only shown."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launch.job_log import follow
from launch.job_server import await_supply, connect, find_token, list_supply, normalise, submit_job
from launch.job_target import Target, check_target, parse_target
from launch.upload import Upload, check_size, collect_upload
from raylign.errors import SubmitError

# words of a name, as in HF_TOKEN; PGPASSWORD and APIKEY are written as one
_SECRET = re.compile(r"(?:^|_)(?:TOKEN|(?:API)?KEY|SECRET|[A-Z]*PASSW(?:OR)?D|CREDENTIAL)S?\d*(?:_|$)", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# what tells a Ray process its cluster; the submitting machine's would lead the job elsewhere, or lock it out
_RAYS_OWN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """Everything that submits one job.

    Attributes:
        address: of the job server, "http://host:port".
        entrypoint: command line on the cluster.
        upload: the working directory.
        env: variables of the job by name; None takes the value of this machine when it is needed.
        submission_id: name of the job; None lets Ray make one.
    """

    address: str
    entrypoint: tuple[str, ...]
    upload: Upload
    env: Mapping[str, str | None]
    submission_id: str | None = None

    def runtime_env(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Ray's runtime environment, with the values of variables.

        Args:
            environment: of this process.
        """
        env = {name: environment[name] if value is None else value for name, value in self.env.items()}
        return {"working_dir": str(self.upload.root), "excludes": list(self.upload.excludes), "env_vars": env}

    def command_line(self, variables: Mapping[str, str]) -> str:
        """The `ray job submit` line that does the same by hand; the shell puts in the values of variables.

        Args:
            variables: set for this one command, no secrets.
        """
        env = {name: _placeholder(name) if value is None else value for name, value in self.env.items()}
        runtime_env = json.dumps({"excludes": list(self.upload.excludes), "env_vars": env})
        quoted = shlex.quote(runtime_env)
        for name, value in self.env.items():
            if value is None:
                quoted = quoted.replace(_placeholder(name), f"'\"${name}\"'")
        return " ".join(
            [
                *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
                *("ray", "job", "submit", "--address", shlex.quote(self.address)),
                *(() if self.submission_id is None else ("--submission-id", shlex.quote(self.submission_id))),
                *("--working-dir", shlex.quote(str(self.upload.root)), "--runtime-env-json", quoted, "--"),
                shlex.join(self.entrypoint),
            ]
        )


def _placeholder(name: str) -> str:
    return f"__value_of_{name}__"


def parse_env(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that a job sees: only those that are named.

    Args:
        words: "NAME" takes the value of this machine, "NAME=VALUE" says it.
        environment: of this process.

    Raises:
        SubmitError: no name, not set here, a secret on the command line, or one that Ray sets itself.
    """
    found: dict[str, str | None] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise SubmitError(f"--env {word}: give NAME, or NAME=VALUE")
        if name in _RAYS_OWN:
            raise SubmitError(f"--env {name}: Ray sets it inside the job; it says here how to reach the cluster")
        if separator and _SECRET.search(name):
            raise SubmitError(
                f"--env {name}=...: looks like a secret, and command lines are kept and seen by others; "
                f"export it and give --env {name}"
            )
        if not separator and name not in environment:
            raise SubmitError(f"--env {name}: not set here; export it first")
        found[name] = value if separator else None
    return found


def hand_variables(address: str, environment: Mapping[str, str], *, has_token: bool) -> dict[str, str]:
    """Variables that `ray job submit` needs beside its options to reach the same server.

    RAY_API_SERVER_ADDRESS and RAY_ADDRESS beat its --address, and it sends a token only where RAY_AUTH_MODE says so.

    Args:
        address: of the server.
        environment: of this process.
        has_token: whether a token is found on this machine.
    """
    needed: dict[str, str] = {}
    if {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"} & set(environment):
        needed["RAY_API_SERVER_ADDRESS"] = address
    if has_token and "RAY_AUTH_MODE" not in environment:
        needed["RAY_AUTH_MODE"] = "token"
    return needed


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line of `raylign submit` says.

    Attributes:
        address: of the job server.
        working_dir: what the job ships.
        env: "NAME" or "NAME=VALUE".
        exclude: further patterns of files that are not shipped.
        submission_id: name of the job.
        wait_s: longest wait for nodes that hold the job, and for the agent that starts it.
        is_dry_run: show the line and stop.
        is_followed: hand on the log, the reason and the exit code.
    """

    address: str
    working_dir: Path
    env: Sequence[str]
    exclude: Sequence[str]
    submission_id: str | None
    wait_s: float
    is_dry_run: bool
    is_followed: bool


def run_submit(group: click.Group, arguments: Sequence[str], options: Options) -> int:
    """Check, send and follow a job; returns its exit code.

    The log and, of a dry run, the line go to stdout, everything else to stderr.

    Args:
        group: the `raylign` command.
        arguments: its verb and what follows, to run on the cluster.
        options: of the submission.

    Raises:
        RaylignError: what cannot work, before anything is uploaded.
    """
    address = normalise(options.address)
    root = Path(os.path.abspath(options.working_dir))  # resolves .., follows no link
    target = parse_target(group, arguments, root=root)
    env = parse_env(options.env, os.environ)
    upload = collect_upload(root, options.exclude)
    notes = check_target(target, upload)
    check_size(upload)
    request = JobRequest(
        address=address,
        entrypoint=target.entrypoint,
        upload=upload,
        env=env,
        submission_id=options.submission_id,
    )
    _tell("upload", upload.describe())
    _tell("env", ", ".join(env) or "nothing beside what the nodes have")
    for note in notes:
        _tell("note", note)
    for line in _demand_lines(target):
        _tell("demand", line)
    environment = dict(os.environ)  # as the user's shell has it; connecting changes this process's
    if options.is_dry_run:
        click.echo(request.command_line(hand_variables(address, environment, has_token=find_token() is not None)))
        return 0
    client = connect(address)
    _check_supply(target, options.wait_s, address)
    job = submit_job(
        client,
        entrypoint=shlex.join(request.entrypoint),
        runtime_env=request.runtime_env(os.environ),
        submission_id=request.submission_id,
        wait_s=options.wait_s,
        tell=lambda text: _tell("job", text),
    )
    _tell("job", f"{job} submitted to {address}")
    variables = hand_variables(address, environment, has_token=os.environ.get("RAY_AUTH_MODE") == "token")
    ray = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), "ray job"])
    hint = f"follow it: {ray} logs --follow --address {address} {job}; stop it: {ray} stop --address {address} {job}"
    if not options.is_followed:
        _tell("job", hint)
        return 0
    try:
        ended = follow(client, job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        _tell("job", f"{job} goes on; {hint}")
        return 130
    except SubmitError as error:
        raise SubmitError(f"{error}; the job goes on; {hint}") from error
    _tell("job", f"{job} {ended.reason}")
    return ended.exit_code


def _demand_lines(target: Target) -> list[str]:
    """Demand by role of all that the job runs, each line once."""
    from raylign.runtime.resources import ResourcePlan, describe_demand

    lines: list[str] = []
    for plan in map(ResourcePlan.from_config, target.configs):
        described = describe_demand(plan)
        if target.is_run:
            lines += described
        elif target.checkpoint is not None:
            lines.append(described[plan.demands.index(plan.evaluation)])
    return list(dict.fromkeys(lines))


def _check_supply(target: Target, wait_s: float, address: str) -> None:
    """Show the nodes and compare them with the demand.

    Raises:
        ResourceError: with the arithmetic.
    """
    from raylign.runtime.resources import ResourcePlan, check_demand, check_plan, describe_supply

    def check(nodes: Sequence[Mapping[str, float]]) -> None:
        cluster = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        for plan in map(ResourcePlan.from_config, target.configs):
            if target.is_run:
                check_plan(plan, cluster, nodes)
            elif target.checkpoint is not None:
                check_demand(plan.evaluation, cluster, nodes)

    def ask() -> Sequence[Mapping[str, float]]:
        nodes = list_supply(address)
        shown = describe_supply(nodes)
        if shown != last:
            last[:] = shown
            for line in shown:
                _tell("supply", line)
        return nodes

    last: list[str] = []
    await_supply(ask, check, wait_s=wait_s, tell=lambda text: _tell("supply", text))


def _tell(name: str, text: str) -> None:
    click.echo(f"{name:<8} {text}", err=True)
