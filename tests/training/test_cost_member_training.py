"""The sign-aware loss on fine-tuned members: its value, and costs above 0 for what people called unsafe."""

from __future__ import annotations

import pytest
import torch
from test_reward_model_training import made_up_pairs, members, options, rewards

from raylign.rewards.fit_cost import PairVerdicts
from raylign.training.cost_model import CostObjective
from raylign.training.reward_model import train_members


def verdicts(chosen: list[bool | None], rejected: list[bool | None], **changes: bool) -> PairVerdicts:
    return PairVerdicts.of_pairs(chosen, rejected, **changes)


def fitted(pairs, objective: CostObjective, *, weights: torch.Tensor | None = None, **changes):
    forward = members(["member0"])
    before = rewards(forward, "member0", pairs)
    losses = train_members(
        forward, ["member0"], pairs, options=options(**changes), seeds=[0], weights=weights, backward=objective
    )
    return forward, before, losses


def test_the_loss_is_that_of_order_verdicts_and_size():
    pairs = made_up_pairs(4)
    found = verdicts([True, False, None, True], [False, False, True, None])
    weights = torch.tensor([[1.0], [2.0], [1.0], [0.0]])
    _, costs, losses = fitted(pairs, CostObjective(verdicts=found, regularization=0.1), weights=weights, batch_size=4)
    (a, b, c, _), (x, y, z, _) = costs.double().tolist()

    def soft(value: float) -> float:
        return float(torch.log1p(torch.tensor(-value, dtype=torch.float64).exp()))  # -log sigmoid

    expected = [
        soft(x - a) + soft(-a) + soft(x) + 0.1 * (a * a + x * x) / 2,  # chosen safe, rejected unsafe
        soft(b) + soft(y) + 0.1 * (b * b + y * y) / 2,  # both unsafe: no order
        soft(-z) + 0.1 * z * z,  # one verdict
    ]
    assert c != z
    assert float(losses[0, 0]) == pytest.approx((expected[0] + 2 * expected[1] + expected[2]) / 4, abs=1e-6)


def test_members_learn_on_which_side_of_zero_an_answer_is():
    """Safe and unsafe answers come as chosen and as rejected ones, so that order alone says nothing."""
    pairs = made_up_pairs(64)
    chosen_safe = [index % 2 == 0 for index in range(64)]
    # the token 7 is in chosen answers: where they are to be the unsafe ones the two change places
    pairs = [
        pair
        if safe
        else type(pair)(prompt_ids=pair.prompt_ids, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
        for pair, safe in zip(pairs, chosen_safe, strict=True)
    ]
    found = verdicts(chosen_safe[:48], [not safe for safe in chosen_safe[:48]])
    forward, _, _ = fitted(pairs[:48], CostObjective(verdicts=found, regularization=1e-3), epochs=12)
    costs = rewards(forward, "member0", pairs[48:])
    is_unsafe = torch.tensor([[not safe, safe] for safe in chosen_safe[48:]]).T
    assert float(((costs > 0) == is_unsafe).double().mean()) > 0.9


def test_verdicts_that_agree_tie_the_zero_alone():
    """All unsafe: costs rise above 0, and no order is learned from the stored one unless pairs are ordered by it."""
    pairs, margins = made_up_pairs(24), []
    for is_ordered in (False, True):
        found = verdicts([False] * 24, [False] * 24, is_chosen_safer=is_ordered)
        forward, _, _ = fitted(pairs, CostObjective(verdicts=found, regularization=0.01), epochs=20)
        chosen, rejected = rewards(forward, "member0", pairs)
        assert float((rejected > 0).double().mean()) > 0.9
        margins.append(float((rejected - chosen).mean()))
    assert abs(margins[0]) < 0.1 and margins[1] > 1
