"""What the figures share: distances of error bars, order of a legend, the figure that says why it is empty."""

from __future__ import annotations

import numpy as np

from raylign.report.compare_facts import Spread
from raylign.report.figures import empty_panel, error_bars, legend_below, new_figure
from raylign.types import Interval


def test_error_bars_are_distances_and_never_negative():
    intervals = [Interval(mean=0.5, low=0.25, high=1.0, num_items=8), Spread(mean=2.0, low=2.5, high=2.0)]
    np.testing.assert_array_equal(error_bars(intervals), [[0.25, 0.0], [0.5, 0.0]])


def test_the_last_labels_of_a_legend_come_last_with_their_own_line():
    figure = new_figure(4.0, 3.0)
    axes = figure.subplots()
    for label, color in (("target", "red"), ("dpo", "blue"), ("before", "green"), ("anchor", "black")):
        axes.axhline(0.0, label=label, color=color)
    legend_below(figure, axes, last=("before", "target"))
    [legend] = figure.legends
    shown = [(text.get_text(), line.get_color()) for text, line in zip(legend.texts, legend.get_lines(), strict=True)]
    assert shown == [("dpo", "blue"), ("anchor", "black"), ("target", "red"), ("before", "green")]


def test_an_empty_panel_says_why():
    [axes] = empty_panel("Wall time by phase", "no phase was timed").axes
    assert axes.get_title() == "Wall time by phase"
    assert [text.get_text() for text in axes.texts] == ["not measured: no phase was timed"]
