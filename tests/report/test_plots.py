"""Figures: non-empty images for ordinary and for edge inputs."""

from __future__ import annotations

import pytest
from shown import assert_drawn

from raylign.report import plots
from raylign.report.data import ConfidenceFacts, LayerPoint
from raylign.types import Interval

POINT = LayerPoint(layer=4, pair_accuracy=0.7, calibration_error=0.0)


def test_all_figures_of_a_run(report_data):
    data = report_data
    costs = [[c.cost for c in answers if c.harmful] for answers in (data.before, data.after)]
    for figure in (
        plots.layer_accuracy(data.reward.layers, whole=data.reward.test_accuracy, kind="hybrid", num_pairs=600),
        plots.confidence_histogram(data.confidence),
        plots.training_curves(data.training),
        plots.drift_figure(data.drift),
        plots.safety_bars(data.comparison),
        plots.cost_histogram(*costs),
        plots.phase_seconds(data.seconds),
    ):
        assert_drawn(figure)


def test_every_term_of_a_variational_run_is_drawn():
    terms = ("likelihood", "negative", "kl", "td", "cer")
    records = [{"step": s, **{f"ava/trunk_grad_norm/{term}": 0.1 * s for term in terms}} for s in (1, 2)]
    (axes,) = plots.training_curves(records).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(terms)
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}) == 5


def flat_confidence(num_flips: int) -> ConfidenceFacts:
    return ConfidenceFacts(
        num_pairs=5, num_flips=num_flips, mean=0.9, histogram=(0, 5) if not num_flips else (5, 0), edges=(0, 0.5, 1)
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.layer_accuracy([POINT], whole=None, kind="brme", num_pairs=1),
        lambda: plots.layer_accuracy(
            [POINT], whole=Interval(mean=1, low=1, high=1, num_items=3), kind="brme", num_pairs=3
        ),
        lambda: plots.confidence_histogram(flat_confidence(0)),
        lambda: plots.confidence_histogram(flat_confidence(5)),
        lambda: plots.training_curves([]),
        lambda: plots.training_curves([{"step": 1, "learning_rate": 0.1}]),
        lambda: plots.training_curves([{"step": 1, "loss": 0.7}]),
        lambda: plots.training_curves([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "confidence/flips": 0.0}]),
        lambda: plots.cost_histogram([0.0], [0.0]),
        lambda: plots.cost_histogram([-1.0, -2.0], [-1.0, -1.0]),
        lambda: plots.cost_histogram([], []),
        lambda: plots.phase_seconds({}),
        lambda: plots.phase_seconds({"train": 0.0}),
    ],
)
def test_edge_inputs(draw):
    assert_drawn(draw())
