"""Tables of what several answers to every evaluation prompt say of policies, for a run and for a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raylign.report.compare_tables import Cell, Table
from raylign.report.sampled_data import SampledMeasures, SampledSettings
from raylign.report.wording import Unit, format_interval, format_number, is_significant

if TYPE_CHECKING:
    from raylign.evaluation.sampled_costs import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRow:
    """How one measure is shown.

    Attributes:
        name: field of `ConstraintMeasures`.
        label: for people.
        unit: decides the format.
        direction: what is better; "none" for a measure without a good direction.
        is_change: its value is a change already.
        is_priced: it depends on who prices the answers.
    """

    name: str
    label: str
    unit: Unit
    direction: Literal["lower", "higher", "none"] = "lower"
    is_change: bool = False
    is_priced: bool = True


ROWS = (
    MeasureRow(name="safety_rate", label="Safe answers", unit="share", direction="higher"),
    MeasureRow(name="unsafe_prompts", label="Unsafe prompts", unit="share"),
    MeasureRow(name="unsafe_harmful", label="Unsafe prompts, of the harmful ones", unit="share"),
    MeasureRow(name="mean_cost", label="Mean cost", unit="logit", direction="none"),
    MeasureRow(name="rectified_cost", label="Mean max(cost, 0)", unit="logit"),
    MeasureRow(name="under", label="Too costly", unit="logit"),
    MeasureRow(name="over", label="Safer than needed", unit="logit", direction="none"),
    MeasureRow(name="compensation", label="Compensated", unit="logit"),
    MeasureRow(name="became_unsafe", label="Became unsafe, of prompts that were safe", unit="share"),
    MeasureRow(name="chance_unsafe", label="... by chance alone", unit="share", direction="none"),
    MeasureRow(name="became_safe", label="Became safe, of prompts that were not", unit="share", direction="higher"),
    MeasureRow(name="chance_safe", label="... by chance alone", unit="share", direction="none"),
    MeasureRow(
        name="safe_reward",
        label="Change of reward on prompts that were safe",
        unit="reward",
        direction="higher",
        is_change=True,
    ),
    MeasureRow(name="mean_reward", label="Mean reward", unit="reward", direction="higher", is_priced=False),
    MeasureRow(name="over_refusal", label="Over-refusal (harmless prompts)", unit="share", is_priced=False),
)
_OVERVIEW = ("safety_rate", "unsafe_prompts", "compensation", "mean_reward", "over_refusal")
OVERVIEW = tuple(row for row in ROWS if row.name in _OVERVIEW)
PRICES = {"by_model": "the run's cost model", "by_judge": "the judge"}


def measures_table(
    price: Literal["by_model", "by_judge"],
    settings: SampledSettings,
    methods: Sequence[tuple[str, SampledMeasures | None, str]],
    *,
    before_key: str,
) -> Table:
    """Every measure of every policy by one price.

    Args:
        price: who says what answers cost.
        settings: of the sampling, with the policy before training.
        methods: name, measures and place of the measures in the page's JSON.
        before_key: place of the policy before training.
    """
    rows = []
    policies = [("before", settings.before, before_key), *methods]
    for row in ROWS:
        if not row.is_priced and price == "by_judge":
            continue
        label = row.label
        for name, found, key in policies:
            if found is None:
                cells = [Cell(text="not measured: no checkpoint was evaluated"), Cell(text=""), Cell(text="")]
            else:
                measure: Measure | None = getattr(getattr(found, price), row.name)
                if measure is None and name == "before":
                    continue  # the policy before training has not changed
                cells = _cells(row, measure, f"{key}.{price}.{row.name}")
            rows.append((Cell(text=label), Cell(text=name), *cells))
            label = ""
    return Table(
        title=f"Answers by {PRICES[price]}",
        columns=("measure", "policy", "mean [95 %]", "seeds, least to most", "change against before [95 %]"),
        rows=tuple(rows),
        notes=_NOTES[price],
    )


_NOTES = {
    "by_model": (
        "Constrained methods were trained against these costs. Too costly and safer than needed are means over prompts "
        "of the positive and the negative part of their mean cost; compensated is the smaller of the two.",
        "Answers are samples, so prompts change sides by chance as well: as often as that if each prompt's answers "
        "before and after were shuffled.",
    ),
    "by_judge": ("No method was trained against these costs.",),
}


def settings_note(settings: SampledSettings) -> str:
    """How the answers came about, in words."""
    needed = math.ceil(settings.prompt_safety * settings.num_answers - 1e-9)
    return (
        f"{settings.num_answers} answers of the final policy to every evaluation prompt, harmful and harmless, at "
        f"temperature {settings.temperature:g}. A prompt is unsafe when fewer than {needed} of its "
        f"{settings.num_answers} answers are safe ({100 * settings.prompt_safety:g} %)."
    )


def value_cell(row: MeasureRow, measure: Measure | None, key: str) -> Cell:
    """A measure with its interval, marked when it changed."""
    if measure is None:
        return Cell(text=format_interval(None, row.unit))
    changed = measure.value if row.is_change else measure.change
    is_marked = is_significant(changed)
    return Cell(
        text=format_interval(measure.value, row.unit, is_difference=row.is_change) + (" *" if is_marked else ""),
        key=f"{key}.value",
        tone=_tone(row, changed.mean) if is_marked and changed is not None else "",
    )


def _cells(row: MeasureRow, measure: Measure | None, key: str) -> list[Cell]:
    if measure is None:
        return [value_cell(row, measure, key), Cell(text=""), Cell(text="")]
    change = Cell(text="")
    if measure.change is not None:
        is_marked = is_significant(measure.change)
        change = Cell(
            text=format_interval(measure.change, row.unit, is_difference=True) + (" *" if is_marked else ""),
            key=f"{key}.change",
            tone=_tone(row, measure.change.mean) if is_marked else "",
        )
    known = [value for value in measure.by_seed if math.isfinite(value)]
    ends = [format_number(end(known), row.unit, is_difference=row.is_change) for end in (min, max) if known]
    ends = list(dict.fromkeys(ends))  # one where all seeds agree
    seeds = Cell(text=" to ".join(ends), key=f"{key}.by_seed" if ends else "")
    return [
        Cell(text=format_interval(measure.value, row.unit, is_difference=row.is_change), key=f"{key}.value"),
        seeds,
        change,
    ]


def _tone(row: MeasureRow, change: float) -> Literal["", "good", "bad"]:
    if row.direction == "none":
        return ""
    return "good" if (change < 0) == (row.direction == "lower") else "bad"
