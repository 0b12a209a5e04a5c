"""Whether members share a zero, and who decides, on members made by hand."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from raylign.errors import ShapeError
from raylign.rewards.aggregate import minimum
from raylign.rewards.member_facts import ANCHOR_LIMIT, anchor_spread, member_facts


def correlated_members(n: int, correlation: float, seed: int = 0) -> torch.Tensor:
    """Five standardised members (n, 5) that share part of what they say."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(n, 1, generator=generator), torch.randn(n, 5, generator=generator)
    mu = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return (mu - mu.mean(0)) / mu.std(0)


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def test_spread_by_hand():
    """Means 0, 3 and 0 of members with deviations 1, 1 and 2: sqrt(2) over sqrt(2)."""
    mu = torch.tensor([[-1.0, 4.0, 2.0], [1.0, 2.0, -2.0]])
    assert anchor_spread(mu) == pytest.approx(1.0)
    assert anchor_spread(10 * mu + 7) == pytest.approx(1.0)


def test_spread_of_members_that_say_nothing():
    constant = torch.full((7, 3), 0.1)
    assert anchor_spread(constant) == 0.0
    assert anchor_spread(torch.randn(9, 1)) == 0.0
    assert anchor_spread(torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == math.inf


def test_standardised_members_lie_well_under_the_limit_also_on_other_responses():
    for correlation in (0.0, 0.7, 0.95):
        mu = correlated_members(1064, correlation)
        assert anchor_spread(mu) < 1e-6
        assert anchor_spread(mu[:64]) < ANCHOR_LIMIT / 2


@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.95])
def test_moving_one_member_passes_the_limit(correlation):
    """By c it moves the spread by 2/5 c, whatever the others say, and then supplies most of the minima."""
    mu = correlated_members(1000, correlation)
    offset = torch.tensor([0.0, 0.0, -2.0, 0.0, 0.0])
    assert anchor_spread(mu + offset) == pytest.approx(0.8, abs=1e-3)
    assert anchor_spread(mu + offset) > ANCHOR_LIMIT
    assert member_facts(mu + offset).argmin_share[2] > 0.75
    assert anchor_spread(mu + 5.0) < 1e-5


def test_the_limit_lies_where_one_member_begins_to_decide_for_all():
    """Rank correlation of the minimum with the anchored one, and share of the minima of the busiest of 5 members."""
    measured = {}
    for spread in (0.1, ANCHOR_LIMIT, 3.0):
        ranks, shares = [], []
        for seed in range(60):
            mu = correlated_members(500, 0.0, seed)
            offset = torch.randn(5, generator=torch.Generator().manual_seed(1000 + seed))
            moved = mu + spread * (offset - offset.mean()) / offset.std(correction=0)
            assert anchor_spread(moved) == pytest.approx(spread, rel=2e-3)
            ranks.append(rank_correlation(minimum(mu), minimum(moved)))
            shares.append(max(member_facts(moved).argmin_share))
        measured[spread] = (sum(ranks) / 60, sum(shares) / 60)
    assert measured[0.1] == pytest.approx((0.99, 0.25), abs=0.02)
    assert measured[ANCHOR_LIMIT] == pytest.approx((0.79, 0.44), abs=0.03)
    assert measured[3.0] == pytest.approx((0.40, 0.82), abs=0.06)


def test_facts_by_hand():
    mu = torch.tensor([[0.0, 2.0], [4.0, 1.0], [3.0, 3.0], [5.0, 6.0]])
    sigma = torch.tensor([[0.001, 0.3], [0.4, 0.002], [0.2, 0.2], [0.6, 0.1]])
    facts = member_facts(mu, sigma, sigma_floor=0.001)
    assert facts.nominal_share == (0.5, 0.5)
    assert facts.argmin_share == (0.75, 0.25)
    assert facts.mean_gap == pytest.approx((0 + 0 + 0 + 1) / 4)
    assert facts.mean_disagreement == pytest.approx((1 + 1.5 + 0 + 0.5) / 4)
    assert facts.mean_sigma == pytest.approx(1.803 / 8)
    assert facts.sigma_floor_share == 2 / 8


def test_facts_of_members_that_state_no_sigma():
    mu = torch.tensor([[0.0, 2.0], [4.0, 1.0]])
    assert asdict(member_facts(mu, sigma_floor=0.001)) == {
        "nominal_share": None,
        "argmin_share": (0.5, 0.5),
        "mean_gap": 1.25,
        "mean_disagreement": 1.25,
        "mean_sigma": None,
        "sigma_floor_share": None,
    }


def test_identical_members_disagree_by_nothing():
    mu = torch.randn(20, 1).double().expand(-1, 4)
    facts = member_facts(mu)
    assert facts.mean_disagreement == pytest.approx(0.0, abs=1e-15)
    assert facts.mean_gap == pytest.approx(0.0, abs=1e-15)


def test_shapes_and_empty_rounds_are_refused():
    mu = torch.randn(4, 3)
    with pytest.raises(ShapeError, match="at least one response"):
        anchor_spread(mu[:0])
    with pytest.raises(ShapeError, match="at least one response"):
        member_facts(mu[:0])
    with pytest.raises(ShapeError, match="one per reward"):
        member_facts(mu, mu[:, :2])
    with pytest.raises(ShapeError, match=r"\(n, M\)"):
        anchor_spread(mu[0])
