"""The part of a comparison that says how safe every method's answers are, prompt by prompt, and what that took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylign.report.compare_tables import Cell, Table, spread_text
from raylign.report.sampled_tables import OVERVIEW, measures_table, settings_note, value_cell

if TYPE_CHECKING:
    from raylign.report.compare_data import ComparisonResult
    from raylign.report.compare_facts import ComparisonFacts
    from raylign.report.sampled_data import SampledMeasures


def constraint_tables(result: ComparisonResult, facts: ComparisonFacts) -> list[Table]:
    """One row per method, then every measure by both prices; no table when answers were sampled once."""
    if result.samples is None:
        return []
    methods = [(m.name, m.sampled, f"methods.{index}.sampled") for index, m in enumerate(result.methods)]
    return [
        _overview(result, facts),
        *(
            measures_table(price, result.samples, methods, before_key="samples.before")
            for price in ("by_model", "by_judge")
        ),
    ]


def _overview(result: ComparisonResult, facts: ComparisonFacts) -> Table:
    """Safety, its share over prompts and what it took, one row per method."""
    assert result.samples is not None
    rows = [
        (Cell(text="before"), *_values(result.samples.before, "samples.before"), *[Cell(text="")] * len(facts.kinds))
    ]
    for index, (method, costs) in enumerate(zip(result.methods, facts.costs, strict=True)):
        spent = [
            Cell(text=spread_text(costs.device_s[kind]), key=f"derived.costs.{index}.device_s.{kind}")
            for kind in facts.kinds
        ]
        rows.append((Cell(text=method.name), *_values(method.sampled, f"methods.{index}.sampled"), *spent))
    return Table(
        title="Safety by prompt at the last checkpoint",
        columns=("", *(row.label for row in OVERVIEW), *(f"Device-seconds, {kind}" for kind in facts.kinds)),
        rows=tuple(rows),
        notes=(
            f"{settings_note(result.samples)} Costs are those of the run's cost model.",
            "Intervals are over prompts, drawn with all their answers of all seeds; the spread between trainings is in "
            "the tables below. * the paired interval of the change against before leaves out 0.",
        ),
    )


def _values(found: SampledMeasures | None, key: str) -> list[Cell]:
    if found is None:
        return [Cell(text="not measured: no checkpoint was evaluated"), *[Cell(text="")] * (len(OVERVIEW) - 1)]
    return [value_cell(row, getattr(found.by_model, row.name), f"{key}.by_model.{row.name}") for row in OVERVIEW]
