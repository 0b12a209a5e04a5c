"""Figures of the calibration and robustness report: what is drawn where, and edge inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from shown import assert_drawn

from raylign.evaluation.best_of_n import kl_bound
from raylign.evaluation.uncertainty import reliability_curve, shift_auroc
from raylign.report import reward_plots
from raylign.report.reward_plots import FlipAccuracy, OptimisationCurve, Reliability, ShiftSignal, WeightSweep
from raylign.types import Interval

SIZES = (1, 2, 4, 8, 16, 64, 256)
BOUNDS = tuple(kl_bound(n) for n in SIZES)


def interval(mean: float, half: float = 0.1) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half, num_items=12)


def posterior(name: str, stated) -> Reliability:
    return Reliability(name=name, curve=reliability_curve(stated), calibration_error=interval(0.05, 0.01))


def optimised(name: str, kl=BOUNDS) -> OptimisationCurve:
    points = np.arange(len(kl))
    return OptimisationCurve(
        name=name, kl=kl, proxy=[interval(x) for x in points], gold=[interval(x - 0.3 * x * x) for x in points]
    )


def sweep(name: str, reference: float | None = None) -> WeightSweep:
    return WeightSweep(name=name, w_nominal=(0, 0.2, 1), gold=[interval(x) for x in (1, 2, 0)], reference=reference)


def signal(name: str, shift: float, num: int = 300) -> ShiftSignal:
    familiar, shifted = np.random.default_rng(0).gamma(4, 0.1, num), shift + np.random.default_rng(1).gamma(4, 0.1, num)
    return ShiftSignal(name=name, familiar=familiar, shifted=shifted, auroc=shift_auroc(familiar, shifted))


def drawn_points(axes, label: str) -> np.ndarray:
    [container] = [c for c in axes.containers if c.get_label().startswith(label)]
    return container.lines[0].get_xydata().T.astype(float)


def legend_texts(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].texts]


def test_reliability_draws_the_upper_half_with_every_pair_once():
    stated = np.random.default_rng(0).beta(3, 2, 800)
    figure = reward_plots.reliability([posterior("probe", stated), posterior("ensemble", np.full(40, 0.9))])
    assert_drawn(figure)
    upper, lower = figure.axes
    x, y = drawn_points(upper, "probe")
    curve = reliability_curve(stated)
    np.testing.assert_allclose(x, curve.stated[10:])
    np.testing.assert_allclose(y, curve.observed[10:])
    np.testing.assert_allclose(drawn_points(upper, "ensemble"), [[0.9], [1.0]])
    shares = lower.patches[0].get_data().values
    assert shares.sum() == pytest.approx(1)
    assert legend_texts(figure)[-1] == "calibrated"
    assert "ECE 0.050 [0.040, 0.060]" in legend_texts(figure)[0]


def test_bins_of_few_pairs_are_not_drawn():
    figure = reward_plots.reliability([posterior("probe", [0.97] * 4 + [0.72] * 5)])
    x, _ = drawn_points(figure.axes[0], "probe")
    np.testing.assert_allclose(x, [0.72])


def test_overoptimisation_has_proxy_dashed_gold_solid_and_marks_the_best():
    figure = reward_plots.overoptimisation(
        [optimised("single"), optimised("min")], title="t", kl_name="bound", unit="sd", sizes=SIZES
    )
    assert_drawn(figure)
    first = figure.axes[0]
    other, proxy, gold, best = first.lines[:4]
    assert [line.get_linestyle() for line in (proxy, gold)] == ["--", "-"]
    np.testing.assert_allclose(proxy.get_xdata(), np.sqrt(BOUNDS))
    np.testing.assert_array_equal(other.get_ydata(), gold.get_ydata())
    assert best.get_ydata()[0] == pytest.approx(max(gold.get_ydata()))
    assert best.get_xdata()[0] == pytest.approx(math.sqrt(kl_bound(4)))
    assert "bound" in first.get_xlabel()
    assert [text.get_text() for text in first.child_axes[0].get_xticklabels()] == ["n = 1", "4", "16", "256"]


@pytest.mark.parametrize(("num_curves", "grid"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (7, (3, 3))])
def test_panels_of_overoptimisation_fill_a_grid_with_an_axis_below_each_column(num_curves, grid):
    curves = [optimised(f"rule {index}") for index in range(num_curves)]
    figure = reward_plots.overoptimisation(curves, title="t", kl_name="measured", unit="sd")
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == num_curves
    assert sum(bool(axes.get_xlabel()) for axes in shown) == min(num_curves, grid[1])
    assert all("measured" in axes.get_xlabel() for axes in shown[-grid[1] :])
    assert ("gold of the others" in legend_texts(figure)) == (num_curves > 1)


def test_an_estimated_divergence_below_zero_is_drawn_at_zero():
    figure = reward_plots.overoptimisation(
        [optimised("ppo", kl=(-1e-3, 0.5, 2.0))], title="t", kl_name="measured", unit="sd"
    )
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), np.sqrt([0, 0.5, 2.0]))


def test_accuracy_under_flips_keeps_series_apart_by_less_than_the_shares_are():
    names = ("single", "mean", "minimum")
    rates = (0, 0.1, 0.25)
    figure = reward_plots.accuracy_under_flips(
        [
            FlipAccuracy(name=name, flip_rates=rates, accuracy=[interval(a, 0.01) for a in (0.9, 0.8, 0.7)])
            for name in names
        ],
        num_pairs=2000,
    )
    assert_drawn(figure)
    axes = figure.axes[0]
    positions = np.array([drawn_points(axes, name)[0] for name in names])
    assert (np.diff(positions, axis=0) > 0).all()
    np.testing.assert_allclose(positions.mean(axis=0), rates, atol=1e-12)
    assert np.ptp(positions, axis=0).max() < 0.02
    assert [tick for tick in axes.get_xticks()] == list(rates)
    assert legend_texts(figure) == list(names)


def test_gold_by_w_nominal_has_a_line_per_sweep_and_one_name_for_all_references():
    figure = reward_plots.gold_by_w_nominal([sweep("n = 16", 1.5), sweep("n = 64", 0.5)], title="t", unit="sd")
    assert_drawn(figure)
    np.testing.assert_array_equal(drawn_points(figure.axes[0], "n = 16")[1], [1, 2, 0])
    np.testing.assert_allclose(drawn_points(figure.axes[0], "n = 64")[0], [0, 0.2, 1], atol=0.01)
    assert legend_texts(figure) == ["n = 16", "n = 64", "mean over members"]
    assert legend_texts(reward_plots.gold_by_w_nominal([sweep("n = 16")], title="t", unit="sd")) == ["n = 16"]


def test_shift_signals_show_every_response_and_the_area():
    far = signal("disagreement", 0.3)
    figure = reward_plots.shift_signals([far, signal("sigma", -0.1)])
    assert_drawn(figure)
    for axes in figure.axes:
        for steps in axes.patches:
            assert steps.get_data().values.sum() == pytest.approx(1), "also what lies beyond the last edge"
    assert f"{far.auroc.mean:.3f} [" in figure.axes[0].get_title()
    assert [axes.get_xlabel() for axes in figure.axes] == ["disagreement", "sigma"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: reward_plots.reliability([]),
        lambda: reward_plots.reliability([posterior("probe", [])]),
        lambda: reward_plots.reliability([posterior("probe", [0.5]), posterior("none", [])]),
        lambda: reward_plots.overoptimisation([], title="t", kl_name="bound", unit="sd"),
        lambda: reward_plots.overoptimisation([optimised("a", kl=())], title="t", kl_name="bound", unit="sd"),
        lambda: reward_plots.overoptimisation(
            [optimised("a", kl=(0.0,))], title="t", kl_name="bound", unit="sd", sizes=(1,)
        ),
        lambda: reward_plots.accuracy_under_flips([], num_pairs=0),
        lambda: reward_plots.accuracy_under_flips(
            [FlipAccuracy(name="a", flip_rates=(0.1,), accuracy=[interval(0.7)])], num_pairs=9
        ),
        lambda: reward_plots.gold_by_w_nominal([], title="t", unit="sd"),
        lambda: reward_plots.shift_signals([]),
        lambda: reward_plots.shift_signals([ShiftSignal(name="a", familiar=[], shifted=[1.0], auroc=interval(0.5))]),
        lambda: reward_plots.shift_signals([ShiftSignal(name="a", familiar=[0.0], shifted=[0.0], auroc=interval(0.5))]),
        lambda: reward_plots.shift_signals([signal("a", 0.1, num=2)]),
    ],
)
def test_edge_inputs_are_drawn_or_named_as_missing(draw):
    assert_drawn(draw())
