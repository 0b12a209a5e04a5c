"""A Ray cluster's job server: reached with the right token or refused with the cure, asked for nodes, sent jobs."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raylign.errors import ResourceError, SubmitError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_TIMEOUT_S = 20.0  # of one answer
_SEND_TIMEOUTS_S = {"PUT": 900.0, "POST": 120.0}  # of a whole upload, and of a job that has to find its agent
_POLL_S = 1.0
_CHATTY = (  # they name each ignore file thrice, and warn that Ray leaves out .git
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)


def normalise(address: str) -> str:
    """The address that a user gave, as "http://host:port".

    Raises:
        SubmitError: an address of another service of Ray.
    """
    full = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    parts = urlsplit(full)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SubmitError(
            f"--address {address} is no address of a job server; it is the dashboard's, for example http://head:8265"
        )
    return full


def find_token() -> str | None:
    """Where Ray would read a token from, in its own order; None when there is none.

    Raises:
        SubmitError: RAY_AUTH_TOKEN_PATH names a file that cannot be read, at which Ray's core ends the process.
    """
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        if not _is_filled(Path(named)):
            raise SubmitError(
                f"RAY_AUTH_TOKEN_PATH={named} cannot be read or is empty; write the cluster's token there"
            )
        return f"RAY_AUTH_TOKEN_PATH={named}"
    default = Path.home() / ".ray" / "auth_token"
    return "~/.ray/auth_token" if _is_filled(default) else None


def _is_filled(path: Path) -> bool:
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except OSError:
        return False


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server, which sends the token only to a server that asks for one.

    Args:
        address: as `normalise` gives it.

    Raises:
        SubmitError: nobody answers, the answer is not a job server's, or the token is missing or wrong.
    """
    status = _ask_version(address)
    if status in (401, 403):
        _use_token(address)
    elif status != 200:
        raise SubmitError(
            f"{address} answers with HTTP {status} and is no Ray job server; give the dashboard's address (port 8265 "
            "unless chosen otherwise), and check what else listens there"
        )
    # Ray lets RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, beat the address that is given to it.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's client, whose requests would wait for ever."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(
                method, endpoint, **{"timeout": _SEND_TIMEOUTS_S.get(method, _TIMEOUT_S), **options}
            )

    try:
        return Client(address, headers=_headers())
    except AuthenticationError as error:
        raise refused(address) from error
    except (RuntimeError, ConnectionError) as error:
        raise SubmitError(f"{address} does not take jobs: {error}") from error


def _ask_version(address: str) -> int:
    """HTTP status of the version page, asked without a token; 200 only when the page is Ray's."""
    import requests

    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_TIMEOUT_S).close()
        answer = requests.get(f"{address}/api/version", headers=_headers(), timeout=_TIMEOUT_S)
    except (OSError, requests.RequestException) as error:
        raise SubmitError(
            f"no Ray job server answers at {address} ({type(error).__name__}); is the cluster up (`ray status` on its "
            "head), is this the dashboard's address (http://HEAD:8265, not the port 6379 of the cluster), and is it "
            "reachable from here (ssh -L 8265:127.0.0.1:8265 HEAD, or kubectl port-forward service/NAME-head-svc 8265)?"
        ) from error
    if answer.status_code == 200:
        try:
            answer.json()["ray_version"]
        except (ValueError, KeyError, TypeError):
            return 404
    return answer.status_code


def _headers() -> dict[str, str] | None:
    """Headers for a proxy before the cluster, from where `ray job submit` takes them."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return None
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise SubmitError('RAY_JOB_HEADERS must be JSON such as {"name": "value"}') from error


def _use_token(address: str) -> None:
    """Let Ray's clients in this process send the token.

    Raises:
        SubmitError: there is none, or it is switched off.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        raise SubmitError(f"{address} wants a token, and RAY_AUTH_MODE={mode} forbids to send one; unset it")
    if find_token() is None:
        raise SubmitError(
            f"{address} wants a token, and there is none here: run `ray get-auth-token` on the head node, and put what "
            "it prints into the file ~/.ray/auth_token (chmod 600), or into RAY_AUTH_TOKEN"
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")  # Ray has cached the mode when it was imported


def refused(address: str) -> SubmitError:
    """The error for a server that answers, but not to this token."""
    token = find_token()
    found = f"the token from {token}: it is another cluster's, or an old one" if token else "to answer without a token"
    return SubmitError(f"{address} refuses {found}; `ray get-auth-token` on the head node prints the right one")


def list_supply(address: str) -> list[dict[str, float]]:
    """Resources of each living node, from the state API.

    Raises:
        SubmitError: it does not answer, or the token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource
    from ray.util.state.exception import RayStateApiException

    options = ListApiOptions(filters=[("state", "=", "ALIVE")], limit=10_000, timeout=int(_TIMEOUT_S))
    try:
        client = StateApiClient(address, headers=_headers())
        nodes = client.list(StateResource.NODES, options, raise_on_missing_output=True)
    except AuthenticationError as error:
        raise refused(address) from error
    except (RayStateApiException, OSError) as error:
        raise SubmitError(f"{address} does not list its nodes: {error}") from error
    return [node.resources_total for node in nodes]


def await_supply(
    ask: Callable[[], Sequence[Mapping[str, float]]],
    check: Callable[[Sequence[Mapping[str, float]]], None],
    *,
    wait_s: float,
    tell: Callable[[str], None],
) -> Sequence[Mapping[str, float]]:
    """The nodes, as soon as they hold what is asked for.

    Args:
        ask: gives the resources of each living node.
        check: raises ResourceError when they are too few.
        wait_s: longest wait; 0 asks once.
        tell: gets the reason to wait, once.

    Raises:
        ResourceError: they still do not suffice at the end of the wait.
    """
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        nodes = ask()
        try:
            check(nodes)
            return nodes
        except ResourceError as error:
            if time.monotonic() >= deadline:
                raise
            if not is_told:
                tell(f"waiting up to {wait_s:g} s for nodes: {error}")
                is_told = True
        time.sleep(min(5.0, max(0.1, deadline - time.monotonic())))


def submit_job(
    client: JobSubmissionClient,
    *,
    entrypoint: str,
    runtime_env: Mapping[str, Any],
    submission_id: str | None,
    wait_s: float,
    tell: Callable[[str], None],
) -> str:
    """Upload, and start the job.

    Args:
        client: of the server.
        entrypoint: command line of the job.
        runtime_env: with the working directory.
        submission_id: None lets the server make one.
        wait_s: longest wait for an agent that starts jobs; a server answers some seconds before its agents do.
        tell: gets the reason to wait, once.

    Returns:
        Its submission id.

    Raises:
        SubmitError: what the server said.
    """
    deadline = time.monotonic() + wait_s
    is_told = False
    while True:
        try:
            return str(
                client.submit_job(entrypoint=entrypoint, runtime_env=dict(runtime_env), submission_id=submission_id)
            )
        except (RuntimeError, ValueError, OSError) as error:
            text = str(error).strip()
            is_early = "No available agent" in text
            if not is_early or time.monotonic() >= deadline:
                cure = (
                    "; the agent of the head node is not up: wait (--wait 60), or, with two clusters on that machine, "
                    "start the second with another --dashboard-agent-listen-port"
                )
                raise SubmitError(
                    f"the job server refused the job: {last_line(text)}{cure if is_early else ''}"
                ) from error
        if not is_told:
            tell(f"waiting up to {wait_s:g} s for the agent that starts jobs")
            is_told = True
        time.sleep(_POLL_S)


def last_line(text: str) -> str:
    """The line that says most of an error or a log."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
