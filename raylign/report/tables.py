"""A `Table` for a terminal and for a page."""

from __future__ import annotations

import textwrap
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylign.report.compare_tables import Cell, Table

WIDTH = 118  # of a terminal


def table_text(table: Table) -> str:
    """Title, columns aligned, and notes."""
    lines = [table.columns, *(tuple(cell.text for cell in row) for row in table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    grid = ["  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([table.title, "-" * len(table.title), *grid, *wrapped(*table.notes)])


def wrapped(*paragraphs: str, indent: str = "") -> list[str]:
    """Lines of a terminal, those after the first of a paragraph indented."""
    return [line for text in paragraphs for line in textwrap.wrap(text, WIDTH, subsequent_indent=indent)]


def table_html(table: Table) -> str:
    """The grid and the notes; cells name their place in the JSON file as `data-key`."""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(_row(row) for row in table.rows)
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in table.notes)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"


def _row(row: tuple[Cell, ...]) -> str:
    first, *rest = row
    return f"<tr><th scope='row'>{escape(first.text)}</th>{''.join(map(_cell, rest))}</tr>"


def _cell(cell: Cell) -> str:
    key = f" data-key='{escape(cell.key)}'" if cell.key else ""
    tone = f" class='{cell.tone}'" if cell.tone else ""
    return f"<td{key}{tone}>{escape(cell.text)}</td>"
