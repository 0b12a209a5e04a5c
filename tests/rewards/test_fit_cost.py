"""Cost heads on simulated states: what they learn, what they ignore, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.fit import member_weights, predict
from raylign.rewards.fit_cost import CostRows, cost_losses, fit_cost

OPTIONS = {
    "epochs": 8,
    "batch_size": 16,
    "learning_rate": 0.01,
    "weight_decay": 0.01,
    "ridge": 0.1,
    "regularization": 0.001,
    "seed": 0,
}
LAYERS, WIDTH = 3, 12


def simulate(num: int, *, seed: int = 0, unsafe_share: float = 0.5, strength: float = 1.5) -> tuple[torch.Tensor, list]:
    """Answers whose states lie along one direction by their verdict, around a common mean; (states, is_safe)."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.ones(LAYERS, WIDTH) / math.sqrt(WIDTH)
    unsafe = torch.rand(num, generator=generator) < unsafe_share
    sign = torch.where(unsafe, 1.0, -1.0)[:, None, None]
    states = 5 + torch.randn(num, LAYERS, WIDTH, generator=generator) + strength * sign * direction
    return states, (~unsafe).tolist()


def pairs(num: int, *, seed: int = 0, flip: bool = False) -> CostRows:
    states, is_safe = simulate(2 * num, seed=seed)
    verdicts = [not safe if flip else safe for safe in is_safe]
    return CostRows.of_pairs(states[:num], states[num:], chosen_safe=verdicts[:num], rejected_safe=verdicts[num:])


def answers(num: int, **options) -> CostRows:
    return CostRows.of_answers(*simulate(num, **options))


@pytest.fixture(scope="module")
def fit():
    return fit_cost(pairs(150), valid=pairs(60, seed=1), **OPTIONS)


def signs_right(head, rows: CostRows) -> float:
    right = [((predict(head, side).mean > 0) == (rows.signs[:, k] < 0)).double() for k, side in enumerate(rows.sides)]
    return float(torch.stack(right).mean())


def soft(x: float) -> float:
    return math.log1p(math.exp(x))


def test_loss_of_a_row_is_the_sum_of_its_parts():
    first, second = torch.tensor([[2.0], [2.0], [2.0], [2.0]]), torch.tensor([[0.5], [0.5], [0.5], [0.5]])
    states = torch.zeros(4, 1, 1)
    rows = CostRows.of_pairs(
        states,
        states,
        chosen_safe=[True, False, None, None],
        rejected_safe=[False, False, True, None],
    )
    assert rows.order.tolist() == [1, 0, 0, 0]
    found = cost_losses([first, second], rows, regularization=0.1)[:, 0].tolist()
    expected = [
        soft(2 - 0.5) + soft(2) + soft(-0.5) + 0.1 * (4 + 0.25) / 2,  # order and both verdicts
        soft(-2) + soft(-0.5) + 0.1 * (4 + 0.25) / 2,  # verdicts alike: no order
        soft(0.5) + 0.1 * 0.25,  # one verdict
        0.0,
    ]
    assert found == pytest.approx(expected, abs=1e-6)


def test_swapping_the_sides_changes_no_loss():
    rows = pairs(20)
    swapped = CostRows(sides=rows.sides[::-1], signs=rows.signs.flip(1), order=-rows.order)
    first, second = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        cost_losses([first, second], rows, regularization=0.1),
        cost_losses([second, first], swapped, regularization=0.1),
    )


def test_pairs_ordered_by_safety_lend_their_order_where_verdicts_do_not_differ():
    states = torch.zeros(4, 1, 1)
    verdicts = {"chosen_safe": [True, False, False, None], "rejected_safe": [False, True, False, None]}
    assert CostRows.of_pairs(states, states, **verdicts).order.tolist() == [1, -1, 0, 0]
    rows = CostRows.of_pairs(states, states, **verdicts, is_chosen_safer=True)
    assert rows.order.tolist() == [1, -1, 1, 1]  # a verdict against the stored order wins
    assert rows.has_verdict.tolist() == [True, True, True, False]


def test_a_cost_is_above_zero_for_unsafe_answers(fit):
    held_out = pairs(200, seed=2)
    assert signs_right(fit.head, held_out) > 0.9
    assert fit.head.scale.tolist() == [1.0]  # its zero and its unit are the loss's, not standardised
    assert fit.head.shift.tolist() == [0.0]


def test_flipped_verdicts_give_the_opposite_cost():
    flipped = fit_cost(pairs(150, flip=True), valid=pairs(60, seed=1, flip=True), **OPTIONS)
    assert signs_right(flipped.head, pairs(200, seed=2)) < 0.1


def test_the_zero_of_single_answers_follows_a_rare_verdict():
    """Stated probabilities match the frequency, also where one verdict is rare: the mean is a calibrated one."""
    rows, valid = answers(600, unsafe_share=0.15, strength=0.5), answers(300, seed=1, unsafe_share=0.15, strength=0.5)
    head = fit_cost(rows, valid=valid, **OPTIONS).head
    stated = torch.sigmoid(predict(head, answers(2000, seed=2, unsafe_share=0.15, strength=0.5).sides[0]).mean)
    assert float(stated.mean()) == pytest.approx(0.15, abs=0.03)


def test_answers_without_verdict_teach_nothing_but_the_scale_of_states():
    rows = pairs(60)
    signs = rows.signs.clone()
    signs[::2, 1] = 0
    order = torch.where(signs[:, 1] == 0, 0.0, rows.order)
    one_sided = CostRows(sides=rows.sides, signs=signs, order=order)
    moved = one_sided.sides[1].clone()
    # the same states in another order among answers without verdict: same normaliser, same fit
    moved[::2] = moved[::2].flip(0)
    other = dataclasses.replace(one_sided, sides=(one_sided.sides[0], moved))
    heads = [fit_cost(part, valid=pairs(40, seed=1), **OPTIONS).head for part in (one_sided, other)]
    for first, second in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_best_epoch_has_the_lowest_validation_loss(fit):
    losses = [float(record.valid_loss) for record in fit.history]
    assert [record.epoch for record in fit.history] == list(range(9))
    assert losses[fit.best_epochs[0]] == min(losses)
    assert fit.best_epochs[0] > 0


def test_members_in_one_pass_are_the_members_of_smaller_passes():
    rows, valid = pairs(40), pairs(20, seed=1)
    weights = member_weights(40, 3, head_data="bootstrap", seed=0)
    together = fit_cost(rows, valid=valid, num_heads=3, weights=weights, **OPTIONS).head
    fewer = fit_cost(rows, valid=valid, num_heads=2, weights=weights[:, :2], **OPTIONS).head
    part = together.select([0, 1])
    for first, second in zip(part.parameters(), fewer.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.probe_weight[0], together.probe_weight[1])


def test_rows_that_cannot_teach_a_zero_are_refused():
    states, _ = simulate(6)
    unlabelled = CostRows.of_pairs(states[:3], states[3:], chosen_safe=[True, None, False], rejected_safe=[None] * 3)
    with pytest.raises(DataError, match="1 of 3 rows have no safety verdict"):
        fit_cost(unlabelled, valid=pairs(3), **OPTIONS)
    with pytest.raises(DataError, match="all 6 answers with a verdict are safe"):
        fit_cost(CostRows.of_answers(states, [True] * 6), valid=answers(6, seed=1), **OPTIONS)
    with pytest.raises(DataError, match="at least one"):
        fit_cost(pairs(4)[torch.arange(0)], valid=pairs(3), **OPTIONS)
    with pytest.raises(ShapeError, match=r"one or two \(N, L, D\)"):
        CostRows(sides=(states,), signs=torch.ones(6, 2), order=torch.zeros(6))


def test_start_is_the_ridge_regression_of_answers_with_a_verdict():
    """Probes say +1 of unsafe and -1 of safe answers, around the mean verdict, which is their bias."""
    rows = pairs(40)
    signs = rows.signs.clone()
    signs[::3, 0] = 0
    signs[rows.signs[:, 1] > 0, 1] = 0  # more unsafe than safe answers are left
    rows = CostRows(sides=rows.sides, signs=signs, order=torch.zeros(40))[signs.ne(0).any(1)]
    head = fit_cost(rows, valid=pairs(20, seed=1), **{**OPTIONS, "epochs": 0}).head
    known = rows.signs.T.flatten() != 0
    target = -rows.signs.T.flatten()[known].double()
    assert abs(target.mean()) > 0.2  # otherwise the bias is not tested
    torch.testing.assert_close(head.probe_bias, torch.full((1, LAYERS), float(target.mean())))
    for layer in range(LAYERS):
        states = torch.cat([side[:, layer] for side in rows.sides]).double()
        normal = ((states - states.mean(0)) / (states - states.mean(0)).square().mean().sqrt())[known]
        gram = normal.T @ normal + len(rows) * OPTIONS["ridge"] * torch.eye(WIDTH, dtype=torch.float64)
        solution = torch.linalg.solve(gram, normal.T @ (target - target.mean()))
        torch.testing.assert_close(head.probe_weight[0, layer].double(), solution, rtol=1e-4, atol=1e-4)
