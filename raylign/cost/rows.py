"""What the ledger says: rows merged from all writing processes, and their totals.

Rows do not overlap. Time that an entry spent inside entries nested in it is counted there and not here, whatever
process wrote them: device-seconds of a row are its reservation times its wall time less those of the entries below it,
and its wall seconds leave out every moment in which an entry below it was open. The device-seconds of all rows add up
to what was reserved, idle time included.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raylign.errors import DataError

Status = Literal["measured", "computed"]
Grouping = Literal["phase", "stage", "method", "run"]

ENTRIES_SUFFIX = ".jsonl"
OPEN_SUFFIX = ".open.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What was done, in counts.

    Attributes:
        num_items: things the phase is about: pairs or responses.
        prompt_tokens: real tokens of the prompts that responses were sampled to, once per response.
        generated_tokens: sampled tokens, up to and including the end-of-response token.
        decode_steps: sequential cached forward calls, per batch the longest response, summed over batches.
        forward_tokens: real tokens that went through a forward, those of generation apart.
        backward_tokens: real tokens that went through a backward.
        flops: model FLOPs by the formulas of `raylign.cost.flops`, computed and never measured; 0 where none were
            counted.
        synced_bytes: bytes of weights sent to samplers.
    """

    num_items: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    forward_tokens: int = 0
    backward_tokens: int = 0
    flops: int = 0
    synced_bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        names = [item.name for item in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What something cost; costs add.

    Attributes:
        wall_s: seconds.
        device_s: reserved device-seconds by kind of device, idle time included.
        counts: what was done.
        peak_rss_mib: largest resident memory of a process that took part, since its start.
        peak_device_mib: largest device memory that torch held in such a process, since its start.
    """

    wall_s: float = 0.0
    device_s: Mapping[str, float] = field(default_factory=dict)
    counts: Counts = Counts()
    peak_rss_mib: float = 0.0
    peak_device_mib: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        kinds = [*self.device_s, *(kind for kind in other.device_s if kind not in self.device_s)]
        return Cost(
            wall_s=self.wall_s + other.wall_s,
            device_s={kind: self.device_s.get(kind, 0.0) + other.device_s.get(kind, 0.0) for kind in kinds},
            counts=self.counts + other.counts,
            peak_rss_mib=max(self.peak_rss_mib, other.peak_rss_mib),
            peak_device_mib=max(self.peak_device_mib, other.peak_device_mib),
        )

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Cost:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: an unknown name.
        """
        return cls(**{**content, "counts": Counts(**content.get("counts", {}))})


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """One entry of the ledger.

    Attributes:
        id: unique.
        parent: id of the entry that this one is nested in, "" for none.
        phase: what was done, for example "generate".
        stage: phase of the outermost entry that this one is nested in, itself when there is none.
        status: "measured" for time that passed here, "computed" for numbers from formulas alone.
        run: name of the run.
        method: train.method of the run.
        fingerprint: of what makes two rows comparable (device, dtype, model, prompts and lengths); "" when unknown.
        devices: reserved devices by kind, fractions of CPUs included.
        started_at: seconds since 1970.
        wall_s: seconds from its start to its end, nested entries included.
        cost: of this entry without those nested in it.
        reused: what an artefact found ready had cost when it was made, None otherwise; not part of `cost`.
        is_finished: False when the process died inside the entry, which then counts up to its last sign of life.
        error: type of the exception that left the entry, "" for none.
    """

    id: str
    parent: str
    phase: str
    stage: str
    status: Status
    run: str
    method: str
    fingerprint: str
    devices: Mapping[str, float]
    started_at: float
    wall_s: float
    cost: Cost
    reused: Cost | None = None
    is_finished: bool = True
    error: str = ""


@dataclass(slots=True)
class _Entry:
    """A row before the entries nested in it are subtracted."""

    started: Mapping[str, Any]
    last: Mapping[str, Any]
    is_finished: bool
    children: list[_Entry] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return float(self.last.get("wall_s", 0.0))

    @property
    def interval(self) -> tuple[float, float]:
        start = float(self.started["started_at"])
        return start, start + self.wall_s

    def reserved_s(self) -> dict[str, float]:
        """Device-seconds of this entry and all below it, each moment once."""
        below = self.below_s()
        own = {kind: float(count) * self.wall_s for kind, count in self.started["devices"].items()}
        return {kind: max(own.get(kind, 0.0), below.get(kind, 0.0)) for kind in [*own, *below]}

    def below_s(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for child in self.children:
            for kind, seconds in child.reserved_s().items():
                total[kind] = total.get(kind, 0.0) + seconds
        return total


def read_ledger(directory: str | Path) -> list[LedgerRow]:
    """All rows of a ledger, in the order they started; empty when there is none.

    May be called while others write: an entry that is still open counts up to its last sign of life.

    Raises:
        DataError: a line inside a file is damaged. A torn last line, which a killed process leaves, is not.
    """
    entries: dict[str, _Entry] = {}
    for file in sorted(Path(directory).glob(f"*{ENTRIES_SUFFIX}")):
        signs = _read_signs(file.with_name(file.name.removesuffix(ENTRIES_SUFFIX) + OPEN_SUFFIX))
        for event in _read_events(file):
            if event["event"] == "started":
                last = signs.get(event["id"], {})
                entries[event["id"]] = _Entry(started=event, last=last, is_finished=False)
            elif event["id"] in entries:
                entries[event["id"]].last = event
                entries[event["id"]].is_finished = True
    for entry in entries.values():
        parent = entries.get(entry.started["parent"])
        if parent is not None:
            parent.children.append(entry)
    rows = [_row(entry, entries) for entry in entries.values()]
    return sorted(rows, key=lambda row: (row.started_at, row.id))


def totals(rows: Iterable[LedgerRow], by: Grouping = "stage") -> dict[str, Cost]:
    """Cost of the rows by one of their properties, in the order of first appearance.

    Wall seconds by phase leave out nested entries and add up those of entries side by side; by anything else they are
    those of the outermost entries. What was reused is not in it, see `total_reused`.
    """
    groups: dict[str, list[LedgerRow]] = {}
    for row in rows:
        groups.setdefault(str(getattr(row, by)), []).append(row)
    if by == "phase":
        return {name: sum((row.cost for row in group), Cost()) for name, group in groups.items()}
    return {name: total(group) for name, group in groups.items()}


def total(rows: Iterable[LedgerRow]) -> Cost:
    """Cost of the rows together, over the wall seconds of those that are not nested in another of them."""
    rows = list(rows)
    ids = {row.id for row in rows}
    wall_s = sum(row.wall_s for row in rows if row.parent not in ids)
    return dataclasses.replace(sum((row.cost for row in rows), Cost()), wall_s=wall_s)


def total_reused(rows: Iterable[LedgerRow]) -> Cost:
    """What the artefacts that were found ready had cost when they were made."""
    return sum((row.reused for row in rows if row.reused is not None), Cost())


def total_below(rows: Iterable[LedgerRow], id: str) -> Cost:
    """Sum of the costs of an entry and of all entries nested in it, over the wall seconds from its start to its end.

    Args:
        rows: of the ledger.
        id: of the entry.

    Raises:
        KeyError: no such entry.
    """
    by_id = {row.id: row for row in rows}

    def is_within(row: LedgerRow) -> bool:
        return row.id == id or (row.parent in by_id and is_within(by_id[row.parent]))

    if id not in by_id:
        raise KeyError(id)
    return total(row for row in by_id.values() if is_within(row))


def money(device_s: Mapping[str, float], prices: Mapping[str, float]) -> float:
    """Price of device-seconds, in the currency of the table.

    Args:
        device_s: by kind of device.
        prices: per device-hour by kind.

    Raises:
        DataError: a kind of device that was used has no price.
    """
    missing = sorted(kind for kind, seconds in device_s.items() if seconds > 0 and kind not in prices)
    if missing:
        raise DataError(
            f"cost.prices has no price for {', '.join(missing)} (it names {', '.join(sorted(prices)) or 'nothing'}); "
            "add one per device-hour, 0 if it is free"
        )
    return sum(seconds / 3600 * prices[kind] for kind, seconds in device_s.items() if seconds > 0)


def _row(entry: _Entry, entries: Mapping[str, _Entry]) -> LedgerRow:
    started, last = entry.started, entry.last
    below = entry.below_s()
    root = entry
    while root.started["parent"] in entries:
        root = entries[root.started["parent"]]
    reused = started.get("reused")
    return LedgerRow(
        id=started["id"],
        parent=started["parent"],
        phase=started["phase"],
        stage=root.started["phase"],
        status=started["status"],
        run=started["run"],
        method=started["method"],
        fingerprint=started["fingerprint"],
        devices=started["devices"],
        started_at=started["started_at"],
        wall_s=entry.wall_s,
        cost=Cost(
            wall_s=max(0.0, entry.wall_s - _covered(entry)),
            device_s={
                kind: max(0.0, count * entry.wall_s - below.get(kind, 0.0))
                for kind, count in started["devices"].items()
            },
            counts=Counts(**last.get("counts", {})),
            peak_rss_mib=last.get("peak_rss_mib", 0.0),
            peak_device_mib=last.get("peak_device_mib", 0.0),
        ),
        reused=None if reused is None else Cost.from_plain(reused),
        is_finished=entry.is_finished,
        error=last.get("error", ""),
    )


def _covered(entry: _Entry) -> float:
    """Seconds of an entry in which at least one entry nested in it was open."""
    start, stop = entry.interval
    covered, reached = 0.0, start
    for child_start, child_stop in sorted(child.interval for child in entry.children):
        child_start, child_stop = max(child_start, reached), min(child_stop, stop)
        if child_stop > child_start:
            covered += child_stop - child_start
            reached = child_stop
    return covered


def _read_events(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").split("\n")
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was being written
        try:
            events.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{file}, line {number}, is no ledger entry; restore the file or remove that line"
            ) from error
    return events


def _read_signs(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """What a process said last about its open entries, by id; nothing when it had none or died before it could."""
    try:
        content: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content
