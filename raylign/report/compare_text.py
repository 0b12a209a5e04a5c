"""A comparison for a terminal."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from raylign.report.compare_constraint import constraint_tables
from raylign.report.compare_facts import derive
from raylign.report.compare_tables import (
    Table,
    cost_table,
    phase_tables,
    projection_table,
    quality_table,
    ratio_table,
    target_table,
)

if TYPE_CHECKING:
    from raylign.report.compare_data import ComparisonResult

_WIDTH = 118


def comparison_text(result: ComparisonResult) -> str:
    """All tables, with their notes.

    Raises:
        ConfigError: a size of `result.projections` is not known.
    """
    facts = derive(result)
    tables = [
        quality_table(result),
        *constraint_tables(result, facts),
        cost_table(result, facts),
        *phase_tables(result, facts),
        ratio_table(result, facts),
        target_table(result, facts),
        projection_table(result, facts),
    ]
    return "\n\n".join(map(_render, tables))


def _render(table: Table) -> str:
    body = _paragraphs(table) if table.is_list else _grid(table)
    notes = [line for note in table.notes for line in textwrap.wrap(note, _WIDTH)]
    return "\n".join([table.title, "-" * len(table.title), *body, *notes])


def _grid(table: Table) -> list[str]:
    lines = [table.columns, *(tuple(cell.text for cell in row) for row in table.rows)]
    # a long reason may run over the empty cells after it
    widths = [
        max(len(line[column]) for line in lines if column + 1 == len(line) or any(line[column + 1 :]))
        for column in range(len(table.columns))
    ]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _paragraphs(table: Table) -> list[str]:
    lines: list[str] = []
    for title, *cells in table.rows:
        lines += textwrap.wrap(title.text, _WIDTH)
        for column, cell in zip(table.columns[1:], cells, strict=True):
            if cell.text:
                lines += textwrap.wrap(f"{column}: {cell.text}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines
