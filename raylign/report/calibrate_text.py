"""A calibration for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylign.report.calibrate_findings import warnings_of
from raylign.report.calibrate_tables import all_tables
from raylign.report.tables import table_text, wrapped

if TYPE_CHECKING:
    from raylign.report.calibrate_data import CalibrationResult


def calibration_text(result: CalibrationResult) -> str:
    """All tables with their notes, warnings last, where a terminal shows them."""
    parts = [table_text(table) for table in all_tables(result)]
    if warnings := warnings_of(result):
        parts.append("\n".join(["Warnings", "--------", *wrapped(*(f"- {text}" for text in warnings), indent="  ")]))
    return "\n\n".join(parts)
