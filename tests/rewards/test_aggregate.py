"""Rules over members: closed forms, limits, invariances, and one head for several workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from raylign.errors import ConfigError, ShapeError
from raylign.rewards.aggregate import (
    brme,
    cvar,
    entropic,
    global_rewards,
    head_sums,
    lcb,
    mean,
    minimum,
    nominal_head,
    uwo,
    worst_head,
    worst_head_of_sums,
)

RULES: dict[str, Callable[..., torch.Tensor]] = {
    "mean": mean,
    "minimum": minimum,
    "uwo": partial(uwo, uncertainty_weight=0.5),
    "lcb": partial(lcb, k=1.0),
    "cvar": partial(cvar, level=0.5),
    "entropic": partial(entropic, b=1.0),
    "entropic_gaussian": partial(entropic, b=1.0, form="gaussian"),
    "brme": partial(brme, w_nominal=0.2),
}
NEEDS_SIGMA = {"brme"}

# mean 4, minimum 1, variance (1/M) (9 + 4 + 1 + 0 + 36)/5 = 10
VECTOR = torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0]], dtype=torch.float64)


def members(n: int = 200, num_heads: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random means, and distinct sigmas, (n, M) each."""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(n, num_heads, generator=generator, dtype=torch.float64)
    return mu, 0.1 + torch.rand(n, num_heads, generator=generator, dtype=torch.float64)


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (partial(mean, VECTOR), 4.0),
        (partial(minimum, VECTOR), 1.0),
        (partial(uwo, VECTOR, uncertainty_weight=0.1), 3.0),
        (partial(uwo, VECTOR, uncertainty_weight=0.5), -1.0),
        (partial(lcb, VECTOR, k=1.0), 4 - math.sqrt(10)),
        (partial(cvar, VECTOR, level=0.4), 1.5),
        (partial(cvar, VECTOR, level=0.5), (1 + 2 + 0.5 * 3) / 2.5),
        (partial(entropic, VECTOR, b=1000.0), 3.995006),
        (partial(entropic, VECTOR, b=10.0), 3.559364),
        (partial(entropic, VECTOR, b=1.0), 2.169169),
        (partial(entropic, VECTOR, b=0.1), 1.160939),
        (partial(entropic, VECTOR, b=0.001), 1.001609),
        (partial(entropic, VECTOR, b=10.0, form="gaussian"), 3.5),
    ],
)
def test_closed_forms(call, expected):
    torch.testing.assert_close(call(), torch.tensor([expected]).double(), atol=6e-7, rtol=0)


def test_entropic_is_minus_b_log_mean_exp():
    mu, _ = members()
    for b in (0.3, 1.0, 5.0):
        torch.testing.assert_close(entropic(mu, b=b), -b * (-mu / b).exp().mean(-1).log())


def test_entropic_goes_from_the_minimum_to_the_mean_as_b_grows():
    mu, _ = members()
    path = torch.stack([entropic(mu, b=b) for b in (1e-6, 0.01, 0.1, 1.0, 10.0, 1e6)])
    assert (path.diff(dim=0) > 0).all()
    torch.testing.assert_close(path[0], minimum(mu), atol=1e-5, rtol=0)  # above it by b log M
    torch.testing.assert_close(path[-1], mean(mu), atol=1e-5, rtol=0)


def test_entropic_of_float32_keeps_its_digits_and_does_not_overflow():
    mu = members()[0].float()
    torch.testing.assert_close(entropic(mu, b=1e6), mean(mu), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropic(mu * 1e4, b=1e-3), minimum(mu * 1e4), atol=1e-2, rtol=0)


def test_gaussian_form_is_the_entropic_value_of_many_normal_members():
    """The empirical form over 5 of them is higher on average: the bias of few members."""
    mu = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaussian = entropic(mu, b=1.0, form="gaussian")
    torch.testing.assert_close(gaussian, uwo(mu, uncertainty_weight=0.5), rtol=0, atol=0)
    torch.testing.assert_close(entropic(mu, b=1.0), gaussian, atol=5e-3, rtol=0)
    assert entropic(mu.view(-1, 5), b=1.0).mean() > gaussian.item() + 0.05


def test_cvar_goes_from_the_minimum_to_the_mean_through_means_of_the_lowest():
    mu, _ = members()
    ascending = mu.sort(-1).values
    for level in (1e-3, 0.1, 0.2):
        assert torch.equal(cvar(mu, level=level), minimum(mu))
    for num in (2, 3, 4, 5):
        torch.testing.assert_close(cvar(mu, level=num / 5), ascending[:, :num].mean(-1))
    torch.testing.assert_close(cvar(mu, level=1.0), mean(mu))
    levels = torch.linspace(0.2, 1, 81)
    assert (torch.stack([cvar(mu, level=float(level)) for level in levels]).diff(dim=0) >= 0).all()


def test_cvar_solves_its_variational_form():
    r"""\(\max_t\, t - E(t - r)^+ / level\), reached at one of the members."""
    mu, _ = members()
    for level in (0.13, 0.37, 0.5, 0.81):
        shortfall = (mu[:, :, None] - mu[:, None, :]).clamp(min=0).mean(-1)
        torch.testing.assert_close(cvar(mu, level=level), (mu - shortfall / level).amax(-1))


def test_nominal_head_is_the_least_sigma_of_each_response_and_ties_go_to_the_first():
    sigma = torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3], [0.3, 0.2, 0.2], [0.2, 0.2, 0.2]])
    mu = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [3.0, 2.0, 1.0]])
    assert nominal_head(sigma).tolist() == [1, 0, 1, 0]
    assert brme(mu, sigma, w_nominal=1.0).tolist() == [2.0, 4.0, 8.0, 3.0]
    assert brme(mu, sigma, w_nominal=0.25).tolist() == [1.25, 4.0, 7.25, 1.5]


def test_brme_at_its_ends_is_the_nominal_reward_and_the_minimum_bitwise():
    mu, sigma = (x.float() for x in members(5000))
    nominal = torch.stack([row[i] for row, i in zip(mu, nominal_head(sigma), strict=True)])
    assert torch.equal(brme(mu, sigma, w_nominal=1.0), nominal)
    assert torch.equal(brme(mu, sigma, w_nominal=0.0), minimum(mu))
    assert torch.equal(brme(mu, None, w_nominal=0.0), minimum(mu))


def test_brme_does_not_fall_as_w_nominal_grows():
    mu, sigma = (x.float() for x in members(2000))
    path = torch.stack([brme(mu, sigma, w_nominal=w / 20) for w in range(21)])
    assert (path.diff(dim=0) >= 0).all()
    assert (path[-1] > path[0]).float().mean() > 0.7


@pytest.mark.parametrize("w_nominal", [0.0, 0.2, 0.7, 1.0])
def test_one_member_is_the_plain_reward_bitwise(w_nominal):
    mu, sigma = (x.float() for x in members(1000, num_heads=1))
    assert torch.equal(brme(mu, sigma, w_nominal=w_nominal), mu[:, 0])
    assert torch.equal(global_rewards(mu, sigma, head=worst_head(mu), w_nominal=w_nominal), mu[:, 0])


def test_one_member_makes_all_rules_equal():
    mu, sigma = members(num_heads=1)
    for name in RULES:
        torch.testing.assert_close(RULES[name](mu, sigma), mu[:, 0])


def test_duplicated_members_make_all_rules_equal():
    mu, sigma = members(num_heads=1)
    for name in RULES:
        torch.testing.assert_close(RULES[name](mu.expand(-1, 5), sigma.expand(-1, 5)), mu[:, 0])


def test_order_of_members_does_not_matter(rule):
    mu, sigma = members()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(rule(mu[:, order], sigma[:, order]), rule(mu, sigma))


def test_a_constant_added_to_every_member_is_added_to_the_reward(rule):
    mu, sigma = members()
    torch.testing.assert_close(rule(mu + 2.5, sigma), rule(mu, sigma) + 2.5)


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"mean"}))
def test_every_rule_is_below_the_mean_but_for_the_nominal_reward(name):
    mu, sigma = members()
    reward = RULES[name](mu, sigma) if name != "brme" else brme(mu, sigma, w_nominal=0.0)
    assert (reward < mean(mu)).all()


def test_rewards_carry_no_gradient(rule):
    mu, sigma = (x.requires_grad_() for x in members())
    assert not rule(mu, sigma).requires_grad
    assert not global_rewards(mu, sigma, head=2, w_nominal=0.2).requires_grad
    assert not global_rewards(mu, None, head=2).requires_grad


def test_rules_keep_the_dtype_and_take_an_empty_batch(rule):
    mu, sigma = (x.float() for x in members())
    assert rule(mu, sigma).dtype == torch.float32
    assert rule(mu[:0], sigma[:0]).shape == (0,)


def test_shapes_that_do_not_fit_are_refused(rule):
    mu, sigma = members()
    for bad in ((mu[:, 0], sigma[:, 0]), (mu[:, :0], sigma[:, :0]), (mu, sigma[:, :3]), (mu, sigma[:1])):
        with pytest.raises(ShapeError, match="must be"):
            rule(*bad)


def test_members_that_state_no_sigma_are_refused_where_it_is_read():
    mu, _ = members()
    for name in NEEDS_SIGMA:
        with pytest.raises(ShapeError, match=r"sigma=None.*robust\.rule"):
            RULES[name](mu, None)
    with pytest.raises(ShapeError, match="sigma=None"):
        global_rewards(mu, None, head=0, w_nominal=0.2)
    for name in RULES.keys() - NEEDS_SIGMA:
        RULES[name](mu)


@pytest.mark.parametrize(
    "call",
    [
        partial(brme, *members(), w_nominal=1.1),
        partial(brme, *members(), w_nominal=-0.1),
        partial(global_rewards, *members(), head=0, w_nominal=2.0),
        partial(cvar, members()[0], level=0.0),
        partial(cvar, members()[0], level=1.5),
        partial(entropic, members()[0], b=0.0),
        partial(entropic, members()[0], b=1.0, form="laplace"),
    ],
)
def test_knobs_out_of_range_are_refused(call):
    with pytest.raises(ConfigError, match="must be"):
        call()


def test_mean_of_minima_is_at_most_the_minimum_of_means():
    mu, _ = members()
    pointwise, one_head = minimum(mu), global_rewards(mu, None, head=worst_head(mu))
    assert one_head.mean() == pytest.approx(mu.mean(0).min().item())
    assert (pointwise <= one_head).all()
    assert pointwise.mean() < one_head.mean() - 0.5


def test_global_rewards_mix_the_nominal_head_with_one_head_for_all():
    mu, sigma = members()
    nominal = brme(mu, sigma, w_nominal=1.0)
    assert torch.equal(global_rewards(mu, sigma, head=3, w_nominal=1.0), nominal)
    assert torch.equal(global_rewards(mu, sigma, head=3, w_nominal=0.0), mu[:, 3])
    torch.testing.assert_close(global_rewards(mu, sigma, head=3, w_nominal=0.2), 0.2 * nominal + 0.8 * mu[:, 3])
    for head in (-1, 5):
        with pytest.raises(ShapeError, match="one of the 5"):
            global_rewards(mu, sigma, head=head)


def test_workers_that_add_up_their_sums_pick_the_head_that_one_worker_picks():
    """Also when heads tie: sums of float32 rewards are exact, whatever the split."""
    generator = torch.Generator().manual_seed(0)
    picked = set()
    for _ in range(50):
        mu = torch.randn(97, 3, generator=generator)
        tied = torch.cat([mu, mu[torch.randperm(97, generator=generator)]], 1)
        shards = [tied[:31], tied[31:32], tied[32:]]
        summed = torch.stack([head_sums(shard) for shard in shards]).sum(0)
        assert torch.equal(summed, head_sums(tied))
        head = worst_head(tied)
        assert worst_head_of_sums(summed, sum(len(shard) for shard in shards)) == head == int(mu.mean(0).argmin())
        picked.add(head)
    assert picked == {0, 1, 2}


def test_a_worker_without_responses_adds_nothing_and_no_responses_are_refused():
    mu, _ = members()
    assert head_sums(mu[:0]).tolist() == [0.0] * 5
    for call in (partial(worst_head, mu[:0]), partial(worst_head_of_sums, head_sums(mu[:0]), 0)):
        with pytest.raises(ShapeError, match="at least one response"):
            call()
