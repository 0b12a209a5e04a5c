"""The HTML report of a calibration: one file, no external reference.

Every cell that shows a number of `calibration.json` carries its place there as `data-key`.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from raylign.report import calibrate_tables as tables
from raylign.report import reward_plots as plots
from raylign.report.calibrate_findings import format_share, short_label, warnings_of
from raylign.report.plots import to_data_uri
from raylign.report.style import STYLE
from raylign.report.tables import table_html
from raylign.report.wording import shown_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from raylign.evaluation.calibration import OptimisedPoint
    from raylign.report.calibrate_data import CalibrationResult
    from raylign.report.compare_tables import Table

_STYLE = "main { max-width: 66rem; } td[data-key] { white-space: nowrap; }\n"  # numbers with their intervals
_PANELS = 3  # beside each other
_UNIT = "SD between answers to a prompt"


def render_calibration(result: CalibrationResult) -> str:
    """The whole calibration as one HTML document."""
    best_of_n, gap = tables.best_of_n_table(result), tables.gap_table(result)
    sections = [
        _headline(result),
        _section(tables.model_table(result)),
        _section(tables.quality_table(result), *_quality_figures(result)),
        _section(tables.ranking_table(result)),
        _section(best_of_n, *_best_of_n_figures(result)),
        _section(gap, *_weight_figures(result)),
        _section(tables.training_table(result), *_training_figures(result)),
        _section(tables.signal_table(result), *_signal_figures(result)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>raylign: {escape(result.name)}</title>\n<style>{STYLE}{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(result: CalibrationResult) -> str:
    flips = ", ".join(format_share(flip) for flip in result.flips)
    warnings = "".join(f"<p class='warning'>{escape(text)}</p>" for text in warnings_of(result))
    return (
        f"<header><p class='kicker'>raylign calibration {escape(result.name)}</p>"
        f"<h1 class='neutral'>{len(result.rewards)} rewards from {len(result.models)} reward models: what they know, "
        "and what their maximum is worth</h1>"
        f"<p class='meta'>Pairs of {escape(shown_name(result.data, 'data'))}, {flips} of the training labels reversed, "
        f"seeds {', '.join(map(str, result.seeds))}. {escape(tables.gold_sentence(result))}</p>{warnings}</header>"
    )


def _quality_figures(result: CalibrationResult) -> list[str]:
    figures = []
    for position in _shown(result):
        posteriors = [
            plots.Reliability(
                name=short_label(result, index),
                curve=model.by_flips[position].curve,
                calibration_error=model.by_flips[position].quality.calibration_error,
            )
            for index, model in enumerate(result.models)
        ]
        flip = f"{format_share(result.flips[position])} of the labels reversed"
        figures.append(_figure(plots.reliability(posteriors), f"{flip}; curves: first seed"))
    if len(result.flips) > 1:
        accuracies = [
            plots.FlipAccuracy(
                name=short_label(result, index),
                flip_rates=result.flips,
                accuracy=[noisy.quality.accuracy for noisy in model.by_flips],
            )
            for index, model in enumerate(result.models)
        ]
        figures.append(_figure(plots.accuracy_under_flips(accuracies, num_pairs=result.num_test_pairs)))
    return figures


def _best_of_n_figures(result: CalibrationResult) -> list[str]:
    return [
        _figure(
            plots.overoptimisation(
                [_curve(reward.name, reward.best_of_n[position]) for reward in result.rewards],
                title=f"Best of n, {format_share(result.flips[position])} of the labels reversed",
                kl_name="bound",
                unit=_UNIT,
                sizes=[point.step for point in result.rewards[0].best_of_n[position]],
            )
        )
        for position in _shown(result)
    ]


def _weight_figures(result: CalibrationResult) -> list[str]:
    figures = []
    for index in range(len(result.models)):
        mixed = sorted(
            (reward for reward in result.rewards if reward.model == index and reward.w_nominal is not None),
            key=lambda reward: reward.w_nominal or 0.0,
        )
        if len(mixed) < 2:
            continue
        means = [reward for reward in result.rewards if reward.model == index and reward.rule == "mean"]
        n = mixed[0].best_of_n[0][-1].step
        sweeps = [
            plots.WeightSweep(
                name=f"{format_share(result.flips[position])} reversed",
                w_nominal=[reward.w_nominal or 0.0 for reward in mixed],
                gold=[reward.best_of_n[position][-1].gold for reward in mixed],
                reference=means[0].best_of_n[position][-1].gold.mean if means else None,
            )
            for position in _shown(result)
        ]
        title = f"Gold of the best of {n}: {short_label(result, index)}"
        figures.append(_figure(plots.gold_by_w_nominal(sweeps, title=title, unit=_UNIT)))
    return figures


def _training_figures(result: CalibrationResult) -> list[str]:
    trained = [reward for reward in result.rewards if reward.policy_gradient]
    if not trained:
        return []
    return [
        _figure(
            plots.overoptimisation(
                [_curve(reward.name, reward.policy_gradient[position]) for reward in trained],
                title=f"Policy gradient, by round, {format_share(flip)} of the labels reversed",
                kl_name="estimate",
                unit=_UNIT,
            )
        )
        for position, flip in enumerate(result.trained_flips)
    ]


def _signal_figures(result: CalibrationResult) -> list[str]:
    signals = [
        plots.ShiftSignal(
            name=f"{signal.signal}, {short_label(result, index)}",
            familiar=signal.familiar,
            shifted=signal.shuffled,
            auroc=signal.auroc,
        )
        for index, model in enumerate(result.models)
        for signal in model.signals
    ]
    rows = -(-len(signals) // _PANELS)
    figures = [_figure(plots.shift_signals(signals[row::rows])) for row in range(rows)]
    caption = "Values: first seed. Like the training data: answers of the policy; shifted: the same, words shuffled."
    return [*figures, f"<p class='note'>{caption}</p>"] if figures else []


def _curve(name: str, points: Sequence[OptimisedPoint]) -> plots.OptimisationCurve:
    return plots.OptimisationCurve(
        name=name,
        kl=[point.kl for point in points],
        proxy=[point.proxy for point in points],
        gold=[point.gold for point in points],
    )


def _shown(result: CalibrationResult) -> list[int]:
    """Positions of the smallest and the largest share of flips."""
    return sorted({0, len(result.flips) - 1})


def _section(table: Table | None, *figures: str) -> str:
    if table is None:
        return ""
    return f"<section><h2>{escape(table.title)}</h2>{table_html(table)}{''.join(figures)}</section>"


def _figure(figure: Figure, caption: str = "") -> str:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    description = next((title for title in titles if title), "figure")
    shown = f"<p class='note'>{escape(caption)}</p>" if caption else ""
    return f"<img src='{to_data_uri(figure)}' alt='{escape(description)}'>{shown}"
