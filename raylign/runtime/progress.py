"""What a person sees while a run goes on: one line per phase event, and bars only where a terminal can redraw them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

T = TypeVar("T")

_NAME_WIDTH = 12


def phase_line(name: str, event: str, seconds: float | None = None, *, stream: TextIO | None = None) -> None:
    """Print "[phase] event (seconds)" as one flushed line.

    Args:
        name: phase, for example "features".
        event: what happened: "started", "done", "reused", or a short fact such as "2,400 pairs".
        seconds: wall seconds of the phase; left out when None.
        stream: where to print; default is the current stderr, so that stdout stays free for results.
    """
    shown = "" if seconds is None else f"  {format_seconds(seconds)}"
    print(f"{name:<{_NAME_WIDTH}} {event}{shown}", file=stream or sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Seconds for people: "0.42 s", "37.1 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextmanager
def step(name: str, event: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Print `event` with its seconds when the block ends without an error."""
    start = time.monotonic()
    yield
    phase_line(name, event, time.monotonic() - start, stream=stream)


def progress_bar(
    items: Iterable[T], *, label: str, total: int | None = None, is_forced: bool = False, stream: TextIO | None = None
) -> Iterator[T]:
    """Iterate with a tqdm bar on a terminal, and without any output elsewhere (logs, jobs, tests).

    Args:
        items: what to iterate over.
        label: text before the bar.
        total: number of items, for an iterable without length.
        is_forced: draw although the stream is no terminal.
        stream: where to draw; default is the current stderr.
    """
    target = stream or sys.stderr
    if not (is_forced or target.isatty()):
        yield from items
        return
    from tqdm import tqdm

    with tqdm(items, desc=label, total=total, file=target, dynamic_ncols=True, leave=False) as bar:
        yield from bar
