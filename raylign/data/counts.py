"""What ingest did with every row it read, and when that is a reason to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raylign.errors import DataError, QuarantineLimitError

_NUM_REASONS_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestCounts:
    """Where the rows went: `rows_read == used + sum(quarantined.values()) + sampled_out`.

    Attributes:
        rows_read: rows found, blank lines not counted.
        used: valid pairs written.
        quarantined: rows set aside, by reason; duplicates are among them.
        sampled_out: valid pairs left out by `data.max_pairs`.
        splits: used pairs by split.
        cut: answers of used pairs that fill `data.max_length`, so that they were cut there (or just fit).
        contradictions: pairs of used rows that prefer opposite answers to one prompt; both stay in the data, because
            which of them is right is for the reward to say.
    """

    rows_read: int
    used: int
    quarantined: Mapping[str, int]
    sampled_out: int
    splits: Mapping[str, int]
    cut: int
    contradictions: int

    @property
    def num_quarantined(self) -> int:
        """Rows set aside for any reason."""
        return sum(self.quarantined.values())

    def check_sums(self) -> None:
        """Every row is accounted for; a failure is a mistake in raylign, not in the data."""
        accounted = self.used + self.num_quarantined + self.sampled_out
        assert self.rows_read == accounted, f"{self.rows_read} rows read but {accounted} accounted for: {self}"
        assert self.used == sum(self.splits.values()), f"splits do not add up: {self}"


def check_usable(counts: IngestCounts, *, max_bad_fraction: float, source: str, quarantine_path: Path) -> None:
    """Stop when there is nothing to train on, or when more was set aside than was allowed for.

    Args:
        counts: of the whole data set, at least one row.
        max_bad_fraction: allowed share of quarantined rows, in [0, 1].
        source: where the rows are from, for the message.
        quarantine_path: where the refused rows are listed.

    Raises:
        DataError: no valid pair.
        QuarantineLimitError: too many rows quarantined.
    """
    reasons = ", ".join(f"{name} {number}" for name, number in _by_frequency(counts.quarantined)[:_NUM_REASONS_SHOWN])
    if not counts.used:
        raise DataError(
            f"{source} holds no valid pair: all {counts.rows_read} rows were quarantined ({reasons}); "
            f"see {quarantine_path}, and data.format when the columns are read in the wrong way"
        )
    if counts.num_quarantined > max_bad_fraction * counts.rows_read:
        raise QuarantineLimitError(
            f"{counts.num_quarantined} of {counts.rows_read} rows of {source} were quarantined ({reasons}), more than "
            f"data.max_bad_fraction={max_bad_fraction} allows; see {quarantine_path}, then repair the data or raise "
            "the limit"
        )


def _by_frequency(quarantined: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(quarantined.items(), key=lambda item: (-item[1], item[0]))
