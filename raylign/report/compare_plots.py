"""The figures of a comparison: what was reached against what it took, and where the device-seconds went.

A method keeps its colour and marker in all figures. Nothing is drawn for what was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from raylign.report.compare_facts import spread
from raylign.report.figures import COLORS, GREY, GRID, MARKERS, empty_panel, error_bars, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from raylign.report.compare_data import ComparisonResult, MethodResult, Point
    from raylign.types import Interval

_HATCHES = ("", "//", "..", "xx")
_PANELS = (
    ("violation_rate", "Judged unsafe\n(harmful prompts)"),
    ("attack_success", "Attack success\n(harmful prompts)"),
    ("over_refusal", "Over-refusal\n(harmless prompts)"),
)
_BEFORE, _TARGET = "before training", "target"
_NARROW = 10.0  # an axis over less than this factor gets numbers between the decades


def rates_by_device_seconds(result: ComparisonResult, kind: str) -> Figure:
    """Safety and over-refusal of every checkpoint against reserved device-seconds of one kind."""
    return _rates(
        result,
        lambda point: [by_kind.get(kind, 0.0) for by_kind in point.device_s],
        f"reserved device-seconds, {kind} (log scale)",
    )


def rates_by_flops(result: ComparisonResult) -> Figure:
    """Safety and over-refusal of every checkpoint against model FLOPs."""
    return _rates(result, lambda point: point.flops, "model FLOPs by formula (log scale)")


def _rates(result: ComparisonResult, costs: Callable[[Point], Sequence[float]], label: str) -> Figure:
    """One panel per rate; lower left is better in all of them.

    Args:
        result: of the comparison.
        costs: of a point, one per seed; a point that a seed has for nothing is not drawn.
        label: of the cost.
    """
    drawn = {method.name: [point for point in method.points if min(costs(point)) > 0] for method in result.methods}
    if not any(drawn.values()):
        return empty_panel(f"Against {label}", "no checkpoint was evaluated, or nothing was counted")
    figure = new_figure(9.6, 4.4)
    panels = figure.subplots(1, len(_PANELS), sharex=True)
    for axes, (name, title) in zip(panels, _PANELS, strict=True):
        for index, method in enumerate(result.methods):
            points = [(spread(costs(point)), getattr(point.comparison.after, name)) for point in drawn[method.name]]
            if points:
                axes.errorbar(
                    [cost.mean for cost, _ in points],
                    [rate.mean for _, rate in points],
                    xerr=error_bars([cost for cost, _ in points]),
                    yerr=error_bars([rate for _, rate in points]),
                    fmt=MARKERS[index % len(MARKERS)] + "-",
                    color=COLORS[index % len(COLORS)],
                    ms=6,
                    lw=1,
                    elinewidth=1,
                    capsize=3,
                    label=method.name,
                )
        before: Interval = getattr(result.before, name)
        axes.axhspan(before.low, before.high, color=GREY, alpha=0.15, lw=0)
        axes.axhline(before.mean, color=GREY, ls="--", lw=1, label=_BEFORE)
        if name == "violation_rate":
            axes.axhline(result.target, color="black", ls=":", lw=1, label=_TARGET)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_axisbelow(True)
    reached = [cost for name in drawn for point in drawn[name] for cost in costs(point)]
    _number_log_axis(panels, min(reached), max(reached))
    panels[len(panels) // 2].set_xlabel(label)
    panels[0].set_ylabel("share of prompts, 95 % interval")
    figure.suptitle("Lower left is better in every panel", fontsize=11)
    legend_below(figure, panels[0], num_columns=6, last=(_BEFORE, _TARGET))
    return figure


def _number_log_axis(panels: Sequence[Axes], low: float, high: float) -> None:
    """Limits with a margin, and at least a few readable numbers."""
    for axes in panels:
        axes.set_xlim(low / 1.25, high * 1.25)
        if high / low < _NARROW:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high / low < 5 else (1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)


def phase_bars(methods: Sequence[MethodResult], phases: Mapping[str, Sequence[float]], kind: str) -> Figure:
    """Device-seconds of one run by ledger phase, stacked, a bar per method.

    Args:
        methods: in order.
        phases: mean device-seconds by phase, one number per method.
        kind: of devices.
    """
    if not phases:
        return empty_panel(f"Device-seconds by phase, {kind}", "the ledger has no entry")
    figure = new_figure(9.6, 1.9 + 0.45 * len(methods) + 0.2 * (len(phases) // 5))
    axes = figure.subplots()
    names = [method.name for method in methods]
    left = np.zeros(len(methods))
    for index, (phase, means) in enumerate(phases.items()):
        axes.barh(
            names,
            means,
            left=left,
            height=0.62,
            color=COLORS[index % (len(COLORS) - 1)],
            hatch=_HATCHES[index // (len(COLORS) - 1) % len(_HATCHES)],
            edgecolor="white",
            label=phase,
        )
        left += np.asarray(means)
    for name, total in zip(names, left, strict=True):
        axes.annotate(
            f"{total:,.0f}", (total, name), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, 1.1 * float(left.max()))
    axes.invert_yaxis()
    axes.set_xlabel(f"reserved device-seconds of one run, {kind} (mean over seeds)")
    axes.set_title("Where the device-seconds went, by ledger phase")
    legend_below(figure, axes, num_columns=5)
    return figure
