"""The part of the HTML report that says what a safety constraint did; numbers are at `constraint.*` of report.json."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from raylign.report import constraint_plots, plots
from raylign.report.compare_tables import Cell, Table
from raylign.report.constraint_data import ConstraintPoint, ConstraintReport, EvaluatedPrompts, StoredLabels
from raylign.report.data import NotMeasured
from raylign.report.sampled_tables import measures_table, settings_note
from raylign.report.tables import table_html
from raylign.report.wording import Unit, format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from raylign.report.sampled_data import SampledRun

MAX_ROWS = 12  # of the table, before it is folded away
_COLUMNS: tuple[tuple[str, str, Unit], ...] = (
    ("multiplier", "multiplier", "logit"),
    ("mean_cost", "mean cost", "logit"),
    ("rectified_cost", "mean max(cost, 0)", "logit"),
    ("safety_rate", "safe responses", "share"),
    ("prompt_safety_rate", "safe prompts", "share"),
    ("cvar", "CVaR", "logit"),
    ("under", "too costly", "logit"),
    ("over", "safer than needed", "logit"),
    ("compensation", "compensated", "logit"),
)
_PAIRS = (
    ("share_turned", "Order by reward turned round by the cost"),
    ("share_both_safe", "Both answers safe"),
    ("share_mixed", "One answer safe"),
    ("share_both_unsafe", "Neither answer safe: no safe one to prefer"),
)
_KINDS = {
    "none": "No constraint: costs are reported and change nothing.",
    "rectified": "The multiplier weighs max(cost, 0): being safer than safe earns nothing.",
    "split": "The multiplier weighs the cost of unsafe responses alone, whose reward less that is divided by "
    "1 + multiplier unless constraint.split_normalise=none.",
    "expected": "The multiplier weighs the mean cost: safe prompts may pay for unsafe ones.",
    "rectified_mean": "The multiplier weighs the mean cost and rises with its positive part alone.",
    "fixed_penalty": "max(cost, 0) is a penalty with a fixed multiplier.",
}
_NOTE = (
    "Costs are those of the run's cost model; the rates at the top of the page are of the evaluation's judge. Too "
    "costly and safer than needed are means over prompts of the positive and the negative part of their mean cost; "
    "what is compensated is the smaller of the two. CVaR is the mean cost of the costliest responses."
)


def constraint_section(report: ConstraintReport | NotMeasured) -> str:
    """Warnings, figures and the table of a constraint."""
    if isinstance(report, NotMeasured):
        return f"<p class='missing'>{escape(str(report))}</p>"
    parts = [f"<p>{escape(_KINDS[report.kind])}{_bound(report)}</p>"]
    parts += [f"<p class='warning'>{escape(text)}</p>" for text in report.warnings]
    if report.points:
        parts += _paths(report)
    if report.stored is not None:
        parts.append(table_html(_pairs_table(report.stored)))
    if report.sampled is not None:
        parts += _sampled(report.sampled)
    parts.append(table_html(_change_table(report.evaluated)))
    categories = table_html(_category_table(report.evaluated))
    parts.append(f"<details><summary>Judged unsafe by category</summary>{categories}</details>")
    return "".join(parts)


def _paths(report: ConstraintReport) -> list[str]:
    """Figures and the table of rounds, or of what stored answers say."""
    parts = []
    if report.stored is None:
        parts.append(_figure(constraint_plots.constraint_paths(report), "Multiplier, costs and safety over rounds"))
    parts.append(_figure(constraint_plots.cost_shares_figure(report.histograms), "Costs of responses before and after"))
    table = table_html(points_table(report.points, is_stored=report.stored is not None))
    is_long = len(report.points) > MAX_ROWS
    parts.append(f"<details><summary>All {len(report.points)} rounds</summary>{table}</details>" if is_long else table)
    return parts


def _sampled(sampled: SampledRun) -> list[str]:
    """Several answers to every evaluation prompt, by the cost model and, folded away, by the judge."""
    place = "constraint.sampled"
    by_model, by_judge = (
        table_html(
            measures_table(
                price,
                sampled.settings,
                [("after", sampled.after, f"{place}.after")],
                before_key=f"{place}.settings.before",
            )
        )
        for price in ("by_model", "by_judge")
    )
    return [
        f"<p>{escape(settings_note(sampled.settings))}</p>{by_model}",
        f"<details><summary>The same answers by the judge</summary>{by_judge}</details>",
    ]


def points_table(points: tuple[ConstraintPoint, ...], *, is_stored: bool) -> Table:
    """One row per round or policy."""
    notes = [_NOTE]
    if is_stored:
        notes.append(
            "Seen through the stored answers, not measured on samples: the optimum is what the labels promise."
            if len(points) > 1
            else "The optimum of these labels is not the tilted reference (a squash, or hard labels), so none is shown."
        )
    return Table(
        title="Costs by policy" if is_stored else "Costs by round",
        columns=("policy" if is_stored else "", *(title for _, title, _ in _COLUMNS)),
        rows=tuple(
            (Cell(text=point.name), *(_cell(point, index, name, unit) for name, _, unit in _COLUMNS))
            for index, point in enumerate(points)
        ),
        notes=tuple(notes),
    )


def _cell(point: ConstraintPoint, index: int, name: str, unit: Unit) -> Cell:
    value = getattr(point, name)
    return Cell(
        text="-" if value is None else format_number(value, unit),
        key=f"constraint.points.{index}.{name}",
        tone="bad" if name == "multiplier" and point.is_at_cap else "",
    )


def _pairs_table(stored: StoredLabels) -> Table:
    rows = [("Training pairs", f"{stored.num_pairs:,}", "num_pairs"), ("Labels", stored.labels, "labels")]
    rows += [(title, format_number(getattr(stored, name), "share"), name) for name, title in _PAIRS]
    return Table(
        title="Stored pairs",
        columns=("stored pairs", ""),
        rows=tuple((Cell(text=title), Cell(text=text, key=f"constraint.stored.{key}")) for title, text, key in rows),
    )


def _change_table(evaluated: EvaluatedPrompts) -> Table:
    change, place = evaluated.change, "constraint.evaluated.change"
    rows: list[tuple[str, str, Unit]] = [
        (f"Became unsafe, of {change.num_safe_before} that were safe", "became_unsafe", "share"),
        (f"Became safe, of {change.num_unsafe_before} that were unsafe", "became_safe", "share"),
        ("Mean reward on those that were safe, before", "reward_before", "reward"),
        ("Mean reward on those that were safe, after", "reward_after", "reward"),
    ]
    return Table(
        title="Interference",
        columns=("evaluation prompts, by the judge", ""),
        rows=tuple(
            (Cell(text=title), Cell(text=format_number(getattr(change, name), unit), key=f"{place}.{name}"))
            for title, name, unit in rows
        ),
        notes=("One sampled answer a prompt: some prompts change sides by chance, without any training.",),
    )


def _category_table(evaluated: EvaluatedPrompts) -> Table:
    return Table(
        title="Judged unsafe by category",
        columns=("category", "prompts", "before", "after"),
        rows=tuple(
            (
                Cell(text=found.category),
                Cell(text=str(found.num_prompts), key=f"constraint.evaluated.categories.{index}.num_prompts"),
                *(
                    Cell(
                        text=format_number(getattr(found, name), "share"),
                        key=f"constraint.evaluated.categories.{index}.{name}",
                    )
                    for name in ("unsafe_before", "unsafe_after")
                ),
            )
            for index, found in enumerate(evaluated.categories)
        ),
        notes=("Few prompts a category: read the rates at the top of the page first.",),
    )


def _bound(report: ConstraintReport) -> str:
    if report.bound is None:
        return ""
    of = "mean cost" if report.kind in ("expected", "rectified_mean") else "mean max(cost, 0)"
    return f" It is to hold the {of} to {report.bound:g}."


def _figure(figure: Figure, description: str) -> str:
    return f"<img src='{plots.to_data_uri(figure)}' alt='{escape(description)}'>"
