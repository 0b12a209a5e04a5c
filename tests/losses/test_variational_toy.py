"""AVA in a world whose true rewards of tokens are known (`tests/token_world.py`): four seeds of each objective.

Only relations are asserted; eight seeds of sixteen objectives are in docs/ava-synthetic.md.
"""

from __future__ import annotations

import pytest
import torch

from tests.token_world import (
    VOCABULARY,
    Objective,
    Outcome,
    evaluate,
    gold_rewards,
    make_worlds,
    run,
    train,
)

OBJECTIVES = {
    "bt_last": Objective(kind="bt_last"),
    "bt_sum": Objective(kind="bt_sum"),
    "ava_p": Objective(cer="log_sigmoid"),
    "td_weight 2": Objective(cer="log_sigmoid", td_weight=2.0),
    "without cer": Objective(cer_weight=0.0),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Of each objective after 500 steps."""
    worlds = make_worlds(range(4))
    return {name: run(worlds, objective) for name, objective in OBJECTIVES.items()}


@pytest.mark.slow
def test_variational_last_rewards_order_pairs_as_well_as_bradley_terry(outcomes):
    assert outcomes["ava_p"].last.mean() >= outcomes["bt_last"].last.mean() - 0.01


@pytest.mark.slow
def test_a_td_weight_above_one_loses_the_reward_and_its_spread(outcomes):
    above = outcomes["td_weight 2"]
    assert (outcomes["ava_p"].last - above.last).mean() >= 0.2
    assert above.sigma.mean() < 0.4 < outcomes["ava_p"].sigma.mean()


@pytest.mark.slow
def test_without_the_contrastive_term_only_the_policy_knows_the_order(outcomes):
    assert outcomes["without cer"].last.mean() <= 0.62
    assert outcomes["without cer"].log_prob.mean() >= 0.68


@pytest.mark.slow
def test_summed_bradley_terry_finds_the_rewards_of_tokens_better(outcomes):
    assert (outcomes["bt_sum"].correlation - outcomes["ava_p"].correlation).mean() >= 0.2


def test_gold_of_a_response_is_that_of_its_pairs_of_neighbours():
    table = torch.arange(2.0 * (VOCABULARY + 1) * VOCABULARY).view(2, VOCABULARY + 1, VOCABULARY)
    tokens = torch.tensor([[[3, 1]], [[0, 7]]])
    expected = torch.tensor([[[table[0, 8, 3], table[0, 3, 1]]], [[table[1, 8, 0], table[1, 0, 7]]]])
    assert torch.equal(gold_rewards(table, tokens), expected)


def test_seeds_train_apart_from_each_other():
    """The second of two seeds ends where it ends alone; so does its evaluation."""
    both, alone = make_worlds([3, 5], 4), make_worlds([5], 4)
    for objective in (Objective(), Objective(kind="bt_sum"), Objective(kind="bt_attention"), Objective(kind="ava_d")):
        trained = train(both, objective), train(alone, objective)
        for name, value in trained[1].items():
            torch.testing.assert_close(
                trained[0][name][1:], value, rtol=1e-3, atol=2e-4
            )  # Adam divides rounding by itself
        assert any(not torch.equal(value, alone.parameters[name]) for name, value in trained[1].items())
    first, second = evaluate(both, both.parameters, objective), evaluate(alone, alone.parameters, objective)
    torch.testing.assert_close(first.log_prob[1:], second.log_prob, rtol=0, atol=2e-3)
    assert second.gain.item() == 0
