from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.cost import cost_order_loss, cost_sign_loss, cost_size_penalty


def costs(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


SIGNS = costs(1.0, -1.0, 0.0)  # safe, unsafe, no verdict
LOSSES = {
    "order": lambda cost: cost_order_loss(cost, cost.flip(0)),
    "sign": lambda cost: cost_sign_loss(cost, SIGNS[: len(cost)]),
    "size": lambda cost: cost_size_penalty(cost, regularization=0.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def test_closed_forms():
    order = cost_order_loss(costs(0.5), costs(2.0))
    assert order.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-12)
    sign = cost_sign_loss(costs(2.0, 2.0, 2.0), SIGNS)
    expected = [math.log1p(math.exp(2.0)), math.log1p(math.exp(-2.0)), 0.0]
    assert sign.tolist() == pytest.approx(expected, abs=1e-12)
    assert cost_size_penalty(costs(-3.0), regularization=0.001).item() == pytest.approx(0.009, abs=1e-15)


@every_loss
def test_gradient_is_right(loss):
    assert torch.autograd.gradcheck(loss, (costs(-3.0, 0.2, 5.0).requires_grad_(),))


@every_loss
def test_extreme_costs_have_finite_loss(loss):
    assert torch.isfinite(loss(torch.tensor([-1e6, 1e6]))).all()


@every_loss
def test_empty_batch_gives_empty_loss(loss):
    assert loss(costs()).shape == (0,)


def test_negating_costs_and_swapping_verdicts_changes_nothing():
    cost, other = costs(1.0, -2.0, 0.3), costs(0.5, 1.0, -7.0)
    torch.testing.assert_close(cost_sign_loss(-cost, -SIGNS), cost_sign_loss(cost, SIGNS), rtol=0, atol=1e-14)
    torch.testing.assert_close(cost_order_loss(-other, -cost), cost_order_loss(cost, other), rtol=0, atol=1e-14)


def test_unsafe_answers_are_pushed_up_and_safe_ones_down():
    cost = costs(0.0, 0.0, 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(cost_sign_loss(cost, SIGNS).sum(), cost)
    assert gradient.tolist() == [0.5, -0.5, 0.0]  # descent lowers the safe one, raises the unsafe one
    (gradient,) = torch.autograd.grad(cost_order_loss(cost[:1], cost[1:2]).sum(), cost)
    assert gradient.tolist() == [0.5, -0.5, 0.0]


def test_only_the_sign_sees_a_common_offset():
    cost, other = costs(1.0, -2.0), costs(0.5, 1.0)
    torch.testing.assert_close(cost_order_loss(cost + 5, other + 5), cost_order_loss(cost, other))
    assert not torch.allclose(cost_sign_loss(cost + 5, SIGNS[:2]), cost_sign_loss(cost, SIGNS[:2]))


def test_members_are_independent_columns():
    cost = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = cost_sign_loss(cost, SIGNS)
    for member in range(4):
        assert torch.equal(together[:, member], cost_sign_loss(cost[:, member], SIGNS))


def test_costs_that_do_not_belong_together_are_refused():
    with pytest.raises(ShapeError, match="must be alike"):
        cost_order_loss(costs(1.0), costs(1.0, 2.0))
    with pytest.raises(ShapeError, match="one per answer"):
        cost_sign_loss(costs(1.0), SIGNS)
