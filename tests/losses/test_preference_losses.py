"""Closed forms and identities of the preference losses, arithmetic written out with log and exp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raylign.errors import ConfigError, ShapeError
from raylign.losses import preference


def margins(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


LOSSES = {
    "dpo": lambda m: preference.dpo(m, beta=0.1),
    "label_confidence": lambda m: preference.label_confidence(m, 0.7, beta=0.1),
    "cdpo": lambda m: preference.cdpo(m, beta=0.1, label_smoothing=0.2),
    "rdpo": lambda m: preference.rdpo(m, beta=0.1, label_smoothing=0.2),
    "ipo": lambda m: preference.ipo(m, tau=0.1),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_gradient_is_right(loss):
    margin = margins(-30.0, -1.0, 0.0, 2.0, 40.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, (margin,))


@every_loss
def test_extreme_margins_have_finite_loss_and_gradient(loss):
    margin = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss(margin).sum().backward()
    assert torch.isfinite(loss(margin)).all()
    assert torch.isfinite(margin.grad).all()


@every_loss
def test_empty_batch_gives_empty_loss(loss):
    assert loss(margins()).shape == (0,)


@every_loss
def test_pairs_do_not_see_each_other(loss):
    margin = margins(-3.0, 0.5, 8.0)
    torch.testing.assert_close(loss(margin), torch.cat([loss(m[None]) for m in margin]), rtol=0, atol=0)


def test_logp_margin_negates_when_chosen_and_rejected_swap():
    generator = torch.Generator().manual_seed(0)
    policy_c, policy_r, reference_c, reference_r = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    margin = preference.logp_margin(policy_c, policy_r, reference_c, reference_r)
    torch.testing.assert_close(margin, (policy_c - policy_r) - (reference_c - reference_r))
    swapped = preference.logp_margin(policy_r, policy_c, reference_r, reference_c)
    torch.testing.assert_close(swapped, -margin, rtol=0, atol=0)
    rewards = [
        preference.implicit_reward(p, r, beta=0.2) for p, r in ((policy_c, reference_c), (policy_r, reference_r))
    ]
    torch.testing.assert_close(rewards[0] - rewards[1], 0.2 * margin)


def test_implicit_reward_carries_no_gradient():
    assert not preference.implicit_reward(margins(1.0).requires_grad_(), margins(2.0), beta=0.1).requires_grad


def test_logp_margin_refuses_other_shapes():
    with pytest.raises(ShapeError, match="alike"):
        preference.logp_margin(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3))


def test_dpo_is_the_logistic_loss_of_the_margin():
    margin = margins(0.0, 10.0).requires_grad_()
    loss = preference.dpo(margin, beta=0.1)
    expected = margins(math.log(2), -log_sigmoid(1.0))  # .693147, .313262
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient[1].item() == pytest.approx(-0.1 / (1 + math.e), abs=1e-12)  # -.026894


def test_full_confidence_is_dpo_to_the_bit():
    margin = torch.linspace(-300, 300, 1001)
    by_confidence, by_dpo = margin.clone().requires_grad_(), margin.clone().requires_grad_()
    first = preference.label_confidence(by_confidence, torch.ones_like(margin), beta=0.15)
    second = preference.dpo(by_dpo, beta=0.15)
    assert torch.equal(first, second)
    assert torch.equal(preference.cdpo(margin, beta=0.15, label_smoothing=0.0), second.detach())
    first.sum().backward()
    second.sum().backward()
    assert torch.equal(by_confidence.grad, by_dpo.grad)


@pytest.mark.parametrize(
    ("gamma", "beta", "margin", "expected"),
    [
        (1.0, 0.1, 10.0, 0.313262),
        (0.8, 0.15, 10.0, 0.501413),
        (0.8, 0.15, -10.0, 1.401413),
        (0.2, 0.15, 10.0, 1.401413),
    ],
)
def test_label_confidence_closed_form(gamma, beta, margin, expected):
    by_hand = -gamma * log_sigmoid(beta * margin) - (1 - gamma) * log_sigmoid(-beta * margin)
    assert by_hand == pytest.approx(expected, abs=1e-6)
    assert preference.label_confidence(margins(margin), gamma, beta=beta).item() == pytest.approx(by_hand, abs=1e-12)


def test_label_confidence_gradient_is_model_minus_confidence():
    margin = torch.linspace(-60, 60, 41, dtype=torch.float64).requires_grad_()
    gamma = torch.linspace(0, 1, 41, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(preference.label_confidence(margin, gamma, beta=0.15).sum(), margin)
    by_hand = 0.15 * (1 / (1 + torch.exp(-0.15 * margin.detach())) - gamma)  # E6
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-10)


def test_label_confidence_is_smallest_where_the_model_agrees():
    best = math.log(0.8 / 0.2) / 0.15
    assert best == pytest.approx(9.241962, abs=1e-6)
    at_best = preference.label_confidence(margins(best), 0.8, beta=0.15).item()
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert at_best == pytest.approx(entropy, abs=1e-12)  # .500402
    beside = preference.label_confidence(margins(best - 0.1, best + 0.1), 0.8, beta=0.15)
    assert (beside > at_best).all()


def test_low_confidence_trains_on_the_flipped_pair():
    margin, gamma = margins(-4.0, 1.0, 9.0), margins(0.1, 0.4, 0.9)
    direct = preference.label_confidence(margin, gamma, beta=0.3)
    flipped = preference.label_confidence(-margin, 1 - gamma, beta=0.3)
    torch.testing.assert_close(direct, flipped, rtol=0, atol=1e-14)


def test_no_gradient_reaches_the_confidence():
    gamma = margins(0.7).requires_grad_()
    preference.label_confidence(margins(1.0).requires_grad_(), gamma, beta=0.1).sum().backward()
    assert gamma.grad is None


def test_label_confidence_refuses_a_batch_mean():
    with pytest.raises(ShapeError, match="one per pair"):
        preference.label_confidence(margins(1.0, 2.0), torch.tensor(0.5), beta=0.1)


def test_cdpo_is_a_constant_confidence():
    margin = margins(-5.0, 5.0)
    loss = preference.cdpo(margin, beta=0.1, label_smoothing=0.1)
    assert loss[1].item() == pytest.approx(-0.9 * log_sigmoid(0.5) - 0.1 * log_sigmoid(-0.5), abs=1e-12)
    assert loss[1].item() == pytest.approx(0.524077, abs=1e-6)
    assert torch.equal(loss, preference.label_confidence(margin, 0.9, beta=0.1))
    best = math.log(9) / 0.1
    assert preference.cdpo(margins(best), beta=0.1, label_smoothing=0.1).item() == pytest.approx(0.325083, abs=1e-6)


def test_rdpo_closed_form():
    loss = preference.rdpo(margins(0.0, 10.0, -10.0), beta=0.1, label_smoothing=0.2)
    by_hand = [(-0.8 * log_sigmoid(0.1 * m) + 0.2 * log_sigmoid(-0.1 * m)) / 0.6 for m in (0.0, 10.0, -10.0)]
    torch.testing.assert_close(loss, margins(*by_hand), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, margins(0.693147, -0.020072, 1.646595), rtol=0, atol=1e-6)


def test_rdpo_over_random_flips_is_dpo_on_clean_labels():
    margin = torch.linspace(-50, 50, 21, dtype=torch.float64)
    kept, flipped = (preference.rdpo(sign * margin, beta=0.1, label_smoothing=0.2) for sign in (1, -1))
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, preference.dpo(margin, beta=0.1), rtol=0, atol=1e-12)


def test_rdpo_gradient_never_vanishes():
    margin = margins(0.0, 100.0, 1000.0).requires_grad_()
    (gradient,) = torch.autograd.grad(preference.rdpo(margin, beta=0.1, label_smoothing=0.2).sum(), margin)
    by_hand = -0.1 * (torch.sigmoid(-0.1 * margin.detach()) + 0.2 / 0.6)
    torch.testing.assert_close(gradient, by_hand, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [preference.cdpo, preference.rdpo])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 0.7])
def test_useless_flip_rates_are_refused(loss, label_smoothing):
    with pytest.raises(ConfigError, match=r"label_smoothing=.*train\.label_smoothing"):
        loss(margins(1.0), beta=0.1, label_smoothing=label_smoothing)


def test_ipo_regresses_to_its_target():
    loss = preference.ipo(margins(0.0, 5.0, 10.0), tau=0.1)
    torch.testing.assert_close(loss, margins(25.0, 0.0, 25.0), rtol=0, atol=1e-12)


STORED_TAU, FLOORED_TAU = 1 / 3, 7 / 15


@pytest.mark.parametrize(
    ("floor", "expected", "expected_tau"),
    [
        (0.0, [0.9652, 6.4169, 0.7812, -17.6304, 7.2903, 2.1767], 1.0),
        (0.5, [1.2848, 5.4122, 1.1468, -10.2924, 0.2496, 2.1989], FLOORED_TAU),
    ],
)
def test_confidence_from_rewards_has_the_regularised_optimum_unless_floored(floor, expected, expected_tau):
    """E7: the optimum over all pairs is pi_ref exp((alpha / beta) s), whatever order is stored; a floor breaks that."""
    alpha, beta = 7.5, 0.15
    rng = np.random.default_rng(1)
    reward = rng.normal(0, 1, 6)
    score = 1 / (1 + np.exp(-reward)) - 0.5
    order = rng.permutation(6)
    assert order.tolist() == [1, 5, 0, 2, 3, 4]
    first, second = np.triu_indices(6, k=1)
    chosen, rejected = torch.tensor(order[first]), torch.tensor(order[second])
    score = torch.tensor(score)
    gamma = torch.sigmoid(alpha * (score[chosen] - score[rejected])).clamp(min=floor)
    log_ratio = torch.zeros(6, dtype=torch.float64, requires_grad=True)  # log pi / pi_ref up to a constant
    optimizer = torch.optim.LBFGS(
        [log_ratio], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = preference.label_confidence(log_ratio[chosen] - log_ratio[rejected], gamma, beta=beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = log_ratio.detach() - log_ratio.detach().mean()
    torch.testing.assert_close(found, margins(*expected), rtol=0, atol=6e-5)
    if floor == 0:
        torch.testing.assert_close(found, alpha / beta * (score - score.mean()), rtol=0, atol=1e-8)
    concordance = np.sign(found.numpy()[first] - found.numpy()[second]) * np.sign(reward[first] - reward[second])
    assert concordance.mean() == pytest.approx(expected_tau)
    stored = np.sign(reward[order[first]] - reward[order[second]])
    assert stored.mean() == pytest.approx(STORED_TAU)
