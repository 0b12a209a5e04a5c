from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.reward import anchor_loss, bradley_terry, margin_loss


def rewards(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOSSES = {
    "bradley_terry": lambda c, r: bradley_terry(c - r),
    "margin": lambda c, r: margin_loss(c, r, margin_target=1.0),
    "anchor": anchor_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_gradient_is_right(loss):
    chosen, rejected = rewards(-3.0, 0.0, 5.0).requires_grad_(), rewards(2.0, 0.0, -4.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, (chosen, rejected))


@every_loss
def test_extreme_rewards_have_finite_loss(loss):
    far = torch.tensor([-1e6, 1e6])
    assert torch.isfinite(loss(far, -far)).all()


@every_loss
def test_empty_batch_gives_empty_loss(loss):
    assert loss(rewards(), rewards()).shape == (0,)


@every_loss
def test_negating_and_swapping_the_answers_changes_nothing(loss):
    chosen, rejected = rewards(1.0, -2.0, 0.3), rewards(0.5, 1.0, -7.0)
    torch.testing.assert_close(loss(-rejected, -chosen), loss(chosen, rejected), rtol=0, atol=1e-14)


def test_closed_forms():
    chosen, rejected = rewards(2.0), rewards(0.5)
    assert bradley_terry(chosen - rejected).item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)
    margin = margin_loss(chosen, rejected, margin_target=1.0)  # E2
    assert margin.item() == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-12)
    anchor = math.log1p(math.exp(-2.0)) + math.log1p(math.exp(0.5))  # E3
    assert anchor_loss(chosen, rejected).item() == pytest.approx(anchor, abs=1e-12)


def test_margin_loss_without_target_is_bradley_terry():
    chosen, rejected = rewards(2.0, -1.0), rewards(0.5, 3.0)
    assert torch.equal(margin_loss(chosen, rejected, margin_target=0.0), bradley_terry(chosen - rejected))


def test_only_the_anchor_sees_a_common_offset():
    chosen, rejected = rewards(2.0, -1.0), rewards(0.5, 3.0)
    moved = margin_loss(chosen + 100, rejected + 100, margin_target=1.0)
    torch.testing.assert_close(moved, margin_loss(chosen, rejected, margin_target=1.0), rtol=0, atol=1e-12)
    assert (anchor_loss(chosen + 100, rejected + 100) > anchor_loss(chosen, rejected) + 90).all()


@pytest.mark.parametrize("loss", [anchor_loss, lambda c, r: margin_loss(c, r, margin_target=1.0)])
def test_rewards_of_other_shape_are_refused(loss):
    with pytest.raises(ShapeError, match="alike"):
        loss(rewards(1.0), rewards(1.0, 2.0))
