"""The cost ledger: what every phase of a run took, written so that a killed process stays on the bill.

    ledger = Ledger("runs/a/ledger", run="a", method="offline")
    with ledger.measure("generate", devices={"cpu": 1.0}) as entry:
        ...
        entry.add(generated_tokens=812, decode_steps=64)

A directory holds one append-only JSONL file per writing process. An entry is a line when it starts and a line when it
ends, also when an exception ends it. While entries are open, a thread says every two seconds how far they are, in a
small file beside; after a SIGKILL they count up to then. Entries nest, over process borders too (`Ledger.below`), and
`raylign.cost.rows.read_ledger` counts every moment once.
"""

from __future__ import annotations

import contextvars
import json
import os
import resource
import secrets
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from raylign.cost.rows import ENTRIES_SUFFIX, OPEN_SUFFIX, Cost, Counts, Status

BEAT_S = 2.0
_Result = TypeVar("_Result")
_current: contextvars.ContextVar[str] = contextvars.ContextVar("raylign_ledger_entry", default="")


class Entry:
    """An open entry.

    Args:
        started: what `time.monotonic` said when it started.

    Attributes:
        id: names it for entries nested in it by other processes.
    """

    def __init__(self, started: float = 0.0) -> None:
        self.id = secrets.token_hex(8)
        self._started = started
        self._counts = Counts()
        self._peaks = (0.0, 0.0)
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        """Count something, by the names of `raylign.cost.rows.Counts`; may be called from any thread.

        Raises:
            TypeError: no such count.
        """
        with self._lock:
            self._counts += Counts(**counts)

    def saw_peak(self, rss_mib: float, device_mib: float = 0.0) -> None:
        """Tell of the largest memory of another process that worked for this entry; the writer's own is known."""
        with self._lock:
            self._peaks = max(self._peaks[0], rss_mib), max(self._peaks[1], device_mib)

    def state(self) -> dict[str, Any]:
        """How far the entry is, JSON-like."""
        return {
            "wall_s": time.monotonic() - self._started,
            "counts": {name: value for name, value in asdict(self._counts).items() if value},
            "peak_rss_mib": max(peak_rss_mib(), self._peaks[0]),
            "peak_device_mib": max(peak_device_mib(), self._peaks[1]),
        }


class Ledger:
    """Writes entries into a directory; pickles as its description, so that workers write files of their own.

    Args:
        directory: of the ledger, on storage that all writers and the reader see; created when something is written.
        run: name of the run.
        method: train.method of the run.
        fingerprint: of what makes two rows comparable, see `LedgerRow`.
        kinds: what to call kinds of device in the rows, for example {"gpu": "H200"}; others keep their name.
        parent: id of the entry that this ledger's outermost entries are nested in, "" for none.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        run: str = "",
        method: str = "",
        fingerprint: str = "",
        kinds: Mapping[str, str] | None = None,
        parent: str = "",
    ) -> None:
        self.directory = Path(directory).absolute()
        self._labels = {"run": run, "method": method, "fingerprint": fingerprint}
        self._kinds = dict(kinds or {})
        self._parent = parent
        self._writer: _Writer | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (str(self.directory), self._labels, self._kinds, self._parent)

    def below(self, entry: Entry | None = None) -> Ledger:
        """A ledger for other processes, or other threads, whose entries are nested in an entry of this one.

        Args:
            entry: None for the one that is open around the call.
        """
        parent = entry.id if entry is not None else _current.get() or self._parent
        return Ledger(self.directory, **self._labels, kinds=self._kinds, parent=parent)

    @contextmanager
    def measure(self, phase: str, *, devices: Mapping[str, float], status: Status = "measured") -> Iterator[Entry]:
        """Write an entry for the time that the block takes, nested in the entry that is open around it.

        Args:
            phase: what is done.
            devices: reserved devices by kind, for example {"cpu": 1.5, "gpu": 1}; what the block keeps others from
                using, whether it computes or waits.
            status: see `LedgerRow`.
        """
        writer = self._open_writer()
        entry = Entry(time.monotonic())
        parent = _current.get() or self._parent
        named = {self._kinds.get(kind, kind): count for kind, count in devices.items()}
        writer.start(entry, {**self._labels, "parent": parent, "phase": phase, "status": status}, named)
        token = _current.set(entry.id)
        error = ""
        try:
            yield entry
        except BaseException as raised:
            error = type(raised).__name__
            raise
        finally:
            _current.reset(token)
            writer.finish(entry, error)

    def reuse(self, phase: str, cost: Cost, *, key: str) -> None:
        """Say that an artefact was found ready: costs nothing now, `cost` when it was made.

        Args:
            phase: that makes it.
            cost: from where the artefact was made.
            key: of the artefact; saying it again, for example after a resume, does not count twice.
        """
        entry = Entry(time.monotonic())
        entry.id = f"{phase}-{key}"
        about = {**self._labels, "parent": "", "phase": phase, "status": "measured", "reused": asdict(cost)}
        writer = self._open_writer()
        writer.start(entry, about, {})
        writer.finish(entry, "")

    def _open_writer(self) -> _Writer:
        with self._lock:
            if self._writer is None or self._writer.process != os.getpid():  # a forked child writes its own file
                self._writer = _Writer(self.directory)
            return self._writer


def _rebuild(directory: str, labels: Mapping[str, str], kinds: Mapping[str, str], parent: str) -> Ledger:
    return Ledger(directory, **labels, kinds=kinds, parent=parent)


def measured(ledger: Ledger | None, phase: str, devices: Mapping[str, float]) -> AbstractContextManager[Entry]:
    """`Ledger.measure`, or an entry that is thrown away when nobody keeps a ledger."""
    return nullcontext(Entry()) if ledger is None else ledger.measure(phase, devices=devices)


def measured_call(
    ledger: Ledger | None, phase: str, devices: Mapping[str, float], work: Callable[..., _Result], *arguments: Any
) -> _Result:
    """`work(*arguments)` inside an entry: what a Ray task runs whose time and devices are to be recorded."""
    with measured(ledger, phase, devices):
        return work(*arguments)


class _Writer:
    """The files of one process."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.process = os.getpid()
        stem = f"{socket.gethostname()}-{self.process}-{secrets.token_hex(4)}"
        self._signs = directory / (stem + OPEN_SUFFIX)
        self._file = os.open(directory / (stem + ENTRIES_SUFFIX), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        weakref.finalize(self, os.close, self._file)
        self._open: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._is_beating = False

    def start(self, entry: Entry, about: Mapping[str, Any], devices: Mapping[str, float]) -> None:
        line = {"event": "started", "id": entry.id, **about, "devices": dict(devices), "started_at": time.time()}
        with self._lock:
            self._append(line)
            self._open[entry.id] = entry
            if not self._is_beating:
                self._is_beating = True
                beat = threading.Thread(target=_beat, args=(weakref.ref(self),), name="raylign-ledger", daemon=True)
                beat.start()

    def finish(self, entry: Entry, error: str) -> None:
        with self._lock:
            self._append({"event": "finished", "id": entry.id, **entry.state(), "error": error})
            del self._open[entry.id]
            if not self._open:
                os.fsync(self._file)
                self._signs.unlink(missing_ok=True)

    def beat(self) -> bool:
        """Say how far the open entries are; False when there is none, and then no one will come again."""
        with self._lock:
            self._is_beating = bool(self._open)
            if self._open:
                # a process killed while it writes leaves the sign before this one
                new = self._signs.with_name(f".{self._signs.name}")
                new.write_text(json.dumps({entry.id: entry.state() for entry in self._open.values()}), encoding="utf-8")
                new.replace(self._signs)
                os.fsync(self._file)
            return self._is_beating

    def _append(self, line: Mapping[str, Any]) -> None:
        """One write per line: the kernel has it even if the process is killed next; the disk follows with the beat."""
        os.write(self._file, (json.dumps(line) + "\n").encode())


def _beat(reference: weakref.ref[_Writer]) -> None:
    while True:
        time.sleep(BEAT_S)
        writer = reference()
        if writer is None or not writer.beat():
            return
        del writer  # or it would never be collected


def peak_rss_mib() -> float:
    """Largest resident memory of this process since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_device_mib() -> float:
    """Largest device memory that torch held in this process since its start; 0 without a device."""
    torch = sys.modules.get("torch")  # the ledger does not load it; without it there is no device memory
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0.0
    return float(max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))) / 2**20
