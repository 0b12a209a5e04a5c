"""Gaussian heads and their fit: against loops and least squares, head by head, and on targets of known noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.evaluation.metrics import auroc
from raylign.losses.gaussian_reward import purm
from raylign.rewards.fit_gaussian import GaussianFit, fit_gaussian, standardize_targets
from raylign.rewards.gaussian import GaussianHeads, share_at_floor

NUM_LAYERS, WIDTH = 2, 6
OPTIONS: dict[str, Any] = {
    "loss": "gaussian_nll",
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "sigma_floor": 1e-3,
}


def states(num_pairs: int, *, seed: int, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, num_pairs, NUM_LAYERS, width, generator=generator)
    return both[0], both[1]


def gold(features: torch.Tensor, *, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Linear in the states with spread 1, plus noise."""
    direction = torch.randn(features[0].numel(), generator=torch.Generator().manual_seed(99))
    draws = torch.randn(len(features), generator=torch.Generator().manual_seed(seed))
    return features.flatten(1) @ (direction / direction.norm()) + noise * draws


def poisson(num_pairs: int, num_heads: int, seed: int = 3) -> torch.Tensor:
    return torch.poisson(torch.ones(num_pairs, num_heads), generator=torch.Generator().manual_seed(seed))


def fitted(
    num_pairs: int = 120, *, weights: torch.Tensor | None = None, noise: float = 0.3, width: int = WIDTH, **changes: Any
) -> GaussianFit:
    (chosen, rejected), (valid_chosen, valid_rejected) = (
        states(n, seed=seed, width=width) for n, seed in ((num_pairs, 0), (200, 1))
    )
    return fit_gaussian(
        chosen,
        rejected,
        chosen_target=gold(chosen, noise=noise, seed=10),
        rejected_target=gold(rejected, noise=noise, seed=11),
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        valid_chosen_target=gold(valid_chosen, noise=noise, seed=12),
        valid_rejected_target=gold(valid_rejected, noise=noise, seed=13),
        weights=poisson(num_pairs, 3) if weights is None else weights,
        generator=torch.Generator().manual_seed(changes.pop("seed", 5)),
        **{**OPTIONS, **changes},
    )


def random_heads(num_heads: int = 4) -> GaussianHeads:
    heads = GaussianHeads(NUM_LAYERS, WIDTH, num_heads=num_heads, sigma_floor=0.01)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in heads.state_dict().values():
            if tensor.dim():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return heads


def test_posterior_is_what_each_head_says_alone():
    heads, (features, _) = random_heads(), states(7, seed=2)
    posterior = heads(features.half())
    for item in range(7):
        normal = (features[item].half().float() - heads.layer_mean) / heads.layer_rms[:, None]
        for head in range(4):
            mean = (normal * heads.weight_mean[head]).sum() + heads.bias_mean[head]
            rho = (normal * heads.weight_scale[head]).sum() + heads.bias_scale[head]
            torch.testing.assert_close(posterior.head_rewards[item, head], mean, rtol=1e-5, atol=1e-5)
            scale = torch.log1p(rho.exp()) + 0.01
            torch.testing.assert_close(posterior.head_scales[item, head], scale, rtol=1e-5, atol=1e-5)
    spread = posterior.head_rewards.std(1, correction=0)
    torch.testing.assert_close(posterior.disagreement, spread, rtol=1e-5, atol=1e-6)


def test_heads_come_back_from_their_tensors_frozen_and_score_alike_twice():
    heads, (features, _) = random_heads(), states(9, seed=2)
    again = GaussianHeads.from_state(heads.state_dict())
    first, second = again(features), again(features)
    assert not first.head_rewards.requires_grad and not first.head_scales.requires_grad
    assert torch.equal(first.head_rewards, second.head_rewards) and torch.equal(first.head_scales, second.head_scales)
    assert torch.equal(first.mean, heads(features).mean) and torch.equal(first.head_scales, heads(features).head_scales)
    assert (again.num_heads, again.num_layers, again.hidden_size) == (4, NUM_LAYERS, WIDTH)


def test_features_of_another_model_are_refused():
    with pytest.raises(ShapeError, match="another model"):
        random_heads()(torch.zeros(3, NUM_LAYERS, WIDTH + 1))


def test_share_at_floor_counts_each_head():
    scales = torch.tensor([[0.001, 0.5], [0.002, 0.5], [0.0021, 0.002]])
    assert share_at_floor(scales, 0.001).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_start_is_the_weighted_ridge_regression_towards_the_heads_own_draw():
    """The slow oracle stacks the penalty under the weighted data and calls least squares."""
    weights, ridge = poisson(40, 3), 0.2
    fit = fitted(40, weights=weights, epochs=0, head_seeds=[7, 8, 9], ridge=ridge, prior_scale=2.0)
    chosen, rejected = states(40, seed=0)
    inputs = fit.heads.inputs(torch.cat([chosen, rejected])).double()
    num_inputs = inputs.shape[1]
    inputs = torch.cat([inputs, torch.ones(80, 1).double()], dim=1)
    target = torch.cat([gold(chosen, noise=0.3, seed=10), gold(rejected, noise=0.3, seed=11)]).double()
    penalty = torch.eye(num_inputs, num_inputs + 1, dtype=torch.float64)
    for head, seed in enumerate((7, 8, 9)):
        draw = torch.randn(num_inputs, generator=torch.Generator().manual_seed(seed)).double()
        draw = 2.0 * draw / math.sqrt(num_inputs)
        root = weights[:, head].repeat(2).double().sqrt()[:, None]
        shrink = math.sqrt(ridge * weights[:, head].sum())
        left = torch.cat([root * inputs, shrink * penalty])
        right = torch.cat([root[:, 0] * target, shrink * draw])
        oracle = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
        found = torch.cat([fit.heads.weight_mean[head].flatten(), fit.heads.bias_mean[head : head + 1]])
        torch.testing.assert_close(found.double(), oracle, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["gaussian_nll", "mse_reparam", "margin_mse", "purm"])
def test_heads_in_one_pass_equal_separate_fits(loss):
    weights, seeds = poisson(120, 3), [21, 22, 23]
    together = fitted(weights=weights, loss=loss, head_seeds=seeds)
    for head in range(3):
        alone = fitted(weights=weights[:, head : head + 1], loss=loss, head_seeds=seeds[head : head + 1])
        assert alone.best_epochs[0] == together.best_epochs[head]
        for name, parameter in alone.heads.named_parameters():
            shared = together.heads.get_parameter(name)[head : head + 1]
            torch.testing.assert_close(parameter, shared, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["gaussian_nll", "beta_nll", "mse_reparam", "mse_reparam_kl", "margin_mse", "purm"])
def test_every_head_keeps_its_best_epoch(loss):
    fit = fitted(loss=loss, epochs=6, learning_rate=0.1)
    losses = torch.stack([record.valid_loss for record in fit.history])
    assert len(fit.history) == 7 and torch.isfinite(losses).all()
    assert losses.argmin(0).tolist() == list(fit.best_epochs)
    valid_chosen, valid_rejected = states(200, seed=1)
    target = torch.cat([gold(valid_chosen, noise=0.3, seed=12), gold(valid_rejected, noise=0.3, seed=13)])
    kept = fit.heads(torch.cat([valid_chosen, valid_rejected]))
    mu, sigma, squares = kept.head_rewards, kept.head_scales, (kept.head_rewards - target[:, None]).square()
    torch.testing.assert_close(fit.valid_error, squares.mean(0).sqrt(), rtol=1e-5, atol=1e-6)
    margin, variance = mu[:200] - mu[200:], sigma[:200].square() + sigma[200:].square()
    likelihood = squares / (2 * sigma.square()) + sigma.log()
    compared = {
        "gaussian_nll": likelihood,
        "beta_nll": likelihood,
        "mse_reparam": squares + sigma.square(),
        "mse_reparam_kl": squares + sigma.square() + 0.1 * ((mu.square() + sigma.square() - 1) / 2 - sigma.log()),
        "margin_mse": (margin - (target[:200] - target[200:])[:, None]).square() + variance,
        "purm": purm(margin, variance),
    }[loss]
    torch.testing.assert_close(losses.min(0).values, compared.mean(0), rtol=1e-4, atol=1e-5)


def test_a_pair_that_a_head_does_not_count_teaches_it_nothing():
    weights = torch.ones(120, 2)
    weights[:40, 0] = 0
    chosen, rejected = states(120, seed=0)
    targets = [gold(half) for half in (chosen, rejected)]
    wrong = [torch.where(torch.arange(120) < 40, -9.0, target) for target in targets]
    heads = [
        fit_gaussian(
            chosen,
            rejected,
            chosen_target=chosen_target,
            rejected_target=rejected_target,
            valid_chosen=chosen,
            valid_rejected=rejected,
            valid_chosen_target=targets[0],
            valid_rejected_target=targets[1],
            weights=weights,
            generator=torch.Generator().manual_seed(0),
            **OPTIONS | {"ridge": 10.0},
        ).heads
        for chosen_target, rejected_target in (targets, wrong)
    ]
    told, misled = (each(chosen) for each in heads)
    assert torch.equal(told.head_rewards[:, 0], misled.head_rewards[:, 0])
    assert torch.equal(told.head_scales[:, 0], misled.head_scales[:, 0])
    assert not torch.allclose(told.head_rewards[:, 1], misled.head_rewards[:, 1], atol=0.1)


def test_likelihood_finds_the_noise_from_a_wrong_start_and_sampled_error_the_floor():
    """Sigma starts at the error of a start that knows nothing (ridge 1e3), 1.1; the noise is .5. Found .49 and .09."""
    wrong = {"ridge": 1e3, "prior_scale": 0.0, "weights": torch.ones(1000, 2)}
    likelihood = fitted(1000, noise=0.5, **wrong, epochs=12, learning_rate=0.01)
    assert likelihood.history[0].valid_loss.mean() > likelihood.history[-1].valid_loss.mean()
    assert likelihood.valid_sigma.tolist() == pytest.approx([0.5, 0.5], abs=2e-2)
    assert likelihood.valid_error.tolist() == pytest.approx([0.5, 0.5], abs=3e-2)
    assert likelihood.floor_share.tolist() == [0, 0]
    sampled = fitted(1000, noise=0.5, **wrong, epochs=30, learning_rate=0.05, loss="mse_reparam", sigma_floor=0.05)
    assert (sampled.valid_sigma < 0.1).all() and (sampled.valid_error > 0.45).all()
    assert (sampled.floor_share > 0.5).all()


def test_likelihood_finds_noise_that_depends_on_the_input():
    chosen, rejected = states(2000, seed=0)
    features = torch.cat([chosen, rejected])
    scale = torch.where(features[:, 0, 0] > 0, 0.6, 0.1)
    target = gold(features) + scale * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    halves = {"chosen_target": target[:2000], "rejected_target": target[2000:]}
    valid = {"valid_chosen": chosen, "valid_rejected": rejected}
    fit = fit_gaussian(
        chosen,
        rejected,
        **halves,
        **valid,
        **{f"valid_{name}": half for name, half in halves.items()},
        weights=torch.ones(2000, 1),
        generator=torch.Generator().manual_seed(0),
        **OPTIONS | {"epochs": 10, "learning_rate": 0.05},
    )
    sigma = fit.heads(features).head_scales[:, 0]
    assert sigma[features[:, 0, 0] > 1].mean() > 3 * sigma[features[:, 0, 0] < -1].mean()


def test_sigma_starts_at_the_held_out_error_where_the_training_error_is_zero():
    """60 answers, 80 inputs: the heads fit every training target."""
    fit = fitted(30, width=40, epochs=0, ridge=1e-4, weights=torch.ones(30, 2))
    chosen, _ = states(30, seed=0, width=40)
    train_error = (fit.heads(chosen).head_rewards - gold(chosen, noise=0.3, seed=10)[:, None]).square().mean().sqrt()
    assert train_error < 0.02
    assert (fit.valid_error > 0.4).all()
    torch.testing.assert_close(fit.valid_sigma, fit.valid_error, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", ["margin_mse", "purm"])
def test_losses_of_pairs_leave_the_zero_of_the_targets_to_all_heads(loss):
    """Inputs are centred on the training answers, so that a head's mean reward there is its bias, which stays."""
    fit = fitted(loss=loss, epochs=10, learning_rate=0.1, weights=torch.ones(120, 3))
    chosen, rejected = states(120, seed=0)
    target = torch.cat([gold(chosen, noise=0.3, seed=10), gold(rejected, noise=0.3, seed=11)])
    assert max(fit.best_epochs) > 0
    means = fit.heads(torch.cat([chosen, rejected])).head_rewards.mean(0)
    torch.testing.assert_close(means, target.mean().expand(3), rtol=0, atol=1e-4)


def test_heads_disagree_by_their_pairs_or_their_seeds_and_twins_do_not():
    features = torch.cat(states(50, seed=4))
    same = torch.ones(120, 3)
    by_pairs = fitted(weights=poisson(120, 3), prior_scale=0.0).heads(features)
    by_seeds = fitted(weights=same).heads(features)
    twins = fitted(weights=same, head_seeds=[4, 4, 4]).heads(features)
    assert (by_pairs.disagreement > 1e-3).all() and (by_seeds.disagreement > 1e-4).all()
    torch.testing.assert_close(twins.disagreement, torch.zeros(100), rtol=0, atol=1e-6)


def test_disagreement_tells_inputs_of_twice_the_scale():
    """Mean AUROC over ten fits: disagreement .86; the smallest sigma .42, no sign of unfamiliar input."""
    near = torch.cat(states(300, seed=4))
    found = []
    for seed in range(10):
        heads = fitted(weights=poisson(120, 5, seed=seed), seed=seed, epochs=10).heads
        inside, outside = heads(near), heads(2 * near)
        pairs = (
            (outside.disagreement, inside.disagreement),
            (outside.head_scales.min(1).values, inside.head_scales.min(1).values),
        )
        found.append([auroc(far.numpy(), close.numpy()) for far, close in pairs])
    disagreement, sigma = torch.tensor(found).mean(0).tolist()
    assert disagreement > 0.8
    assert sigma < 0.6


def test_target_units_come_from_the_training_rewards():
    units = standardize_targets(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -1.0]))
    assert units(torch.tensor([1.0, 1.0 + math.sqrt(2)])).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("value", [2.0, math.inf])
def test_rewards_without_a_spread_are_refused(value):
    with pytest.raises(DataError, match="spread"):
        standardize_targets(torch.tensor([2.0, value]), torch.tensor([2.0, 2.0]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="120 pairs"):
        fitted(weights=torch.ones(7, 3))
    with pytest.raises(ShapeError, match="2 head_seeds for 3 heads"):
        fitted(head_seeds=[1, 2])
    with pytest.raises(DataError, match="head 1 has no pair"):
        fitted(weights=torch.tensor([[1.0, 0.0, 2.0]]).expand(120, 3))
    chosen, rejected = states(4, seed=0)
    with pytest.raises(ShapeError, match="one per pair"):
        fit_gaussian(
            chosen,
            rejected,
            chosen_target=torch.zeros(4),
            rejected_target=torch.zeros(4, 1),
            valid_chosen=chosen,
            valid_rejected=rejected,
            valid_chosen_target=torch.zeros(4),
            valid_rejected_target=torch.zeros(4),
            weights=torch.ones(4, 2),
            generator=torch.Generator(),
            **OPTIONS,
        )
