"""The tables of a comparison, the same in the terminal and in the HTML; cells name their place in `comparison.json`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from raylign.cost.compare import MIN_SEEDS, MeasuredRatio, TargetReached
from raylign.report.compare_facts import FOUND_READY, ComparisonFacts, RatioRow, Spread
from raylign.report.data import NotMeasured
from raylign.report.wording import METRIC_ROWS, MetricRow, format_interval, format_number, is_significant
from raylign.types import Interval

if TYPE_CHECKING:
    from raylign.report.compare_data import ComparisonResult

_QUALITIES = ("attack_success", "violation_rate", "over_refusal", "degenerate", "mean_reward")
_NO_POINT = str(NotMeasured(reason="no checkpoint was evaluated"))
_format_seconds = "{:,.1f}".format
_format_extra = "{:+,.1f}".format  # more or less than something else
_format_count = "{:,.0f}".format
_format_flops = "{:.3g}".format
_format_mib = "{:,.0f} MiB".format


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        text: shown.
        key: path in `comparison.json`, dotted, positions in lists as numbers; "" for words.
        tone: whether a significant change is good or bad.
    """

    text: str
    key: str = ""
    tone: Literal["", "good", "bad"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        columns: headers, one per cell of a row.
        rows: the first cell of each is its header.
        notes: below it.
        is_list: rows are better shown as paragraphs where a line is short.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    is_list: bool = False


def quality_table(result: ComparisonResult) -> Table:
    """What each method reached at its last checkpoint."""
    metrics = [row for name in _QUALITIES for row in METRIC_ROWS if row.name == name]
    return Table(
        title="Quality at the last checkpoint",
        columns=("metric", "method", "mean [95 %]", "change against before [95 %]"),
        rows=tuple(row for metric in metrics for row in _quality_rows(result, metric)),
        notes=(
            result.sampling,
            f"Over {_seeds(result)}. Intervals are over prompts, the answers of all seeds to a prompt averaged first; "
            "the spread between trainings is not in them.",
            "* the paired interval leaves out 0. Read attack success beside over-refusal and degenerate answers.",
        ),
    )


def _quality_rows(result: ComparisonResult, metric: MetricRow) -> list[tuple[Cell, ...]]:
    before = getattr(result.before, metric.name)
    rows: list[tuple[Cell, ...]] = [
        (
            Cell(text=metric.label),
            Cell(text="before"),
            Cell(text=format_interval(before, metric.unit), key=f"before.{metric.name}"),
            Cell(text=""),
        )
    ]
    for index, method in enumerate(result.methods):
        cells = (Cell(text=_NO_POINT), Cell(text=""))
        if method.points:
            comparison, key = method.points[-1].comparison, f"methods.{index}.points.{len(method.points) - 1}"
            change: Interval | None = getattr(comparison.difference, metric.name)
            after = format_interval(getattr(comparison.after, metric.name), metric.unit)
            mark = " *" if is_significant(change) else ""
            cells = (
                Cell(text=after, key=f"{key}.comparison.after.{metric.name}"),
                Cell(
                    text=format_interval(change, metric.unit, is_difference=True) + mark,
                    key=f"{key}.comparison.difference.{metric.name}",
                    tone=_tone(change, metric) if mark else "",
                ),
            )
        rows.append((Cell(text=""), Cell(text=method.name), *cells))
    return rows


def _tone(change: Interval | None, metric: MetricRow) -> Literal["", "good", "bad"]:
    if change is None or metric.direction == "none":
        return ""
    return "good" if (change.mean < 0) == (metric.direction == "lower") else "bad"


def cost_table(result: ComparisonResult, facts: ComparisonFacts) -> Table:
    """What one run of each method took."""
    lines: list[tuple[str, str, Callable[[float], str]]] = []
    for kind in facts.kinds:
        lines.append((f"Device-seconds, {kind}", f"device_s.{kind}", _format_seconds))
        lines.append((f"... extra over {result.baseline}", f"extra_device_s.{kind}", _format_extra))
        lines.append(("... of phases that work", f"work_device_s.{kind}", _format_seconds))
    lines += [
        ("Generated tokens", "generated_tokens", _format_count),
        ("Decode steps, one after another", "decode_steps", _format_count),
        ("Tokens through forwards and backwards", "passed_tokens", _format_count),
        ("Model FLOPs, computed", "flops", _format_flops),
        ("Weights sent to samplers", "synced_bytes", _format_bytes),
        ("Peak memory of a process", "peak_rss_mib", _format_mib),
    ]
    if any(costs.peak_device_mib.high for costs in facts.costs):
        lines.append(("Peak device memory of a process", "peak_device_mib", _format_mib))
    if result.prices is not None:
        lines.append((f"Price, {result.currency}", "money", _format_money))
    rows: list[tuple[Cell, ...]] = []
    for label, place, form in lines:
        field, _, kind = place.partition(".")
        cells = [Cell(text=label)]
        for index, costs in enumerate(facts.costs):
            value = getattr(costs, field)
            if kind and kind not in value:
                cells.append(Cell(text="the baseline"))
            else:
                shown = _format_spread(value[kind] if kind else value, form)
                cells.append(Cell(text=shown, key=f"derived.costs.{index}.{place}"))
        rows.append(tuple(cells))
    return Table(
        title="Cost of one run",
        columns=("", *(method.name for method in result.methods)),
        rows=tuple(rows),
        notes=(
            f"Mean over {_seeds(result)} [least, most]; one value where all seeds agree. A run is charged with the "
            "shared phases that it needs. Device-seconds are reserved devices times wall seconds, idle time included.",
            "FLOPs and tokens count real tokens through the policy and its reference; fits of rewards and cost models, "
            "and what those of texts read, are in the device-seconds alone.",
            "FLOPs follow from formulas and are not divided.",
            *_killed_notes(result),
        ),
    )


def _killed_notes(result: ComparisonResult) -> list[str]:
    killed = [f"{method.name} {method.num_killed}" for method in result.methods if method.num_killed]
    if not killed:
        return []
    return [
        f"Ledger rows of killed sessions, over all seeds: {', '.join(killed)}. They count up to their last sign of "
        "life; what was done again after a resume is paid twice, and spreads and ratios hold it."
    ]


def phase_tables(result: ComparisonResult, facts: ComparisonFacts) -> list[Table]:
    """Where the device-seconds went, one table per kind of device."""
    tables = []
    for kind, phases in facts.phases.items():
        rows = [
            (
                Cell(text=phase),
                *(
                    Cell(text=_format_seconds(seconds), key=f"derived.phases.{kind}.{phase}.{index}")
                    for index, seconds in enumerate(means)
                ),
            )
            for phase, means in phases.items()
        ]
        totals = [
            Cell(text=_format_seconds(costs.device_s[kind].mean), key=f"derived.costs.{index}.device_s.{kind}.mean")
            for index, costs in enumerate(facts.costs)
        ]
        notes = [
            f"Mean over {_seeds(result)}. No moment is counted twice. features, extract and train are what is left "
            "outside the phases nested in them: start-up, loading, waiting."
        ]
        if FOUND_READY in phases:
            notes.append(f"{FOUND_READY}: what cached artefacts had cost when they were made.")
        tables.append(
            Table(
                title=f"Device-seconds by ledger phase, {kind}",
                columns=("phase", *(method.name for method in result.methods)),
                rows=(*rows, (Cell(text="all"), *totals)),
                notes=tuple(notes),
            )
        )
    return tables


def ratio_table(result: ComparisonResult, facts: ComparisonFacts) -> Table:
    """Every ratio with its accounting and the quality on both sides."""
    notes = [
        f"Device-seconds only. Extra means: more than {result.baseline} with the same seed. A ratio is shown when both "
        f"sides were measured on equal settings over at least {MIN_SEEDS} seeds, with Fieller's 95 % interval; a lower "
        f"bound when {result.rerank} may cost nothing extra. What a fresh pair costs over a "
        "re-weighted one takes interleaved updates, which a comparison does not run.",
        "The shared phases (ingest, features, reward) ran once and enter every seed as the same number: the interval "
        "does not hold their variation.",
    ]
    if not facts.ratios:
        notes.insert(0, str(NotMeasured(reason="no online method was compared")))
    return Table(
        title=f"Overhead of online methods in units of {result.rerank}",
        columns=("method and accounting", "ratio", "numerator, denominator", "quality above", "quality below"),
        rows=tuple(_ratio_cells(row, f"derived.ratios.{index}") for index, row in enumerate(facts.ratios)),
        notes=tuple(notes),
        is_list=True,
    )


def _ratio_cells(row: RatioRow, key: str) -> tuple[Cell, ...]:
    ratio = row.ratio
    sides = Cell(text="")
    if isinstance(ratio, MeasuredRatio):
        shown = " over ".join(
            f"{name} {mean:.3g} {row.kind} device-seconds" for name, mean in (ratio.numerator, ratio.denominator)
        )
        sides = Cell(text=shown, key=f"{key}.ratio")
        ratio = replace(ratio, qualities=None)
    qualities = [
        Cell(text=f"{name}: violations {_rate(violations)}, over-refusal {_rate(refusals)}", key=key)
        for name, violations, refusals in zip(
            (row.online, row.rerank), row.violation_rate, row.over_refusal, strict=True
        )
    ]
    title = Cell(text=f"{row.online} over {row.rerank}, {row.kind}: {row.accounting}")
    return title, Cell(text=str(ratio), key=f"{key}.ratio"), sides, *qualities


def _rate(interval: Interval | None) -> str:
    return _NO_POINT if interval is None else format_interval(interval, "share")


def target_table(result: ComparisonResult, facts: ComparisonFacts) -> Table:
    """Device-seconds until the violation rate was at or below the target."""
    rows: list[tuple[Cell, ...]] = []
    for index, row in enumerate(facts.targets):
        key, reached = f"derived.targets.{index}.reached", row.reached
        cells: tuple[Cell, ...]
        if isinstance(reached, TargetReached):
            cells = (
                Cell(text=_format_seconds(reached.device_s), key=f"{key}.device_s"),
                Cell(text=format_interval(reached.rate, "share"), key=f"{key}.rate"),
                Cell(text="whole interval" if reached.is_certain else "mean only"),
            )
        else:
            cells = (Cell(text=reached.reason, key=key), Cell(text=""), Cell(text=""))
        rows.append((Cell(text=row.method), Cell(text=row.kind), *cells))
    return Table(
        title=f"Device-seconds to a violation rate of {format_number(result.target, 'share')}",
        columns=("method", "device", "device-seconds", "violation rate there", "at or below the target"),
        rows=tuple(rows),
        notes=("The first evaluated checkpoint at or below the target; nothing is interpolated between checkpoints.",),
    )


def projection_table(result: ComparisonResult, facts: ComparisonFacts) -> Table:
    """What larger models would compute by formula, marked as a projection on every row."""
    fields: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("FLOPs", "flops", _format_flops),
        ("generated tokens", "generated_tokens", _format_count),
        ("decode steps", "decode_steps", _format_count),
        ("forward tokens", "forward_tokens", _format_count),
        ("weights sent", "synced_bytes", _format_bytes),
    )
    settings = result.projection_settings
    return Table(
        title="PROJECTION to larger models: by formula, not measured",
        columns=("status", "model", "side", "phase", *(label for label, _, _ in fields)),
        rows=tuple(
            (
                Cell(text=row.label),
                Cell(text=row.model),
                Cell(text=row.side),
                Cell(text=row.phase),
                *(
                    Cell(text=form(getattr(row.counts, name)), key=f"derived.projection.{index}.counts.{name}")
                    for _, name, form in fields
                ),
            )
            for index, row in enumerate(facts.projection)
        ),
        notes=(
            f"One refresh: {settings.num_samples} responses of {settings.response_tokens:,} tokens to each of "
            f"{settings.num_prompts:,} prompts of {settings.prompt_tokens:,} tokens (online), and one pass over "
            f"{settings.num_pairs:,} pairs on both sides. No seconds follow from FLOPs, and no ratio is made of them.",
        ),
    )


def _seeds(result: ComparisonResult) -> str:
    return f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"


def spread_text(seconds: Spread) -> str:
    """Device-seconds of one run over the seeds."""
    return _format_spread(seconds, _format_seconds)


def _format_spread(value: Spread | NotMeasured, form: Callable[[float], str]) -> str:
    """Mean [least, most], or one value when they read alike."""
    if isinstance(value, NotMeasured):
        return str(value)
    mean, low, high = (form(number) for number in (value.mean, value.low, value.high))
    return mean if low == high == mean else f"{mean} [{low}, {high}]"


def _format_money(value: float) -> str:
    """An amount; small ones with three digits."""
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _format_bytes(value: float) -> str:
    """Bytes as megabytes or gigabytes."""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
