"""The report's figures: one function each, plain data in, a matplotlib figure out.

Titles say what is shown and which direction is good. Where two series meet, their line or marker differs as well as
their colour.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator, PercentFormatter

from raylign.report.data import ConfidenceFacts, LayerPoint
from raylign.report.figures import (
    BLUE,
    COLORS,
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
    from matplotlib.figure import Figure

    from raylign.evaluation.drift import DriftReport
    from raylign.evaluation.safety import SafetyComparison
    from raylign.types import Interval

_BARS = (
    ("attack_success", "attack\nsuccess"),
    ("violation_rate", "judged\nunsafe"),
    ("over_refusal", "over-\nrefusal"),
    ("degenerate", "degenerate\nanswers"),
)
_CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", (("loss", "loss"),)),
    ("Implicit rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("Reward margin: higher separates better", (("rewards/margins", "margin"),)),
    ("Training pairs in stored order", (("rewards/accuracies", "accuracy"),)),
    ("Mean label confidence", (("confidence/mean", "confidence"),)),
    ("Pairs flipped (confidence < 1/2)", (("confidence/flips", "flips"),)),
    (
        "Training pairs in stored order, by AVA's scores",
        (
            ("ava/accuracies/last", "last reward"),
            ("ava/accuracies/sum", "sum of rewards"),
            ("ava/accuracies/log_prob", "log-probability"),
        ),
    ),
    ("Sigma of tokens' rewards", (("ava/sigma/mean", "mean"), ("ava/sigma/min", "smallest"))),
    (
        "Gradient of AVA's terms in the trunk's outputs",
        tuple((f"ava/trunk_grad_norm/{term}", term) for term in ("likelihood", "negative", "kl", "td", "cer")),
    ),
    ("Reward of sampled responses", (("critic/score/mean", "mean reward"),)),
    ("Length of sampled responses (tokens)", (("response_length/mean", "length"),)),
    ("Responses cut at the length limit", (("response_length/clip_ratio", "cut"),)),
    ("KL of sampled responses from the reference (nats)", (("sampler/reference_kl", "KL"),)),
    ("Response tokens clipped", (("actor/clip_fraction", "clipped"),)),
)
_LINES = ("o-", "s--", "^:", "v-.", "D-")
_SHARES = {
    "rewards/accuracies",
    "ava/accuracies/last",
    "confidence/mean",
    "confidence/flips",
    "response_length/clip_ratio",
    "actor/clip_fraction",
}


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG image."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def to_data_uri(figure: Figure) -> str:
    """The figure as a data URI, for one-file HTML."""
    return "data:image/png;base64," + base64.b64encode(to_png(figure)).decode("ascii")


def layer_accuracy(layers: Sequence[LayerPoint], *, whole: Interval | None, kind: str, num_pairs: int) -> Figure:
    """Accuracy and calibration error of each layer's probe, the whole reward as a band.

    Args:
        layers: one point per layer, at least one.
        whole: test accuracy of the reward, None to leave it out.
        kind: `reward.kind`.
        num_pairs: test pairs behind each point.
    """
    figure = new_figure(7.0, 4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    numbers = [point.layer for point in layers]
    upper.plot(numbers, [point.pair_accuracy for point in layers], "o-", color=BLUE, label="one layer's probe")
    if whole is not None:
        upper.axhspan(whole.low, whole.high, color=ORANGE, alpha=0.25, lw=0)
        upper.axhline(whole.mean, color=ORANGE, ls="--", label=f"the run's reward ({kind}), 95 % band")
    upper.axhline(0.5, color=GREY, ls=":", label="chance")
    upper.set_ylabel("pair accuracy")
    upper.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    upper.set_title(f"Held-out reward accuracy by layer: higher is better (n = {num_pairs:,} pairs)")
    lower.plot(numbers, [point.calibration_error for point in layers], "s-", color=GREEN)
    lower.set_ylim(0, 1.25 * max(point.calibration_error for point in layers) or 1.0)
    lower.set_ylabel("calibration\nerror (ECE)")
    lower.set_xlabel("transformer layer")
    lower.set_title("Calibration error of the same probes: lower is better", fontsize=10)
    lower.set_xlim(min(numbers) - 0.5, max(numbers) + 0.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_below(figure, upper)
    return figure


def confidence_histogram(facts: ConfidenceFacts) -> Figure:
    """Label confidence of the training pairs, with the flipped ones marked."""
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    edges = np.asarray(facts.edges, dtype=float)
    counts = np.asarray(facts.histogram, dtype=float)
    is_flip = edges[:-1] < 0.5
    for chosen, color, hatch, label in (
        (is_flip, VERMILION, "//", f"flipped: {facts.num_flips:,} pairs"),
        (~is_flip, BLUE, "", f"kept: {facts.num_pairs - facts.num_flips:,} pairs"),
    ):
        axes.bar(
            edges[:-1][chosen],
            counts[chosen],
            width=np.diff(edges)[chosen],
            align="edge",
            color=color,
            edgecolor="white",
            hatch=hatch,
            label=label,
        )
    axes.axvline(0.5, color="black", lw=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("label confidence: probability that the stored order is right")
    axes.set_ylabel("training pairs")
    axes.set_title(f"How sure the reward is of each label (n = {facts.num_pairs:,}, mean {facts.mean:.2f})")
    legend_below(figure, axes)
    return figure


def training_curves(records: Sequence[Mapping[str, float]]) -> Figure:
    """The metric records of training over updates; metrics that the objective does not have are left out."""
    panels = [
        (title, [(name, label) for name, label in series if any(name in record for record in records)])
        for title, series in _CURVES
    ]
    panels = [(title, series) for title, series in panels if series]
    if not panels:
        return empty_panel("Training curves", "no metric record: training ended before train.log_every updates")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(3.6 * num_columns, 2.7 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, (title, series) in zip(grid, panels, strict=False):
        for (name, label), color, style in zip(series, COLORS, _LINES, strict=False):
            points = [(record["step"], record[name]) for record in records if name in record]
            axes.plot(*zip(*points, strict=True), style, color=color, ms=3, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        if series[0][0] in _SHARES:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False, loc="best")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def drift_figure(report: DriftReport) -> Figure:
    """Rank drift beside distribution drift: order may move, the distribution should stay inside the chance band."""
    figure = new_figure(7.6, 3.4)
    left, right = figure.subplots(1, 2)
    tau = report.kendall_tau
    left.errorbar(
        [0], [tau.mean], yerr=error_bars([tau]), fmt="o", color=BLUE, capsize=6, ms=8, label="mean, 95 % interval"
    )
    left.axhline(1, color=GREY, ls=":", label="order unchanged")
    left.set_xlim(-1, 1)
    left.set_ylim(min(-0.05, tau.low - 0.1), 1.08)
    left.set_xticks([])
    left.set_ylabel("Kendall's tau")
    left.set_title(
        f"Order of candidates, before and now\n({report.num_prompts} prompts x {report.num_candidates} candidates)",
        fontsize=10,
    )
    left.legend(fontsize=8, frameon=False, loc="lower center")
    is_stale = report.js_divergence > report.js_null_limit
    right.bar([0], [report.js_divergence], zorder=2, width=0.5, color=VERMILION if is_stale else BLUE, label="measured")
    right.axhspan(0, report.js_null_limit, color=GREY, alpha=0.3, lw=0, label="chance, 95 % band")
    right.set_xlim(-1, 1)
    right.set_ylim(0, 1.45 * max(report.js_divergence, report.js_null_limit, 1e-3))
    right.set_xticks([])
    right.set_ylabel("Jensen-Shannon divergence (nats)")
    right.set_title("Distribution drift: inside the band is good", fontsize=10)
    right.legend(fontsize=8, frameon=False, loc="upper center", ncols=2)
    return figure


def safety_bars(comparison: SafetyComparison) -> Figure:
    """Before and after with 95 % intervals for the four rates that must be read together."""
    figure = new_figure(7.4, 3.8)
    axes = figure.subplots()
    positions = np.arange(len(_BARS))
    for part, offset, color, hatch, label in (
        (comparison.before, -0.2, GREY, "//", "before"),
        (comparison.after, 0.2, BLUE, "", "after"),
    ):
        intervals = [getattr(part, name) for name, _ in _BARS]
        means = [interval.mean for interval in intervals]
        axes.bar(positions + offset, means, 0.38, color=color, hatch=hatch, edgecolor="white", label=label)
        axes.errorbar(positions + offset, means, yerr=error_bars(intervals), fmt="none", ecolor="black", capsize=4)
        for position, interval in zip(positions + offset, intervals, strict=True):
            axes.annotate(
                f"{100 * interval.mean:.0f} %",
                (position, interval.high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    numbers = [getattr(comparison.after, name).num_items for name, _ in _BARS]
    axes.set_xticks(positions, [f"{label}\n(n = {number})" for (_, label), number in zip(_BARS, numbers, strict=True)])
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of prompts")
    axes.set_title("Safety and its price: lower is better everywhere (95 % intervals)")
    legend_below(figure, axes)
    return figure


def cost_histogram(before: Sequence[float], after: Sequence[float]) -> Figure:
    """The judge's cost of answers to harmful prompts, before and after.

    Args:
        before: costs of the reference's answers, logits.
        after: costs of the trained policy's answers to the same prompts.
    """
    if not (len(before) and len(after)):
        return empty_panel("Cost of answers to harmful prompts", "no harmful prompt")
    figure = new_figure(7.0, 3.5)
    axes = figure.subplots()
    values = np.concatenate([before, after])
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    margin = 0.05 * (high - low) or 1.0
    # zero is an edge, so that no bar mixes safe and unsafe answers
    width = (high - low + 2 * margin) / 24
    edges = np.arange(np.floor((low - margin) / width), np.ceil((high + margin) / width) + 1) * width
    bins = edges.tolist()
    axes.axvspan(0, edges[-1], color=VERMILION, alpha=0.08, lw=0, label="unsafe (cost > 0)")
    axes.hist(before, bins=bins, color=GREY, alpha=0.55, hatch="//", edgecolor="white", label="before")
    axes.hist(after, bins=bins, histtype="step", color=BLUE, lw=2, label="after")
    axes.axvline(0, color="black", lw=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("cost: judge's log-odds of unsafe")
    axes.set_ylabel("answers")
    axes.set_title(f"Cost of answers to harmful prompts: further left is better (n = {len(after)})")
    legend_below(figure, axes)
    return figure


def phase_seconds(seconds: Mapping[str, float]) -> Figure:
    """Wall seconds of each phase."""
    if not seconds:
        return empty_panel("Wall time by phase", "no phase was timed")
    figure = new_figure(7.0, 0.9 + 0.36 * len(seconds))
    axes = figure.subplots()
    names = list(seconds)
    bars = axes.barh(names, list(seconds.values()), color=BLUE)
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=9)
    axes.set_xlim(0, 1.15 * max(seconds.values()) or 1.0)
    axes.invert_yaxis()
    axes.set_xlabel("wall seconds on this machine")
    axes.set_title(f"Wall time by phase: {sum(seconds.values()):.0f} s in total")
    return figure
