"""Terms of variational inverse RL on ragged responses, against closed forms and autograd."""

from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ConfigError, ShapeError
from raylign.losses.gaussian_reward import kl_to_standard_normal
from raylign.losses.logprobs import segment_sum
from raylign.losses.variational import (
    TD_STD_FLOOR,
    TdScale,
    contrastive_return,
    gaussian_log_density,
    negative_term,
    sequence_score,
    sequence_sigma,
    td_errors,
    td_moments,
    unlikelihood,
)

SEQUENCE = torch.tensor([2, 2, 2, 0, 1, 1])  # three responses of 1, 2 and 3 tokens


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_density_is_that_of_the_normal_distribution():
    value, mu, sigma = noise(50), noise(50, seed=1), noise(50, seed=2).abs() + 0.05
    close(gaussian_log_density(value, mu, sigma), torch.distributions.Normal(mu, sigma).log_prob(value), atol=1e-6)


def explanation(mu: torch.Tensor, sigma: torch.Tensor, delta: torch.Tensor, td_weight: float) -> torch.Tensor:
    """What one token's reward pays for explaining its TD error: KL - td_weight log N(delta). Any shape."""
    mu, sigma, delta = torch.broadcast_tensors(mu, sigma, delta)
    return kl_to_standard_normal(mu, sigma) - td_weight * gaussian_log_density(delta, mu, sigma)


DELTAS = vector(0, 1, 2, 4)
MINIMA = {  # mean and variance at each of DELTAS
    0.25: ((0, 0.750), (0.214, 0.918), (0.324, 1.29), (0.406, 2.21)),
    0.5: ((0, 0.500), (0.403, 0.741), (0.555, 1.30), (0.637, 2.64)),
    0.9: ((0, 0.100), (0.762, 0.281), (0.904, 1.09), (0.933, 2.96)),
}


@pytest.mark.parametrize("td_weight", MINIMA)
def test_a_td_weight_below_one_keeps_sigma_off_zero(td_weight):
    """Minima by L-BFGS: mu = c delta/(s + c), s^2 + (c - 1) s = c (delta - mu)^2, s = sigma^2 >= 1 - c."""
    parts = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parts], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = explanation(parts[0], parts[1].exp(), DELTAS, td_weight).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    mu, variance = parts[0].detach(), (2 * parts[1].detach()).exp()
    close(mu, td_weight * DELTAS / (variance + td_weight), atol=1e-6)
    close(variance**2 + (td_weight - 1) * variance, td_weight * (DELTAS - mu) ** 2, atol=1e-6)
    assert variance.min() >= 1 - td_weight - 1e-6
    table_mu, table_variance = vector(*(m for m, _ in MINIMA[td_weight])), vector(*(v for _, v in MINIMA[td_weight]))
    close(mu, table_mu, atol=1e-3)
    rounding = torch.where(table_variance < 1, 1e-3, 5e-3).double()  # above 1 the table has two decimals
    assert ((variance - table_variance).abs() <= rounding).all()


def minima(td_weight: float, floor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lowest value for each of DELTAS over a grid of means and deviations, and where."""
    mu = torch.linspace(-0.5, 4.5, 1001, dtype=torch.float64)[:, None]
    sigma = torch.logspace(math.log10(floor), 0.5, 1200, dtype=torch.float64)
    found = [explanation(mu, sigma, delta, td_weight).flatten().min(0) for delta in DELTAS]
    best = torch.stack([minimum.indices for minimum in found])
    return torch.stack([minimum.values for minimum in found]), mu[best // 1200, 0], sigma[best % 1200].square()


def test_at_one_the_explained_part_is_huber_and_sigma_collapses_inside():
    value, mu, variance = minima(1.0, floor=1e-3)
    huber = torch.where(DELTAS <= 1, DELTAS**2 / 2, DELTAS - 0.5)
    close(value, huber + (math.log(2 * math.pi) - 1) / 2, atol=1e-3)
    close(value, vector(0.419, 0.919, 1.919, 3.919), atol=1e-3)
    close(mu, DELTAS.clamp(max=1), atol=2e-2)
    close(variance, (DELTAS - 1).clamp(min=0), atol=2e-2)


def test_above_one_only_the_floor_stops_sigma():
    for floor in (1e-2, 1e-3):
        value, mu, variance = minima(2.0, floor=floor)
        torch.testing.assert_close(variance, torch.full_like(variance, floor**2), rtol=1e-6, atol=0)
        close(mu, DELTAS, atol=1e-2)
    assert (value < minima(2.0, floor=1e-2)[0] - 2).all()


def test_errors_by_hand():
    q = vector(1, 2, 4, 8, 16, 32)
    delta, has_td = td_errors(q, SEQUENCE, discount=0.5, terminal="zero")
    close(delta, vector(0, 0, 4, 8, 0, 32))
    assert has_td.all()
    delta, has_td = td_errors(q, SEQUENCE, discount=1.0, terminal="drop")
    close(delta, vector(-1, -2, 0, 0, -16, 0))
    assert has_td.tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("terminal", ["zero", "drop"])
def test_discounted_errors_telescope(discount, terminal):
    """sum discount^t delta_t = q_0 - discount^T q_T, with q_T = 0, or with T one less."""
    q, position = noise(6), vector(0, 1, 2, 0, 0, 1)
    delta, has_td = td_errors(q, SEQUENCE, discount=discount, terminal=terminal)
    total = segment_sum(torch.where(has_td, discount**position * delta, 0), SEQUENCE, 3)
    first, last, length = q[[3, 4, 0]], q[[3, 5, 2]], vector(0, 1, 2)
    close(total, first if terminal == "zero" else first - discount**length * last)


def test_both_sides_of_an_error_have_a_gradient():
    q = noise(6).requires_grad_()
    delta, _ = td_errors(q, SEQUENCE, discount=0.5, terminal="zero")
    delta.sum().backward()
    close(q.grad, vector(1, 0.5, 0.5, 1, 1, 0.5))


def test_the_true_rewards_of_a_chain_are_where_the_td_term_is_highest():
    """Rewards known, values by backward induction: the errors are the rewards, to the last token."""
    reward, discount = vector(0.3, -1.0, 2.0, 0.7, -0.2, 1.1), 0.9
    q = vector(0.3 + 0.9 * (-1.0 + 0.9 * 2.0), -1.0 + 0.9 * 2.0, 2.0, 0.7, -0.2 + 0.9 * 1.1, 1.1)
    delta, _ = td_errors(q, SEQUENCE, discount=discount, terminal="zero")
    close(delta, reward)
    mu, sigma = reward.clone().requires_grad_(), torch.full_like(reward, 0.5)
    density = gaussian_log_density(delta, mu, sigma).sum()
    close(torch.autograd.grad(density, mu)[0], torch.zeros(6, dtype=torch.float64))
    for seed in range(20):
        other = gaussian_log_density(delta, reward + 0.1 * noise(6, seed=seed), sigma)
        assert other.sum() < density
        dropped = other - gaussian_log_density(delta, reward, sigma)
        assert (dropped < 0).all()


def test_unlikelihood_is_the_log_of_the_complement_at_both_ends():
    close(unlikelihood(vector(0.9, 0.5, 0.1, 1e-12).log()), vector(0.1, 0.5, 0.9, 1 - 1e-12).log())
    close(unlikelihood(vector(-1e-9)), vector(math.log(1e-9)), atol=1e-8)
    q = vector(-1e-9, -0.3, -math.log(2), -5, -1e4).requires_grad_()
    unlikelihood(q).sum().backward()
    torch.testing.assert_close(q.grad[1:4], -1 / torch.expm1(-q.detach()[1:4]), rtol=1e-12, atol=0)
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unlikelihood_is_finite_and_at_most_zero_whatever_rounding_gave(dtype):
    q = torch.tensor([1e-7, 0.0, -1e-30, -1e-8, -0.7, -200.0, -math.inf], dtype=dtype, requires_grad=True)
    value = unlikelihood(q)
    value.sum().backward()
    assert (value <= 0).all() and torch.isfinite(value).all() and torch.isfinite(q.grad).all()


def ascend(form: str) -> list[float]:
    """A policy over three tokens climbs log p(chosen) + negative(rejected) of one pair: the objective at each step."""
    logits, values = torch.zeros(3, dtype=torch.float64, requires_grad=True), []
    for _ in range(2000):
        logprobs = logits.log_softmax(0)
        value = logprobs[0] + negative_term(logprobs[1:2], form=form, likelihood_weight=1.0).sum()
        values.append(value.item())
        (slope,) = torch.autograd.grad(value, logits)
        logits = (logits + 5 * slope).detach().requires_grad_()
    return values


def test_unlikelihood_bounds_what_raw_negatives_raise_past_any_bound():
    bounded, raw = ascend("unlikelihood"), ascend("raw")
    assert max(bounded) <= 0 and bounded[-1] > -1e-3
    assert raw[-1] > 1000 and raw[-1] - raw[1000] == pytest.approx(raw[1000] - raw[0], rel=0.1)
    assert ascend("none")[-1] > -1e-3


def test_forms_of_the_negative_term():
    q = vector(-0.2, -3.0)
    close(negative_term(q, form="raw", likelihood_weight=0.5), vector(0.1, 1.5))
    close(negative_term(q, form="unlikelihood", likelihood_weight=0.5), torch.log(1 - q.exp()))
    close(negative_term(q, form="none", likelihood_weight=0.5), vector(0, 0))


def test_scores_and_deviations_by_hand():
    mu, sigma = vector(1, 2, 4, 8, 16, 32), vector(3, 2, 6, 0.5, 3, 4)
    for rule, score, deviation in (
        ("last", (8, 32, 4), (0.5, 4, 6)),
        ("sum", (8, 48, 7), (0.5, 5, 7)),
        ("mean", (8, 24, 7 / 3), (0.5, 2.5, 7 / 3)),
    ):
        close(sequence_score(mu, SEQUENCE, 3, rule=rule), vector(*score))
        close(sequence_sigma(sigma, SEQUENCE, 3, rule=rule), vector(*deviation))


@pytest.mark.parametrize(
    ("form", "slopes"), [("sigmoid", (0.0025, 0.25, 0.0025)), ("log_sigmoid", (0.9975, 0.5, 0.0025))]
)
def test_only_the_logarithm_moves_badly_ranked_pairs(form, slopes):
    chosen = vector(-2, 1, 5).requires_grad_()
    contrastive_return(chosen, vector(4, 1, -1), form=form).sum().backward()
    close(chosen.grad, vector(*slopes), atol=5e-5)


def test_swapping_a_pair_negates_its_margin():
    chosen, rejected = noise(9), noise(9, seed=1)
    forward, backward = (contrastive_return(*pair, form="sigmoid") for pair in ((chosen, rejected), (rejected, chosen)))
    close(torch.logit(forward), -torch.logit(backward), atol=1e-9)
    close(contrastive_return(chosen, rejected, form="log_sigmoid"), forward.log())


def test_scale_is_the_deviation_of_all_errors_of_a_batch_however_it_is_cut():
    delta, has_td = 3 + 2 * noise(40), torch.arange(40) % 5 != 0
    parts = [td_moments(delta[rows], has_td[rows]) for rows in (slice(0, 7), slice(7, 40))]
    count, total, squares = (parts[0] + parts[1]).tolist()
    scale = TdScale().updated(count=count, total=total, squares=squares)
    assert scale.std == pytest.approx(delta[has_td].std(correction=0).item(), abs=1e-12)
    assert TdScale().std == 1.0


def test_scale_forgets_and_starts_without_bias():
    def batch(std: float) -> dict[str, float]:
        return {"count": 100.0, "total": 0.0, "squares": 100 * std**2}

    scale = TdScale().updated(**batch(2.0))
    assert scale.std == pytest.approx(2.0)
    scale = scale.updated(**batch(4.0), decay=0.5)
    assert scale.std == pytest.approx(math.sqrt((0.5 * 4 + 16) / 1.5))
    for _ in range(2000):
        scale = scale.updated(**batch(4.0))
    assert scale.std == pytest.approx(4.0)
    assert TdScale().updated(count=5.0, total=5.0, squares=5.0).std == TD_STD_FLOOR


def test_mistakes_are_named():
    q = noise(6)
    with pytest.raises(ConfigError, match=r"terminal='none' must be one of zero, drop"):
        td_errors(q, SEQUENCE, discount=1.0, terminal="none")
    with pytest.raises(ShapeError, match="one after another"):
        td_errors(q, torch.tensor([0, 1, 0, 1, 2, 2]), discount=1.0, terminal="zero")
    with pytest.raises(ShapeError, match="3 of 4 responses have tokens"):
        sequence_score(q, SEQUENCE, 4, rule="last")
    with pytest.raises(ConfigError, match="score"):
        sequence_score(q, SEQUENCE, 3, rule="first")
    with pytest.raises(ConfigError, match="negative"):
        negative_term(q, form="hinge", likelihood_weight=1.0)
    with pytest.raises(ConfigError, match="cer"):
        contrastive_return(q, q, form="hinge")
