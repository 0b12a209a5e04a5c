"""The figures of the calibration and robustness report: plain data in, a matplotlib figure out.

A reward model or rule keeps its colour and marker within a figure, in the order in which it is given. Nothing is drawn
for what was not measured. What is shown as a band or a bar is a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from raylign.evaluation.metrics import wilson_interval
from raylign.report.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    empty_panel,
    error_bars,
    legend_below,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from raylign.evaluation.uncertainty import ReliabilityCurve
    from raylign.types import Interval

_COLORS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black")
_MARKERS = "osD^vP*"
_GRID = "#e6e9ee"
_HISTOGRAM_BINS = 30
_FEWEST_PAIRS = 5  # a bin of fewer says nothing; the share of pairs below still shows it


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Calibration of one reward posterior.

    Attributes:
        name: of the posterior.
        curve: over mirrored pairs.
        calibration_error: of the same pairs.
    """

    name: str
    curve: ReliabilityCurve
    calibration_error: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisationCurve:
    """What one reward reaches as the policy moves away from the reference.

    Attributes:
        name: of the reward or of the rule that made it.
        kl: KL from the reference at each point, nats.
        proxy: reward that is maximised, at each point.
        gold: reward that is meant, at each point.
    """

    name: str
    kl: Sequence[float]
    proxy: Sequence[Interval]
    gold: Sequence[Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlipAccuracy:
    """Accuracy of one reward posterior by the share of training labels that were inverted.

    Attributes:
        name: of the posterior.
        flip_rates: shares, ascending.
        accuracy: on pairs whose labels are right, at each share.
    """

    name: str
    flip_rates: Sequence[float]
    accuracy: Sequence[Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSweep:
    """Gold reward of the BRME mixture by the weight of the nominal reward.

    Attributes:
        name: what the sweep was made at, for example "n = 64".
        w_nominal: weights, ascending: 0 is the minimum over members, 1 the nominal reward.
        gold: at each weight.
        reference: gold of the mean over members in the same place; None to leave it out.
    """

    name: str
    w_nominal: Sequence[float]
    gold: Sequence[Interval]
    reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftSignal:
    """A signal of unfamiliar input, on responses like the training data and on others.

    Attributes:
        name: of the signal with its unit.
        familiar: its values on responses like the training data.
        shifted: its values on responses from elsewhere.
        auroc: how well it tells them apart, above 1/2 if it is larger on shifted ones.
    """

    name: str
    familiar: Sequence[float]
    shifted: Sequence[float]
    auroc: Interval


def reliability(posteriors: Sequence[Reliability]) -> Figure:
    """Observed against stated probability of the preferred order, with the pairs behind each bin.

    Pairs are mirrored, so the half below 1/2 repeats the half above and is not drawn. Neither is a bin of fewer than
    five pairs.

    Args:
        posteriors: judged on the same pairs.
    """
    posteriors = [posterior for posterior in posteriors if posterior.curve.counts.sum()]
    if not posteriors:
        return empty_panel("Reliability of stated preferences", "no pair was held out")
    figure = new_figure(6.4, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    upper.plot([0.5, 1], [0.5, 1], color=GREY, ls=":", label="calibrated")
    num_pairs = int(posteriors[0].curve.counts.sum()) // 2
    for index, posterior in enumerate(posteriors):
        curve = posterior.curve
        is_drawn = (curve.edges[:-1] >= 0.5 - 1e-9) & (curve.counts >= _FEWEST_PAIRS)
        counts = curve.counts[is_drawn]
        observed = [
            wilson_interval(round(share * count), int(count))
            for share, count in zip(curve.observed[is_drawn], counts, strict=True)
        ]
        label = f"{posterior.name}: ECE {_bracketed(posterior.calibration_error)}"
        _draw_intervals(upper, index, curve.stated[is_drawn], observed, label)
        share = np.where(curve.edges[:-1] >= 0.5 - 1e-9, curve.counts / num_pairs, 0.0)
        lower.stairs(share, curve.edges, color=_COLORS[index % len(_COLORS)], lw=1.5)
    upper.set_xlim(0.5, 1)
    upper.set_ylabel("order observed to be right")
    upper.set_title(f"Calibration: on the diagonal is good (n = {num_pairs:,} pairs)", fontsize=11)
    lower.set_ylabel("share\nof pairs")
    lower.set_xlabel("stated probability of the order that the reward prefers")
    for axis in (upper.xaxis, upper.yaxis, lower.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (upper, lower):
        _grid(axes)
    legend_below(figure, upper, num_columns=2, last=("calibrated",))
    return figure


def overoptimisation(
    curves: Sequence[OptimisationCurve], *, title: str, kl_name: str, unit: str, sizes: Sequence[int] | None = None
) -> Figure:
    """Proxy (dashed) and gold (solid) against the root of the KL, a panel per reward, on common axes.

    Every panel repeats the gold curves of the others in grey.

    Args:
        curves: one per reward. An estimate of the KL below 0 is drawn at 0.
        title: of the figure.
        kl_name: what the KL is: measured, or a bound.
        unit: of both rewards.
        sizes: n of each point when the policy is best-of-n, for a second axis on top; None for other policies.
    """
    curves = [curve for curve in curves if len(curve.kl)]
    if not curves:
        return empty_panel(title, "no policy was scored")
    num_columns = 2 if len(curves) == 4 else min(3, len(curves))
    num_rows = -(-len(curves) // num_columns)
    figure = new_figure(max(3.2 * num_columns, 5.0), 3.0 * num_rows + 0.8)
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for index, (axes, curve) in enumerate(zip(grid.ravel(), curves, strict=False)):
        for other in curves:
            if other is not curve:
                axes.plot(_root(other.kl), [point.mean for point in other.gold], color=GREY, alpha=0.4, lw=0.9)
        color = _COLORS[index % len(_COLORS)]
        for series, dashes in ((curve.proxy, "--"), (curve.gold, "-")):
            low, high = [point.low for point in series], [point.high for point in series]
            axes.fill_between(_root(curve.kl), low, high, color=color, alpha=0.18, lw=0)
            axes.plot(_root(curve.kl), [point.mean for point in series], color=color, ls=dashes, lw=1.8)
        best = int(np.argmax([point.mean for point in curve.gold]))
        axes.plot(_root(curve.kl)[best], curve.gold[best].mean, "o", color=color, ms=7, mec="white")
        axes.axhline(0, color="black", lw=0.6)
        axes.text(0.04, 0.94, curve.name, transform=axes.transAxes, va="top", fontsize=11, fontweight="bold")
        _grid(axes)
        if index >= len(curves) - num_columns:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(rf"$\sqrt{{\mathrm{{KL}}}}$, {kl_name} ($\sqrt{{\mathrm{{nats}}}}$)", fontsize=9)
        if index % num_columns == 0:
            axes.set_ylabel(unit, fontsize=9)
        if sizes is not None and index < num_columns:
            _axis_of_sizes(axes, curve.kl, sizes)
    for axes in grid.ravel()[len(curves) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    handles = [
        Line2D([], [], color="black", lw=1.8, label="gold"),
        Line2D([], [], color="black", lw=1.8, ls="--", label="proxy, what is maximised"),
        Line2D([], [], color="black", marker="o", mec="white", ls="", label="highest gold"),
    ]
    if len(curves) > 1:
        handles.append(Line2D([], [], color=GREY, alpha=0.5, lw=1, label="gold of the others"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, 2 * num_columns), frameon=False, fontsize=9)
    return figure


def accuracy_under_flips(posteriors: Sequence[FlipAccuracy], *, num_pairs: int) -> Figure:
    """Accuracy on right labels against the share of inverted training labels.

    Args:
        posteriors: fitted to the same pairs.
        num_pairs: held-out pairs behind each point.
    """
    if not any(len(posterior.flip_rates) for posterior in posteriors):
        return empty_panel("Accuracy under label noise", "no reward was fitted to noisy labels")
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    rates = sorted({rate for posterior in posteriors for rate in posterior.flip_rates})
    step = 0.012 * (max(rates) - min(rates) or 1.0)
    for index, posterior in enumerate(posteriors):
        aside = (index - (len(posteriors) - 1) / 2) * step  # so that bars of one share do not cover each other
        _draw_intervals(axes, index, np.asarray(posterior.flip_rates) + aside, posterior.accuracy, posterior.name)
    axes.xaxis.set_major_locator(FixedLocator(rates))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("training labels inverted")
    axes.set_ylabel("accuracy on right labels")
    axes.set_title(f"Accuracy under label noise: higher is better (n = {num_pairs:,} pairs)", fontsize=11)
    _grid(axes)
    legend_below(figure, axes, num_columns=4)
    return figure


def gold_by_w_nominal(sweeps: Sequence[WeightSweep], *, title: str, unit: str) -> Figure:
    """Gold against the weight of the nominal reward, from the minimum (left) to the nominal reward (right).

    Args:
        sweeps: of like scale.
        title: of the figure.
        unit: of the gold reward.
    """
    if not any(len(sweep.w_nominal) for sweep in sweeps):
        return empty_panel(title, "no mixture was scored")
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for index, sweep in enumerate(sweeps):
        aside = 0.008 * (index - (len(sweeps) - 1) / 2)  # so that bars of one weight do not cover each other
        _draw_intervals(axes, index, np.asarray(sweep.w_nominal) + aside, sweep.gold, sweep.name)
        if sweep.reference is not None:
            axes.axhline(sweep.reference, color=_COLORS[index % len(_COLORS)], ls=":", lw=1.4, zorder=1)
    handles, _ = axes.get_legend_handles_labels()
    if any(sweep.reference is not None for sweep in sweeps):
        handles.append(Line2D([], [], color="black", ls=":", lw=1.4, label="mean over members"))
    axes.axhline(0, color="black", lw=0.6, zorder=1)
    axes.set_xlabel("$w_{nominal}$: 0 is the minimum over members, 1 the nominal reward")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=11)
    _grid(axes)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def shift_signals(signals: Sequence[ShiftSignal]) -> Figure:
    """Each signal on familiar and on shifted responses; to the right of familiar is what a warning needs.

    Args:
        signals: a panel each.
    """
    signals = [signal for signal in signals if len(signal.familiar) and len(signal.shifted)]
    if not signals:
        return empty_panel("Signals of unfamiliar input", "there is no shifted set")
    figure = new_figure(max(3.6 * len(signals), 6.4), 3.7)
    for axes, signal in zip(figure.subplots(1, len(signals), squeeze=False)[0], signals, strict=True):
        both = np.concatenate([signal.familiar, signal.shifted])
        low, high = (float(end) for end in np.quantile(both, [0, 0.995]))
        width = (high - low) / _HISTOGRAM_BINS or 1.0
        edges = low + width * np.arange(_HISTOGRAM_BINS + 1)
        for values, color, hatch, label in (
            (signal.familiar, BLUE, "", "like the training data"),
            (signal.shifted, VERMILION, "//", "shifted"),
        ):
            # what lies beyond the last edge is shown in the last bin, so that the shares add up to one
            shares = np.histogram(np.minimum(values, edges[-1]), bins=edges)[0] / len(values)
            axes.stairs(
                shares, edges, fill=True, facecolor=color, edgecolor="white", alpha=0.4, lw=0, label=label, hatch=hatch
            )
            axes.stairs(shares, edges, color=color, lw=1.4)
        axes.set_xlabel(signal.name)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_title(f"AUROC {_bracketed(signal.auroc)}", fontsize=10)
        _grid(axes)
    first = figure.axes[0]
    first.set_ylabel("share of responses")
    figure.suptitle("Signals of unfamiliar input: above 0.5 warns, below 0.5 reassures wrongly", fontsize=11)
    legend_below(figure, first)
    return figure


def _axis_of_sizes(axes: Axes, kl: Sequence[float], sizes: Sequence[int]) -> None:
    """A second axis on top with n, at most six numbers."""
    top = axes.secondary_xaxis("top")
    shown = range(0, len(sizes), max(1, -(-len(sizes) // 6)))
    top.xaxis.set_major_locator(FixedLocator(_root(kl)[shown].tolist()))
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xticklabels([f"{sizes[index]:,}" if index else f"n = {sizes[index]:,}" for index in shown], fontsize=8)


def _root(kl: Sequence[float]) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.maximum(kl, 0))
    return root


def _draw_intervals(axes: Axes, index: int, x: np.ndarray, intervals: Sequence[Interval], label: str) -> None:
    """The line of the series with this index, with error bars."""
    axes.errorbar(
        x,
        [interval.mean for interval in intervals],
        yerr=error_bars(intervals),
        fmt=_MARKERS[index % len(_MARKERS)] + "-",
        color=_COLORS[index % len(_COLORS)],
        ms=5,
        lw=1.5,
        elinewidth=0.9,
        capsize=2,
        label=label,
    )


def _grid(axes: Axes) -> None:
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)


def _bracketed(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
