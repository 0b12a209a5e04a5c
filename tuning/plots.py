"""The figures of a sweep: the front of reward and cost, rates along an axis, calibration by size, device-seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import PercentFormatter

from raylign.report.figures import (
    BLUE,
    COLORS,
    GREY,
    GRID,
    MARKERS,
    ORANGE,
    VERMILION,
    empty_panel,
    error_bars,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tuning.grid import Screened
    from tuning.result import PointResult, SweepResult

_MAX_LABELS = 24  # points that get their name beside them


def pareto(result: SweepResult) -> Figure:
    """Reward against cost with intervals over prompts; seeds as dots, dominated points hollow, the front a line."""
    points = [point for point in result.points if point.comparison is not None]
    if not points:
        return empty_panel("Reward against cost", "no point has finished")
    figure = new_figure(9.6, 5.4)
    axes = figure.subplots()
    for kind, color, is_front in (("on the front", BLUE, True), ("dominated, or a seed missing", GREY, False)):
        group = [point for point in points if point.is_on_front == is_front]
        if not group:
            continue
        after = [point.comparison.after for point in group if point.comparison is not None]
        rewards = [summary.mean_reward for summary in after if summary.mean_reward is not None]
        costs = [summary.mean_cost for summary in after]
        axes.errorbar(
            [cost.mean for cost in costs],
            [reward.mean for reward in rewards],
            xerr=error_bars(costs),
            yerr=error_bars(rewards),
            fmt="o",
            color=color,
            mfc=color if is_front else "white",
            ms=8,
            elinewidth=0.8,
            capsize=2,
            label=kind,
        )
        axes.scatter(
            [seed.cost for point in group for seed in point.seeds],
            [seed.reward for point in group for seed in point.seeds],
            s=10,
            color=color,
            alpha=0.6,
        )
    front = sorted(_means(point) for point in points if point.is_on_front)
    axes.plot([cost for cost, _ in front], [reward for _, reward in front], color=BLUE, lw=1)
    before = result.before
    if before.mean_reward is not None:
        axes.plot(before.mean_cost.mean, before.mean_reward.mean, "*", color=VERMILION, ms=13, label="before training")
    if len(points) <= _MAX_LABELS:
        for point in points:
            axes.annotate(_short(point), _means(point), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel("mean cost of answers to harmful prompts (judge, logits; above 0 is unsafe)")
    axes.set_ylabel("mean reward of all answers\n(reward of the base configuration)")
    axes.set_title(
        f"Upper left is better; bars are 95 % intervals over prompts, dots are seeds\nlabels: {', '.join(result.axes)}",
        fontsize=10,
    )
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    legend_below(figure, axes)
    return figure


def _means(point: PointResult) -> tuple[float, float]:
    """Cost and reward, as drawn."""
    assert point.comparison is not None
    after = point.comparison.after
    return after.mean_cost.mean, math.nan if after.mean_reward is None else after.mean_reward.mean


def _short(point: PointResult) -> str:
    return ", ".join(f"{v:.3g}" if isinstance(v, float | int) else str(v) for v in point.keys.values())


def number_axes(result: SweepResult) -> list[str]:
    """Swept keys with at least two numbers among the finished points."""
    finished = [point for point in result.points if point.comparison is not None]
    return [key for key in result.axes if len({p.keys[key] for p in finished if _is_number(p.keys[key])}) > 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rate_along(result: SweepResult, key: str) -> Figure:
    """Violation rate against one swept key, a line per setting of the other keys."""
    lines: dict[str, list[PointResult]] = {}
    for point in result.points:
        if point.comparison is not None and _is_number(point.keys[key]):
            others = ", ".join(f"{name}={value}" for name, value in point.keys.items() if name != key)
            lines.setdefault(others, []).append(point)
    figure = new_figure(9.6, 4.2)
    axes = figure.subplots()
    for index, (others, points) in enumerate(lines.items()):
        points.sort(key=lambda point: float(point.keys[key]))
        rates = [point.comparison.after.violation_rate for point in points if point.comparison is not None]
        axes.errorbar(
            [point.keys[key] for point in points],
            [rate.mean for rate in rates],
            yerr=error_bars(rates),
            fmt=MARKERS[index % len(MARKERS)] + "-",
            color=COLORS[index % len(COLORS)],
            lw=1,
            capsize=3,
            label=others or "all seeds",
        )
        axes.scatter(
            [point.keys[key] for point in points for _ in point.seeds],
            [seed.violation_rate for point in points for seed in point.seeds],
            s=10,
            color=COLORS[index % len(COLORS)],
            alpha=0.6,
        )
    before = result.before.violation_rate
    axes.axhspan(before.low, before.high, color=GREY, alpha=0.15, lw=0)
    axes.axhline(before.mean, color=GREY, ls="--", lw=1, label="before training")
    values = [float(point.keys[key]) for points in lines.values() for point in points]
    if min(values) > 0 and max(values) / min(values) >= 20:
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel("judged unsafe (harmful prompts)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_title("Lower is better; bars are 95 % intervals over prompts, dots are seeds", fontsize=11)
    axes.grid(axis="y", color=GRID, lw=0.8)
    legend_below(figure, axes, num_columns=3)
    return figure


def calibration(screened: Sequence[Screened]) -> Figure:
    """Accuracy and calibration on test pairs against ensemble size, least to most of the replicates."""
    sizes: dict[int, Screened] = {}
    for row in screened:  # the first setting of each size; others differ in more than their size
        sizes.setdefault(row.num_heads, row)
    figure = new_figure(9.6, 3.6)
    panels = figure.subplots(1, 3, sharex=True)
    rows = [sizes[size] for size in sorted(sizes)]
    for axes, (name, title) in zip(
        panels,
        (("accuracy", "Accuracy (higher is better)"), ("ece", "ECE (lower)"), ("brier", "Brier score (lower)")),
        strict=True,
    ):
        values = [np.array([getattr(quality, name) for quality in row.test]) for row in rows]
        means = np.array([value.mean() for value in values])
        axes.errorbar(
            [row.num_heads for row in rows],
            means,
            yerr=np.stack([means - [value.min() for value in values], [value.max() for value in values] - means]).clip(
                min=0
            ),
            fmt="o-",
            color=ORANGE,
            lw=1,
            capsize=3,
        )
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", color=GRID, lw=0.8)
        axes.set_xlabel("members")
    figure.suptitle("Held-out pairs; bars reach from the least to the most of the replicates", fontsize=11)
    return figure


def device_seconds(result: SweepResult) -> Figure:
    """What each point took of its own, by kind of device."""
    kinds = sorted({kind for point in result.points for kind in point.cost.device_s})
    if not kinds:
        return empty_panel("Device-seconds", "the ledgers have no entry")
    figure = new_figure(9.6, 1.8 + 0.3 * len(result.points))
    axes = figure.subplots()
    names, height = [point.name for point in result.points], 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        places = np.arange(len(names)) + index * height
        axes.barh(
            places,
            [point.cost.device_s.get(kind, 0.0) for point in result.points],
            height=height,
            color=COLORS[index % len(COLORS)],
            label=kind,
        )
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("reserved device-seconds of a point's own phases, all seeds together")
    axes.set_title("What each point took, from the ledgers", fontsize=11)
    legend_below(figure, axes)
    return figure
