"""The figures of a safety constraint: its path over rounds, and costs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator, PercentFormatter

from raylign.report.constraint_data import ConstraintReport, CostShares
from raylign.report.figures import BLUE, COLORS, GREY, MARKERS, VERMILION, empty_panel, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = ("-", "--", ":")
_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Cost of responses: above 0 is unsafe", (("mean_cost", "mean C"), ("rectified_cost", "mean max(C, 0)"))),
    ("Cost of the costliest (CVaR): lower is better", (("cvar", "CVaR"),)),
    ("Safety: higher is better", (("safety_rate", "responses"), ("prompt_safety_rate", "prompts"))),
    (
        "Do prompts pay for each other?",
        (("under", "too costly"), ("over", "safer than needed"), ("compensation", "compensated")),
    ),
)
_BOUNDED = {"expected": "mean_cost", "rectified_mean": "mean_cost"}  # else the rectified cost


def constraint_paths(report: ConstraintReport) -> Figure:
    """Multiplier, costs, tail, safety and compensation over rounds.

    Args:
        report: of sampled responses.
    """
    points = report.points
    if not points:
        return empty_panel("Constraint over rounds", "no round was finished")
    figure = new_figure(10.8, 5.6)
    first, *others, last = figure.subplots(2, 3).ravel()
    last.set_axis_off()
    _multiplier(first, report)
    for axes, (title, series) in zip(others, _PANELS, strict=True):
        for (name, label), color, line, marker in zip(series, COLORS, _LINES, MARKERS, strict=False):
            _line(axes, [getattr(point, name) for point in points], line, marker, color, label)
        axes.set_title(title, fontsize=10)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False, loc="best")
    costs, _, safety, _ = others
    if report.bound is not None:
        of = dict(_PANELS[0][1])[_BOUNDED.get(report.kind, "rectified_cost")]
        costs.axhline(report.bound, color="black", lw=1, label=f"bound of {of}")
        costs.legend(fontsize=8, frameon=False, loc="best")
    safety.set_ylim(-0.03, 1.03)
    safety.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (first, *others):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def _multiplier(axes: Axes, report: ConstraintReport) -> None:
    points = report.points
    values = [point.multiplier for point in points if point.multiplier is not None]
    axes.set_title("Multiplier" if report.cap is None else f"Multiplier (cap {report.cap:g})", fontsize=10)
    if len(values) < len(points):
        axes.text(0.5, 0.5, "no constraint", ha="center", va="center", transform=axes.transAxes)
        return
    _line(axes, values, "-", "o", BLUE, "multiplier")
    capped = {index: values[index - 1] for index, point in enumerate(points, start=1) if point.is_at_cap}
    if capped:
        axes.plot(list(capped), list(capped.values()), "X", color=VERMILION, ms=8, label="at its cap")
        axes.legend(fontsize=8, frameon=False, loc="best")
    axes.set_ylim(0, 1.1 * max(values) or 1.0)


def _line(axes: Axes, values: Sequence[float], line: str, marker: str, color: str, label: str) -> None:
    axes.plot(range(1, len(values) + 1), values, line, marker=marker, color=color, ms=3, label=label)


def cost_shares_figure(histograms: Sequence[CostShares]) -> Figure:
    """Histograms of costs on one scale, the first filled, the others as outlines.

    Args:
        histograms: of two or three kinds of responses, on the same edges.
    """
    if not histograms:
        return empty_panel("Cost of responses", "no response has a cost")
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    edges = histograms[0].edges
    axes.axvspan(0, edges[-1], color=VERMILION, alpha=0.08, lw=0, label="unsafe (cost > 0)")
    first, *others = histograms
    axes.stairs(first.shares, edges, fill=True, color=GREY, alpha=0.55, hatch="//", ec="white", label=_name(first))
    for index, (shares, color) in enumerate(zip(others, COLORS, strict=False)):
        axes.stairs(shares.shares, edges, color=color, lw=2, ls=_LINES[index % len(_LINES)], label=_name(shares))
    axes.axvline(0, color="black", lw=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("cost by the run's cost model")
    axes.set_ylabel("share of responses")
    axes.set_title("Cost of responses: further left is better")
    legend_below(figure, axes, num_columns=2, last=["unsafe (cost > 0)"])
    return figure


def _name(shares: CostShares) -> str:
    return f"{shares.name} (n = {shares.num_responses:,})"
