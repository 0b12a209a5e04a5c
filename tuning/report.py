"""The tables of a sweep, for a terminal and a page, and what is written: `sweep.json`, `sweep.html`, `best/`."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from raylign.cost.rows import Cost
from raylign.report.compare_tables import Cell, Table
from raylign.report.plots import to_data_uri
from raylign.report.style import STYLE
from raylign.report.tables import table_html, table_text
from raylign.report.wording import format_interval
from raylign.runtime.phases import write_json
from tuning import plots
from tuning.grid import Quality, Screened
from tuning.result import PointResult, SweepResult, sweep_json

BEST = "best"
_BEFORE = "before training"
_METRICS = (("mean_reward", "reward"), ("mean_cost", "logit"), ("violation_rate", "share"), ("over_refusal", "share"))


@dataclass(frozen=True, kw_only=True)
class WrittenSweep:
    """What `write_sweep` leaves.

    Attributes:
        html: path of the self-contained report; `sweep.json` lies beside it.
        best: HF or PEFT directory of the exported policy, None when no point finished.
        text: the tables for a terminal.
    """

    html: Path
    best: Path | None
    text: str


def write_sweep(result: SweepResult, directory: Path) -> WrittenSweep:
    """Write the result below the sweep's directory, and copy the best policy to `best/`."""
    best = export_best(result, directory / BEST)
    html = directory / "sweep.html"
    html.write_text(render_sweep(result), encoding="utf-8")
    write_json(directory / "sweep.json", sweep_json(result))
    return WrittenSweep(html=html, best=best, text="\n\n".join(table_text(table) for table in tables(result)))


def export_best(result: SweepResult, directory: Path) -> Path | None:
    """Copy the policy of the best point; an older copy is replaced."""
    shutil.rmtree(directory, ignore_errors=True)
    for point in result.points:
        for seed in point.seeds:
            if (point.name, seed.seed) == (result.best, result.best_seed):
                shutil.copytree(seed.checkpoint, directory)
                return directory
    return None


def tables(result: SweepResult) -> list[Table]:
    """All tables with something in them."""
    found = [points_table(result), costs_table(result)]
    return [*found, screen_table(result)] if result.screened else found


def points_table(result: SweepResult) -> Table:
    """Reward, cost, violations of every point, and where it stands."""
    before = tuple(
        Cell(text=format_interval(getattr(result.before, name), unit), key=f"before.{name}")  # type: ignore[arg-type]
        for name, unit in _METRICS
    )
    seeds = ", ".join(map(str, result.seeds))
    notes = [
        f"Over seeds {seeds}. Intervals are over prompts, the answers of all seeds to a prompt averaged first; the "
        "spread between trainings is not in them, see the seeds in the figure. Front: no other point has both more "
        "reward and less cost; with how often that holds when the prompts are drawn again.",
        "The reward is that of the sweep's base configuration for all points, a proxy; the cost is the judge's.",
    ]
    if result.best is not None:
        notes.append(f"Exported: {result.best}, seed {result.best_seed}: {result.best_reason}.")
    if result.failures:
        notes.append("Failed: " + "; ".join(result.failures))
    if len(result.points) < result.num_points:
        notes.append(
            f"{result.num_points - len(result.points)} of {result.num_points} points were left out on cached states."
        )
    return Table(
        title=f"Sweep {result.name} over {', '.join(result.axes)}",
        columns=("point", "reward", "cost", "judged unsafe", "over-refusal", "front"),
        rows=(
            (Cell(text=_BEFORE), *before, Cell(text="")),
            *(_point_row(index, point, len(result.seeds)) for index, point in enumerate(result.points)),
        ),
        notes=tuple(notes),
    )


def _point_row(index: int, point: PointResult, num_seeds: int) -> tuple[Cell, ...]:
    name = Cell(text=", ".join(f"{key}={_value(value)}" for key, value in point.keys.items()))
    key = f"points.{index}"
    if point.comparison is None:
        kept = "failed" if point.failed else "stopped"
        return (name, *(Cell(text="-") for _ in _METRICS), Cell(text=_missing(point), key=f"{key}.{kept}"))
    after = point.comparison.after
    cells = tuple(
        Cell(text=format_interval(getattr(after, metric), unit), key=f"{key}.comparison.after.{metric}")  # type: ignore[arg-type]
        for metric, unit in _METRICS
    )
    if point.front_share is None:
        return (name, *cells, Cell(text=f"{len(point.seeds)} of {num_seeds} seeds; {_missing(point)}"))
    place = "on it" if point.is_on_front else "dominated"
    return (name, *cells, Cell(text=f"{place} ({point.front_share:.0%})", key=f"{key}.front_share"))


def _missing(point: PointResult) -> str:
    """Why seeds are missing."""
    stopped = ", ".join(f"{step} (seed {seed})" for seed, step in sorted(point.stopped.items()))
    failed = ", ".join(f"seed {seed} failed" for seed in sorted(point.failed))
    return "; ".join([f"stopped at update {stopped}"] * bool(stopped) + [failed] * bool(failed))


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def costs_table(result: SweepResult) -> Table:
    """What each point took, from the ledgers, and what separate runs would have been charged."""
    kinds = sorted({kind for point in result.points for kind in (*point.cost.device_s, *point.unshared_cost.device_s)})

    def cells(cost: Cost, key: str) -> tuple[Cell, ...]:
        return tuple(Cell(text=f"{cost.device_s.get(kind, 0.0):,.1f}", key=f"{key}.device_s.{kind}") for kind in kinds)

    rows = [
        (
            Cell(text=point.name),
            *cells(point.cost, f"points.{index}.cost"),
            *cells(point.unshared_cost, f"points.{index}.unshared_cost"),
        )
        for index, point in enumerate(result.points)
    ]
    rows.append(
        (Cell(text="shared by all, once"), *cells(result.shared_cost, "shared_cost"), *(Cell(text="") for _ in kinds))
    )
    return Table(
        title="Reserved device-seconds, all seeds of a point together",
        columns=("point", *(f"own phases, {kind}" for kind in kinds), *(f"as separate runs, {kind}" for kind in kinds)),
        rows=tuple(rows),
        notes=(
            f"{result.num_concurrent} trial(s) at a time. As separate runs: the own phases and, for each seed, the "
            "shared phases that the point reads, by the same ledger; evaluation is counted with what is shared.",
        ),
    )


def screen_table(result: SweepResult) -> Table:
    """Cheap settings on held-out pairs."""
    return Table(
        title="Cheap settings on cached states, before training",
        columns=("setting", "test accuracy", "test ECE", "test Brier", "flips", "trained"),
        rows=tuple(_screen_row(index, row, result) for index, row in enumerate(result.screened)),
        notes=(
            f"{len(result.screened)} settings x {len(result.screened[0].test)} replicates in one task, "
            f"{result.screen_s:.1f} s. Means over replicates, [least, most]. Settings are kept by validation pairs.",
        ),
    )


def _screen_row(index: int, row: Screened, result: SweepResult) -> tuple[Cell, ...]:
    is_trained = any(all(point.keys.get(key) == value for key, value in row.keys.items()) for point in result.points)
    numbers = tuple(
        Cell(text=_range(row.test, name), key=f"screened.{index}.test.0.{name}")
        for name in ("accuracy", "ece", "brier", "flips")
    )
    name = ", ".join(f"{key}={_value(value)}" for key, value in row.keys.items())
    return (Cell(text=name), *numbers, Cell(text="yes" if is_trained else "no"))


def _range(qualities: tuple[Quality, ...], name: str) -> str:
    values = [getattr(quality, name) for quality in qualities]
    return f"{math.fsum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def render_sweep(result: SweepResult) -> str:
    """The whole sweep as one HTML document without external reference."""
    figures = [(plots.pareto(result), "Reward against cost of every point")]
    figures += [(plots.rate_along(result, key), f"Violation rate against {key}") for key in plots.number_axes(result)]
    if result.screened:
        figures.append((plots.calibration(result.screened), "Calibration against ensemble size"))
    figures.append((plots.device_seconds(result), "Device-seconds of every point"))
    images = "".join(f"<img src='{to_data_uri(figure)}' alt='{escape(alt)}'>" for figure, alt in figures)
    sections = [f"<section><h2>{escape(table.title)}</h2>{table_html(table)}</section>" for table in tables(result)]
    headline = (
        f"<header><p class='kicker'>raylign sweep {escape(result.name)}</p><h1 class='neutral'>"
        f"{len(result.points)} points of space {escape(result.space)}, {len(result.seeds)} seed(s)</h1><p class='meta'>"
        "The judge is a model: these are its verdicts, not a guarantee.</p></header>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>raylign: {escape(result.name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([headline, f"<section><h2>Figures</h2>{images}</section>", *sections])
        + "\n</main>\n</body>\n</html>\n"
    )
