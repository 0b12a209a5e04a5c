"""What all figures share: palette, size, error bars, legends, and the figure in place of one that cannot be drawn.

The colours are Okabe and Ito's, distinct under colour blindness. Figures are drawn without pyplot and its global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from raylign.report.data import NotMeasured

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from raylign.report.compare_facts import Spread
    from raylign.types import Interval

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
GRID = "#e6e9ee"
COLORS = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "black")  # of series, in order
MARKERS = "osD^vP*"  # of the same series
_DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def empty_panel(title: str, reason: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(7.0, 1.6)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(title)
    axes.text(0.5, 0.5, str(NotMeasured(reason=reason)), ha="center", va="center", transform=axes.transAxes)
    return figure


def error_bars(intervals: Sequence[Interval | Spread]) -> np.ndarray:
    """Distances from the mean to both ends, as `Axes.errorbar` takes them. Shape (2, N)."""
    return np.array([[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]).clip(min=0)


def legend_below(figure: Figure, axes: Axes, *, num_columns: int = 4, last: Sequence[str] = ()) -> None:
    """A legend outside the axes, where it covers no data.

    Args:
        figure: that gets the legend.
        axes: whose labelled artists it lists.
        num_columns: at most so many entries in a row.
        last: labels that come after all others.
    """
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] in last)
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside lower center",
        ncols=num_columns,
        frameon=False,
        fontsize=9,
    )
