"""How a job server is reached, followed and told apart from others: a small HTTP server stands in for it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ServerDisconnectedError, WSServerHandshakeError
from click.testing import CliRunner
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from launch import job_log
from launch.cli import main
from launch.job_log import follow, outcome
from launch.job_server import await_supply, connect, find_token, list_supply, normalise, submit_job
from raylign.errors import ResourceError, SubmitError

VERSION = json.dumps({"version": "4", "ray_version": "2.60.0"})
NODE = {
    **{"node_id": "a", "node_ip": "10.0.0.1", "is_head_node": True, "state": "ALIVE", "state_message": None},
    **{"node_name": "10.0.0.1", "resources_total": {"CPU": 2.0}, "labels": {}},
}
NODES = json.dumps(
    {"result": True, "msg": "", "data": {"result": {"total": 1, "num_after_truncation": 1, "result": [NODE]}}}
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token and no address from this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:1")


class Server:
    """Answers every request alike and keeps the headers that it was sent."""

    def __init__(self, status: int, text: str) -> None:
        kept: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kept.append(dict(self.headers))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.headers = kept
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Any]:
    started: list[Server] = []

    def start(status: int, text: str = "") -> Server:
        started.append(Server(status, text))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def test_addresses_are_those_of_the_dashboard() -> None:
    assert normalise("head:8265") == "http://head:8265"
    assert normalise("https://ray.example.org/") == "https://ray.example.org"
    for wrong in ("ray://head:10001", "auto://", "http://"):
        with pytest.raises(SubmitError, match=r"http://head:8265"):
            normalise(wrong)


def test_nobody_at_the_address_is_told_with_what_to_look_at() -> None:
    result = CliRunner().invoke(main, ["submit", "--address", "127.0.0.1:9", "--", "env"])
    assert result.exit_code == 1
    for word in ("no Ray job server answers at http://127.0.0.1:9", "ConnectionRefusedError", "port-forward", "6379"):
        assert word in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("status", "text"), [(404, ""), (200, "<html>"), (200, '{"other": 1}'), (502, "")])
def test_another_server_is_not_taken_for_rays(serve: Any, status: int, text: str) -> None:
    with pytest.raises(SubmitError, match="is no Ray job server"):
        connect(serve(status, text).address)


def test_a_server_without_tokens_gets_none_and_beats_rays_variables(serve: Any, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("s3cret" * 8)
    server = serve(200, VERSION)
    client = connect(server.address)
    assert client.get_address() == server.address
    assert len(server.headers) >= 2
    assert not any("s3cret" in str(headers) for headers in server.headers)


def test_a_wanted_token_that_is_not_there_is_told_with_its_places(serve: Any) -> None:
    with pytest.raises(SubmitError, match=r"wants a token, and there is none here: run `ray get-auth-token`"):
        connect(serve(401, "Unauthorized: Missing authentication token").address)


def test_a_forbidden_token_names_the_switch(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(SubmitError, match=r"RAY_AUTH_MODE=disabled forbids"):
        connect(serve(401).address)


def test_nodes_are_asked_for_with_the_headers_of_a_proxy(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Proxy": "pass"}')
    server = serve(200, NODES)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    assert list_supply(server.address) == [{"CPU": 2.0}]
    assert [headers["X-Proxy"] for headers in server.headers] == ["pass"]


@pytest.mark.parametrize(("token", "found"), [("t", r"the token from RAY_AUTH_TOKEN"), ("", r"to answer without a")])
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_does_not_list_nodes_is_told_with_the_cure(
    serve: Any, monkeypatch: pytest.MonkeyPatch, status: int, token: str, found: str
) -> None:
    server = serve(status)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(SubmitError, match=f"refuses {found}.*ray get-auth-token"):
        list_supply(server.address)


def test_tokens_are_looked_for_in_rays_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(" \n")
    assert find_token() is None
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert find_token() == "~/.ray/auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(SubmitError, match="cannot be read"):
        find_token()
    (tmp_path / "absent").write_text("t")
    assert find_token() == f"RAY_AUTH_TOKEN_PATH={tmp_path / 'absent'}"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert find_token() == "RAY_AUTH_TOKEN"


@pytest.mark.parametrize(
    ("status", "exit_code", "error", "message", "code", "reason"),
    [
        ("SUCCEEDED", 0, None, "Job finished successfully.", 0, "succeeded"),
        ("STOPPED", None, None, None, 143, "was stopped"),
        (
            "FAILED",
            2,
            "JOB_ENTRYPOINT_COMMAND_ERROR",
            "Job entrypoint command failed with exit code 2, last available logs\nx\nConfigError: train.beta\n\n",
            2,
            "failed with exit code 2: ConfigError: train.beta",
        ),
        ("FAILED", -9, "JOB_ENTRYPOINT_COMMAND_ERROR", "a\nlast", 137, "was killed by signal 9: last"),
        (
            "FAILED",
            None,
            "RUNTIME_ENV_SETUP_FAILURE",
            "runtime_env setup failed: no such package",
            1,
            "failed (RUNTIME_ENV_SETUP_FAILURE): runtime_env setup failed: no such package",
        ),
    ],
)
def test_the_exit_code_and_the_reason_are_the_jobs(
    status: str, exit_code: int | None, error: str | None, message: str | None, code: int, reason: str
) -> None:
    ended = outcome(status=status, exit_code=exit_code, error=error, message=message)
    assert (ended.exit_code, ended.reason) == (code, reason)


class Job:
    """A job whose log comes in pieces, over connections that are silent for some seconds (a number) or break."""

    def __init__(self, *connections: list[str | float | Exception], log: str = "") -> None:
        self.connections = list(connections)
        self.log = log

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in self.connections.pop(0):
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, str):
                yield piece
            else:
                await asyncio.sleep(piece)

    def get_job_logs(self, job: str) -> str:
        return self.log

    def get_job_info(self, job: str) -> Any:
        status = JobStatus.RUNNING if self.connections else JobStatus.SUCCEEDED
        return SimpleNamespace(status=status, driver_exit_code=0, error_type=None, message=None)


HANDSHAKE = WSServerHandshakeError(SimpleNamespace(real_url="ws://h"), (), status=502)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RuntimeError("closed"), OSError("gone"), ServerDisconnectedError(), HANDSHAKE])
def test_a_broken_connection_is_taken_up_where_it_broke(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(job_log, "_POLL_S", 0)
    written: list[str] = []
    absent: list[list[str | float | Exception]] = [[error]] * 20
    job = Job(["one\n", "tw", error], *absent, ["one\ntwo\n", error], ["one\n", "two\nthree\n"])
    assert follow(job, "job", written.append).exit_code == 0  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_server_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_POLL_S", 0.01)
    monkeypatch.setattr(job_log, "_PATIENCE_S", 0.1)
    with pytest.raises(SubmitError, match="lost the connection to the job server: gone"):
        follow(Job(*[[OSError("gone")]] * 1000), "job", print)  # type: ignore[arg-type]


def test_a_quiet_job_is_not_lost_when_its_connection_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_POLL_S", 0)
    monkeypatch.setattr(job_log, "_STATUS_S", 0.01)
    monkeypatch.setattr(job_log, "_PATIENCE_S", 0.5)
    job = Job(["one\n", 1.0, ServerDisconnectedError()], [])
    assert follow(job, "job", print).exit_code == 0  # type: ignore[arg-type]


@pytest.mark.timeout(60)
def test_a_job_that_ended_behind_a_dead_connection_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "_STATUS_S", 0.01)
    written: list[str] = []
    job = Job(["one\n", "tw", 3600], log="one\ntwo\n")
    assert follow(job, "job", written.append).exit_code == 0  # type: ignore[arg-type]
    assert "".join(written) == "one\ntwo\n"


@pytest.mark.timeout(60)
def test_a_log_that_nobody_reads_ends_following() -> None:
    def closed(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        follow(Job(*[["one\n"]] * 5), "job", closed)  # type: ignore[arg-type]


class Locked(Job):
    """A job whose server takes the token no longer."""

    def get_job_info(self, job: str) -> Any:
        raise AuthenticationError("no")

    def get_address(self) -> str:
        return "http://h:1"


def test_a_token_that_is_no_longer_taken_ends_following() -> None:
    with pytest.raises(SubmitError, match=r"http://h:1 refuses .*ray get-auth-token"):
        follow(Locked(["one\n"]), "job", print)  # type: ignore[arg-type]


class Agents:
    """A server whose agent comes up after some tries."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)

    def submit_job(self, **sent: Any) -> str:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_agent_that_is_not_up_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    early = RuntimeError(
        "Request failed with status code 500: No available agent to submit job, please try again later."
    )
    told: list[str] = []

    def send(*answers: str | Exception, wait_s: float) -> str:
        client: Any = Agents(*answers)
        return submit_job(client, entrypoint="x", runtime_env={}, submission_id=None, wait_s=wait_s, tell=told.append)

    assert send(early, early, "job_1", wait_s=60) == "job_1"
    assert told == ["waiting up to 60 s for the agent that starts jobs"]
    with pytest.raises(SubmitError, match=r"No available agent.*--wait 60.*--dashboard-agent-listen-port"):
        send(early, wait_s=0)
    with pytest.raises(SubmitError, match=r"refused the job: ValueError: taken$"):
        send(RuntimeError("Traceback\n  File x\nValueError: taken"), wait_s=60)


def test_nodes_are_waited_for_as_long_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    told: list[str] = []
    growing = iter([[], [{"CPU": 1.0}], [{"CPU": 2.0}]])

    def check(nodes: Any) -> None:
        if sum(node["CPU"] for node in nodes) < 2:
            raise ResourceError("too few")

    assert await_supply(lambda: next(growing), check, wait_s=60, tell=told.append) == [{"CPU": 2.0}]
    assert told == ["waiting up to 60 s for nodes: too few"]
    with pytest.raises(ResourceError, match="too few"):
        await_supply(lambda: [], check, wait_s=0, tell=told.append)
    assert len(told) == 1
    assert "RAY_API_SERVER_ADDRESS" in os.environ
