"""A job followed to its end: its log over connections that break, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.job_server import last_line, refused
from raylign.errors import SubmitError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_POLL_S = 1.0
_STATUS_S = 30.0  # between two looks at a job's status beside its log
_PATIENCE_S = 300.0  # for new log or an answer, before a connection counts as lost
_STOPPED = 143  # what a shell gives for a command that SIGTERM ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        exit_code: to pass on.
        reason: one line.
    """

    exit_code: int
    reason: str


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> Outcome:
    """Hand on the log until the job has ended; a lost connection is taken up again where it broke.

    Args:
        client: of the server.
        job: submission id.
        write: gets pieces of the log.

    Raises:
        SubmitError: the connection is lost for good, or the server takes the token no longer.
        KeyboardInterrupt: the user let go; the job goes on.
        BrokenPipeError: nobody reads the log.
    """
    import aiohttp
    from ray.exceptions import AuthenticationError

    log = _Log(write)
    while True:
        try:
            asyncio.run(_tail(client, job, log))
            info = client.get_job_info(job)
        except BrokenPipeError:  # of `write`; a connection's have the types of requests and aiohttp
            raise
        except AuthenticationError as error:
            raise refused(client.get_address()) from error
        except (OSError, RuntimeError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            if time.monotonic() - log.heard_s > _PATIENCE_S:
                raise SubmitError(f"lost the connection to the job server: {last_line(str(error))}") from error
        else:
            log.hear()
            if info.status.is_terminal():
                return outcome(
                    status=str(info.status),
                    exit_code=info.driver_exit_code,
                    error=info.error_type,
                    message=info.message,
                )
        time.sleep(_POLL_S)


class _Log:
    """A log of which the server sends every connection all, and of which each character is written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self.num_written = 0
        self.hear()

    def hear(self) -> None:
        """Remember when the server last got further."""
        self.heard_s = time.monotonic()

    def add(self, piece: str, end: int) -> None:
        """Write what is new of a piece that ends after `end` characters."""
        if end > self.num_written:
            self._write(piece[-(end - self.num_written) :])
            self.num_written = end
            self.hear()


async def _tail(client: JobSubmissionClient, job: str, log: _Log) -> None:
    """Write the log to its end, or to the end of the job when nothing comes any more."""
    tasks = [asyncio.create_task(part(client, job, log)) for part in (_read, _watch)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*done)


async def _watch(client: JobSubmissionClient, job: str, log: _Log) -> None:
    """Write the rest of the log and return when the job is over and its log stands still.

    Ray's websocket has no heartbeat: where a connection dies unnoticed, reading never ends.
    """
    end = None
    while True:
        await asyncio.sleep(_STATUS_S)
        if end == log.num_written:
            text = await asyncio.to_thread(client.get_job_logs, job)
            log.add(text, len(text))
            return
        info = await asyncio.to_thread(client.get_job_info, job)
        log.hear()
        end = log.num_written if info.status.is_terminal() else None


async def _read(client: JobSubmissionClient, job: str, log: _Log) -> None:
    end = 0
    async for piece in client.tail_job_logs(job):
        end += len(piece)
        log.add(piece, end)


def outcome(*, status: str, exit_code: int | None, error: str | None, message: str | None) -> Outcome:
    """The exit code to pass on and the reason, from what Ray says of a job that has ended.

    Args:
        status: "SUCCEEDED", "FAILED" or "STOPPED".
        exit_code: of the entrypoint; negative when a signal ended it, None when it never started.
        error: Ray's kind of failure.
        message: Ray's words; of an entrypoint that failed, the end of its log.
    """
    if status == "SUCCEEDED":
        return Outcome(exit_code=0, reason="succeeded")
    if status == "STOPPED":
        return Outcome(exit_code=_STOPPED, reason="was stopped")
    last = last_line(message or "no message")
    if exit_code is None or exit_code == 0:
        return Outcome(exit_code=1, reason=f"failed ({error or 'unknown'}): {last}")
    if exit_code < 0:
        return Outcome(exit_code=128 - exit_code, reason=f"was killed by signal {-exit_code}: {last}")
    return Outcome(exit_code=exit_code, reason=f"failed with exit code {exit_code}: {last}")
