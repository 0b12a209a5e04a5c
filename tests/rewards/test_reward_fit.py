from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raylign.errors import DataError, ShapeError, TrainingError
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.rewards.fit import fit_hybrid, member_weights, predict
from raylign.rewards.probes import fit_normalizer, ridge_probes

OPTIONS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "ridge": 0.1,
    "bce_weight": 1.0,
    "margin_target": 1.0,
    "train_probes": True,
}


def simulate(num_pairs: int, num_layers: int, width: int, *, strength: float = 0.5, seed: int = 0):
    """Chosen and rejected states (N, L, D), `strength` apart from the common mean along one direction a layer."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(num_layers, width, generator=torch.Generator().manual_seed(99))
    direction = strength * direction / direction.norm(dim=1, keepdim=True)
    noise = torch.randn(2, num_pairs, num_layers, width, generator=generator)
    return 3 + noise[0] + direction, 3 + noise[1] - direction


def fitted(chosen, rejected, *, seed: int = 0, **changes):
    valid_chosen, valid_rejected = simulate(40, *chosen.shape[1:], seed=7)
    return fit_hybrid(
        chosen,
        rejected,
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        seed=seed,
        **{**OPTIONS, **changes},
    )


def same_head(first, second) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_normaliser_centres_coordinates_and_scales_layers():
    chosen, rejected = simulate(30, 2, 6)
    chosen[:, 1], rejected[:, 1] = 40 * chosen[:, 1], 40 * rejected[:, 1]
    mean, rms = fit_normalizer(chosen, rejected)
    normal = (torch.cat([chosen, rejected]) - mean) / rms[:, None]
    torch.testing.assert_close(normal.mean(0), torch.zeros(2, 6), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal.square().mean((0, 2)).sqrt(), torch.ones(2), rtol=0, atol=1e-5)


def test_a_constant_layer_scores_nothing_instead_of_nan():
    chosen, rejected = simulate(12, 2, 3)
    chosen[:, 0], rejected[:, 0] = 5.0, 5.0
    fit = fitted(chosen, rejected)
    assert torch.isfinite(predict(fit.head, chosen).mean).all()
    assert (fit.head.layer_scores(chosen)[:, 0, 0] == fit.head.probe_bias[0, 0]).all()


def test_overflowed_states_are_refused():
    chosen, rejected = simulate(4, 2, 3)
    chosen[1, 1, 1] = math.inf
    with pytest.raises(DataError, match="float16 storage overflows"):
        fit_normalizer(chosen, rejected)


@pytest.mark.parametrize("width", [5, 64], ids=["normal equations", "dual"])
def test_ridge_is_the_penalised_least_squares_solution(width):
    """The slow oracle stacks the penalty under the data and calls least squares."""
    chosen, rejected = simulate(12, 2, width)
    mean, rms = fit_normalizer(chosen, rejected)
    (weights,) = ridge_probes(chosen, rejected, layer_mean=mean, layer_rms=rms, ridge=0.1)
    target = torch.cat([torch.ones(12), -torch.ones(12), torch.zeros(width)]).double()
    for layer in range(2):
        states = ((torch.cat([chosen, rejected])[:, layer] - mean[layer]) / rms[layer]).double()
        stacked = torch.cat([states, math.sqrt(0.1 * 12) * torch.eye(width, dtype=torch.float64)])
        oracle = torch.linalg.lstsq(stacked, target[:, None]).solution[:, 0]
        torch.testing.assert_close(weights[layer].double(), oracle, rtol=1e-4, atol=1e-6)


def test_no_epochs_keep_the_ridge_start():
    chosen, rejected = simulate(30, 2, 6)
    fit = fitted(chosen, rejected, epochs=0)
    start = ridge_probes(chosen, rejected, layer_mean=fit.head.layer_mean, layer_rms=fit.head.layer_rms, ridge=0.1)
    assert torch.equal(fit.head.probe_weight, start)
    assert (fit.best_epochs, len(fit.history)) == ((0,), 1)


@pytest.mark.parametrize("train_probes", [True, False])
def test_probes_move_iff_they_are_trained(train_probes):
    chosen, rejected = simulate(40, 3, 4, strength=4.0)
    valid = {"valid_chosen": chosen, "valid_rejected": rejected}
    options = {**OPTIONS, "epochs": 1, "train_probes": train_probes}
    fit = fit_hybrid(chosen, rejected, **valid, seed=0, **options)
    start = fit_hybrid(chosen, rejected, **valid, seed=0, **{**options, "epochs": 0})
    assert fit.best_epochs == (1,)
    assert (fit.head.probe_weight != start.head.probe_weight).all() if train_probes else True
    assert torch.equal(fit.head.probe_weight, start.head.probe_weight) is not train_probes
    assert torch.equal(fit.head.probe_bias, start.head.probe_bias) is not train_probes
    assert (fit.head.vote != start.head.vote).all()
    assert not any(parameter.requires_grad for parameter in fit.head.parameters())


def test_one_batch_is_one_adamw_step_on_the_sum_of_both_losses():
    """AdamW's first step is the sign of the gradient after the decay, whatever the gradient's size."""
    chosen, rejected = simulate(40, 3, 4, strength=4.0)
    options = {**OPTIONS, "batch_size": 40, "bce_weight": 0.3, "margin_target": 2.0, "weight_decay": 0.5}
    fits = [
        fit_hybrid(
            chosen,
            rejected,
            valid_chosen=chosen,
            valid_rejected=rejected,
            seed=0,
            **{**options, "epochs": epochs, "learning_rate": 1e-4},
        )
        for epochs in (0, 1)
    ]
    start, moved = (fit.head for fit in fits)
    assert [fit.best_epochs for fit in fits] == [(0,), (1,)]
    start.requires_grad_(True)
    chosen_reward, rejected_reward = start(chosen).mean, start(rejected).mean
    loss = torch.log1p(torch.exp(-(chosen_reward - rejected_reward - 2.0))).mean()
    loss = loss + 0.3 * (torch.log1p(torch.exp(-chosen_reward)) + torch.log1p(torch.exp(rejected_reward))).mean()
    loss.backward()
    assert fits[1].history[1].train_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for before, after in zip(start.parameters(), moved.parameters(), strict=True):
        by_hand = before.detach() * (1 - 1e-4 * 0.5) - 1e-4 * before.grad.sign()
        torch.testing.assert_close(after.detach(), by_hand, rtol=0, atol=1e-6)


def test_best_epoch_is_chosen_by_accuracy_then_loss_and_its_parameters_are_kept():
    chosen, rejected = simulate(60, 3, 8)
    fit = fitted(chosen, rejected, epochs=6, learning_rate=0.03)
    assert [record.epoch for record in fit.history] == list(range(7))
    best = max(record.valid_accuracy for record in fit.history)
    tied = [record for record in fit.history if record.valid_accuracy == best]
    assert fit.best_epochs[0] == min(tied, key=lambda record: record.valid_loss).epoch
    assert 0 < fit.best_epochs[0] < 6  # otherwise this data does not test the choice
    again = fitted(chosen, rejected, epochs=fit.best_epochs[0], learning_rate=0.03)
    assert same_head(fit.head, again.head)


def test_tied_accuracy_goes_to_the_lower_loss():
    chosen, rejected = simulate(40, 2, 4, strength=5.0)
    valid_chosen, valid_rejected = simulate(20, 2, 4, strength=5.0, seed=1)
    fit = fit_hybrid(
        chosen,
        rejected,
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        seed=0,
        **OPTIONS,
    )
    assert {record.valid_accuracy.item() for record in fit.history} == {1.0}
    assert fit.best_epochs[0] == 4 == min(fit.history, key=lambda record: record.valid_loss).epoch


def test_training_lowers_the_loss_and_depends_on_the_seed_alone():
    chosen, rejected = simulate(60, 3, 8)
    fit = fitted(chosen, rejected)
    assert fit.history[4].train_loss < fit.history[1].train_loss
    assert same_head(fit.head, fitted(chosen, rejected).head)
    assert not same_head(fit.head, fitted(chosen, rejected, seed=1).head)


def test_half_precision_features_give_the_same_order():
    chosen, rejected = (side.half() for side in simulate(60, 3, 8))
    half, full = fitted(chosen, rejected), fitted(chosen.float(), rejected.float())
    assert same_head(half.head, full.head)


def test_fits_fewer_pairs_than_coordinates_at_the_size_of_a_7b_model():
    chosen, rejected = (side.half() for side in simulate(16, 32, 4096, strength=4.0))
    fit = fitted(chosen, rejected, epochs=1)
    test_chosen, test_rejected = simulate(16, 32, 4096, strength=4.0, seed=3)
    assert (predict(fit.head, test_chosen).mean > predict(fit.head, test_rejected).mean).float().mean() > 0.9


def test_empty_or_unequal_features_are_refused():
    chosen, rejected = simulate(4, 2, 3)
    with pytest.raises(DataError, match="at least one"):
        fitted(chosen[:0], rejected[:0])
    with pytest.raises(ShapeError, match=r"both be \(N, L, D\)"):
        fitted(chosen, rejected[:3])


def test_weighted_ridge_counts_pairs_as_often_as_their_weight():
    chosen, rejected = simulate(12, 2, 5)
    mean, rms = fit_normalizer(chosen, rejected)
    counts = torch.tensor([0, 1, 2, 3] * 3)
    normal = {"layer_mean": mean, "layer_rms": rms}
    (weighted,) = ridge_probes(chosen, rejected, **normal, ridge=0.1, weights=counts[:, None].float())
    repeated = [side.repeat_interleave(counts, dim=0) for side in (chosen, rejected)]
    (expected,) = ridge_probes(*repeated, **normal, ridge=0.1 * 12 / counts.sum().item())
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-6)


def test_members_in_one_pass_are_the_members_of_smaller_passes():
    """Values are those of separate fits up to the rounding of a batched product."""
    chosen, rejected = simulate(60, 3, 8)
    weights = member_weights(60, 4, head_data="bootstrap", seed=3)
    together = fitted(chosen, rejected, num_heads=4, weights=weights, learning_rate=0.03)
    smaller = fitted(chosen, rejected, num_heads=2, weights=weights[:, :2], learning_rate=0.03)
    single = fitted(chosen, rejected, weights=weights[:, :1], learning_rate=0.03)
    rewards = predict(together.head, chosen).head_rewards
    torch.testing.assert_close(rewards[:, :2], predict(smaller.head, chosen).head_rewards, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rewards[:, :1], predict(single.head, chosen).head_rewards, rtol=1e-3, atol=1e-4)
    assert together.best_epochs[:2] == smaller.best_epochs
    assert len(set(together.best_epochs)) > 1  # otherwise this data does not test the choice per member


def test_weights_are_how_often_a_pair_counts():
    chosen, rejected = simulate(40, 3, 4, strength=4.0)
    options = {**OPTIONS, "batch_size": 40, "learning_rate": 1e-4, "epochs": 1}
    weights = member_weights(40, 1, head_data="bootstrap", seed=0)
    fit = fit_hybrid(chosen, rejected, valid_chosen=chosen, valid_rejected=rejected, seed=0, weights=weights, **options)
    start = fit_hybrid(
        chosen,
        rejected,
        valid_chosen=chosen,
        valid_rejected=rejected,
        seed=0,
        weights=weights,
        **{**options, "epochs": 0},
    ).head
    repeated = [side.repeat_interleave(weights[:, 0].long(), dim=0) for side in (chosen, rejected)]
    rewards = [start.head_rewards(side) for side in repeated]
    loss = margin_loss(*rewards, margin_target=1.0) + anchor_loss(*rewards)
    assert fit.history[1].train_loss.item() == pytest.approx(loss.mean().item(), rel=1e-5)


def test_bootstrapped_members_disagree_and_equal_members_do_not():
    chosen, rejected = simulate(60, 3, 8)
    weights = member_weights(60, 3, head_data="bootstrap", seed=0)
    bootstrapped = fitted(chosen, rejected, num_heads=3, weights=weights)
    own_starts = fitted(chosen, rejected, num_heads=3)
    assert predict(bootstrapped.head, chosen).disagreement.min() > 0
    assert predict(own_starts.head, chosen).disagreement.min() > 0
    duplicated = predict(bootstrapped.head.select([1, 1, 1]), chosen)
    assert duplicated.disagreement.max() < 1e-6


def test_bootstrap_weights_are_poisson_and_those_of_a_member_do_not_depend_on_the_others():
    weights = member_weights(4000, 3, head_data="bootstrap", seed=0)
    assert torch.equal(weights[:, :2], member_weights(4000, 2, head_data="bootstrap", seed=0))
    torch.testing.assert_close(weights.mean(0), torch.ones(3), rtol=0, atol=0.06)
    torch.testing.assert_close(weights.var(0), torch.ones(3), rtol=0, atol=0.12)
    assert abs(torch.corrcoef(weights.T)[0, 1]) < 0.06
    assert not torch.equal(weights, member_weights(4000, 3, head_data="bootstrap", seed=1))


def test_shards_leave_each_member_all_pairs_but_its_part():
    weights = member_weights(10, 5, head_data="shards", seed=0)
    assert weights.sum(0).tolist() == [8.0] * 5
    assert weights.sum(1).tolist() == [4.0] * 10
    assert member_weights(10, 5, head_data="all", seed=0) is None
    with pytest.raises(DataError, match="two members or more"):
        member_weights(10, 1, head_data="shards", seed=0)


def test_standardised_members_share_mean_and_spread_on_the_validation_pairs():
    chosen, rejected = simulate(60, 3, 8)
    weights = member_weights(60, 3, head_data="bootstrap", seed=0)
    options = {"num_heads": 3, "weights": weights, "bce_weight": 0.0, "learning_rate": 0.03}
    raw, standard = (fitted(chosen, rejected, is_standardized=flag, **options) for flag in (False, True))
    calibration = torch.cat(simulate(40, 3, 8, seed=7))
    means, standard_means = (predict(fit.head, calibration).head_rewards.mean(0) for fit in (raw, standard))
    assert means.std() > 1e-3
    assert standard_means.std() < 1e-6


def test_a_diverging_fit_is_no_fit():
    """Comparisons with nan are false: its best epoch would be the start, and nobody would know."""
    with pytest.raises(TrainingError, match=r"loss of 1 of 1 members \(from member 0\) is not finite in epoch \d+"):
        fitted(*simulate(40, 2, 6), learning_rate=1e30)
