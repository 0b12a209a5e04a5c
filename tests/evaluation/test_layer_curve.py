from __future__ import annotations

import pytest
import torch

from raylign.errors import ShapeError
from raylign.evaluation.layers import layer_curve


def simulate(num_pairs: int, strengths: list[float], seed: int):
    """States whose layer l is `strengths[l]` either side of a common mean along one direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.tensor(strengths)[:, None] * torch.nn.functional.one_hot(torch.tensor(0), 6)
    noise = torch.randn(2, num_pairs, len(strengths), 6, generator=generator)
    return 5 + noise[0] + direction, 5 + noise[1] - direction


def test_layers_are_ranked_by_what_they_carry():
    chosen, rejected = simulate(400, [0.0, 0.5, 2.0], seed=0)
    test_chosen, test_rejected = simulate(400, [0.0, 0.5, 2.0], seed=1)
    curve = layer_curve(chosen, rejected, test_chosen=test_chosen, test_rejected=test_rejected, ridge=0.1)
    assert [record.position for record in curve] == [0, 1, 2]
    normal = torch.distributions.Normal(0.0, 1.0)
    for record, strength in zip(curve, (0.0, 0.5, 2.0), strict=True):
        by_theory = normal.cdf(torch.tensor(strength)), normal.cdf(torch.tensor(strength * 2**0.5))
        assert record.item_accuracy == pytest.approx(by_theory[0].item(), abs=0.05)
        assert record.pair_accuracy == pytest.approx(by_theory[1].item(), abs=0.05)
        assert 0 <= record.calibration_error < 0.5


def test_half_precision_features_are_accepted():
    chosen, rejected = (side.half() for side in simulate(30, [1.0], seed=0))
    (record,) = layer_curve(chosen, rejected, test_chosen=chosen, test_rejected=rejected, ridge=0.1)
    assert record.pair_accuracy > 0.8


def test_held_out_features_of_other_layers_are_refused():
    chosen, rejected = simulate(10, [1.0, 1.0], seed=0)
    with pytest.raises(ShapeError, match="layers and width"):
        layer_curve(chosen, rejected, test_chosen=chosen[:, :1], test_rejected=rejected[:, :1], ridge=0.1)
