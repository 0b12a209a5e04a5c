"""The HTML report of a comparison: one file, no external reference.

Every cell that shows a number of `comparison.json` carries its place there as `data-key`.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from raylign.report import compare_plots as plots
from raylign.report.compare_constraint import constraint_tables
from raylign.report.compare_facts import ComparisonFacts, derive
from raylign.report.compare_tables import (
    Cell,
    Table,
    cost_table,
    phase_tables,
    projection_table,
    quality_table,
    ratio_table,
    target_table,
)
from raylign.report.data import NotMeasured
from raylign.report.plots import to_data_uri
from raylign.report.style import STYLE
from raylign.report.wording import judge_outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from raylign.report.compare_data import ComparisonResult


def render_comparison(result: ComparisonResult) -> str:
    """The whole comparison as one HTML document.

    Raises:
        ConfigError: a size of `result.projections` is not known.
    """
    facts = derive(result)
    rates = [
        _figure(plots.rates_by_device_seconds(result, kind), f"Safety and over-refusal against {kind} device-seconds")
        for kind in facts.kinds
    ]
    rates.append(_figure(plots.rates_by_flops(result), "Safety and over-refusal against model FLOPs"))
    bars = [
        _figure(plots.phase_bars(result.methods, phases, kind), f"{kind} device-seconds by ledger phase and method")
        for kind, phases in facts.phases.items()
    ]
    sections = [
        _headline(result, facts),
        _section(quality_table(result)),
        *map(_section, constraint_tables(result, facts)),
        _titled(
            "What was reached against what it took",
            "".join(rates)
            + "<p class='note'>One marker per evaluated checkpoint; vertical bars are 95 % intervals over prompts, "
            "horizontal bars reach from the least to the most of the seeds. Costs hold the shared phases.</p>",
        ),
        _section(cost_table(result, facts)),
        *(_section(table, figure) for table, figure in zip(phase_tables(result, facts), bars, strict=True)),
        _section(ratio_table(result, facts)),
        _section(target_table(result, facts)),
        _section(projection_table(result, facts)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>raylign: {escape(result.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(result: ComparisonResult, facts: ComparisonFacts) -> str:
    lines = []
    for method in result.methods:
        outcome = (
            judge_outcome(method.points[-1].comparison).headline
            if method.points
            else str(NotMeasured(reason="no checkpoint was evaluated"))
        )
        lines.append(f"<li><b>{escape(method.name)}</b> {escape(outcome)}</li>")
    seeds = ", ".join(str(seed) for seed in result.seeds)
    return (
        f"<header><p class='kicker'>raylign comparison {escape(result.name)}</p>"
        f"<h1 class='neutral'>{len(result.methods)} methods, seeds {seeds}, one ledger</h1><ul>{''.join(lines)}</ul>"
        f"<p class='meta'>Costs are counted from {escape(result.baseline)}, in units of {escape(result.rerank)}, on "
        f"{escape(', '.join(facts.kinds)) or 'no device'}. The judge is a model: these are its verdicts, not a "
        "guarantee.</p></header>"
    )


def _section(table: Table, before: str = "") -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(_row(row) for row in table.rows)
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in table.notes)
    grid = f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return _titled(table.title, before + (grid if table.rows else "") + notes)


def _row(row: tuple[Cell, ...]) -> str:
    first, *rest = row
    return f"<tr><th scope='row'>{escape(first.text)}</th>{''.join(map(_cell, rest))}</tr>"


def _cell(cell: Cell) -> str:
    key = f" data-key='{escape(cell.key)}'" if cell.key else ""
    tone = f" class='{cell.tone}'" if cell.tone else ""
    return f"<td{key}{tone}>{escape(cell.text)}</td>"


def _titled(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(figure: Figure, description: str) -> str:
    return f"<img src='{to_data_uri(figure)}' alt='{escape(description)}'>"
