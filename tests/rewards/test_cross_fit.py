"""Out-of-fold rewards: who scores whom, and what that is good for."""

from __future__ import annotations

import re

import pytest
import torch

from raylign.errors import DataError, ShapeError
from raylign.rewards.cross_fit import cross_fit, grouped_folds
from raylign.rewards.fit import fit_hybrid, member_weights, predict


def simulate(num_pairs: int, num_layers: int, width: int, *, strength: float = 0.5, seed: int = 0):
    """Chosen and rejected states (N, L, D), `strength` apart from the common mean along one direction a layer."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(num_layers, width, generator=torch.Generator().manual_seed(99))
    direction = strength * direction / direction.norm(dim=1, keepdim=True)
    noise = torch.randn(2, num_pairs, num_layers, width, generator=generator)
    return 3 + noise[0] + direction, 3 + noise[1] - direction


def fitted(chosen, rejected, *, num_heads: int = 1, epochs: int = 4):
    valid_chosen, valid_rejected = simulate(40, *chosen.shape[1:], seed=7)
    weights = member_weights(len(chosen), num_heads, head_data="bootstrap", seed=5) if num_heads > 1 else None
    return fit_hybrid(
        chosen,
        rejected,
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        epochs=epochs,
        batch_size=8,
        learning_rate=3e-3,
        weight_decay=0.01,
        ridge=0.1,
        bce_weight=1.0,
        margin_target=1.0,
        train_probes=True,
        seed=5,
        num_heads=num_heads,
        weights=weights,
    ).head


def cross_fitted(chosen, rejected, groups, *, num_folds: int = 3, **changes):
    return cross_fit(
        chosen,
        rejected,
        groups,
        num_folds=num_folds,
        seed=5,
        fit=lambda rows: fitted(chosen[rows], rejected[rows], **changes),
    )


def same_head(first, second) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_folds_depend_on_group_and_seed_alone():
    groups = [f"prompt {i % 300}" for i in range(900)]
    folds = grouped_folds(groups, 5, seed=0)
    by_group = dict(zip(groups, folds.tolist(), strict=True))
    assert [by_group[group] for group in groups] == folds.tolist()
    assert grouped_folds(list(reversed(groups)), 5, seed=0).tolist() == folds.tolist()[::-1]
    assert grouped_folds(groups[:7], 5, seed=0).tolist() == folds.tolist()[:7]
    assert grouped_folds(groups, 5, seed=1).tolist() != folds.tolist()
    assert torch.bincount(folds, minlength=5).min() > 900 / 5 / 2
    assert set(grouped_folds(groups, 1, seed=0).tolist()) == {0}


def test_folds_stay_what_they_were():
    """Golden: blake2b of "0:<group>", first 8 bytes mod 5; another value would reshuffle everybody's folds."""
    assert grouped_folds(["a", "b", "c", "d", "e", "f"], 5, seed=0).tolist() == [2, 0, 1, 3, 1, 2]


@pytest.mark.parametrize("num_heads", [1, 3])
def test_out_of_fold_rewards_come_from_heads_that_never_saw_the_prompt(num_heads):
    chosen, rejected = simulate(60, 2, 8)
    groups = [str(i // 2) for i in range(60)]
    crossed = cross_fitted(chosen, rejected, groups, num_heads=num_heads)
    assert len(crossed.heads) == 3
    for fold, head in enumerate(crossed.heads):
        inside = crossed.fold == fold
        assert same_head(head, fitted(chosen[~inside], rejected[~inside], num_heads=num_heads))
        for states, belief in ((chosen, crossed.chosen), (rejected, crossed.rejected)):
            alone = predict(head, states[inside])
            assert torch.equal(belief.mean[inside], alone.mean)
            assert torch.equal(belief.deviations[inside], alone.deviations)
    assert same_head(crossed.full, fitted(chosen, rejected, num_heads=num_heads))
    assert bool((crossed.margin.variance > 0).all()) is (num_heads > 1)


def test_only_out_of_fold_rewards_are_a_coin_on_permuted_labels():
    chosen, rejected = simulate(300, 2, 64, strength=0.0)
    groups = [str(i) for i in range(300)]
    crossed = cross_fitted(chosen, rejected, groups, num_folds=5, epochs=1)
    in_sample = cross_fitted(chosen, rejected, groups, num_folds=1, epochs=1)
    assert (crossed.margin.mean > 0).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert (in_sample.margin.mean > 0).float().mean() > 0.7


def test_out_of_fold_rewards_find_flipped_labels():
    chosen, rejected = simulate(200, 3, 16, strength=1.5)
    flipped = torch.arange(200) % 5 == 0
    stored = [torch.where(flipped[:, None, None], a, b) for a, b in ((rejected, chosen), (chosen, rejected))]
    crossed = cross_fitted(*stored, [str(i) for i in range(200)], num_folds=5)
    contradicted = crossed.margin.mean < 0
    assert (contradicted == flipped).float().mean() > 0.9


def test_one_fold_scores_with_the_head_that_saw_the_pairs():
    chosen, rejected = simulate(20, 2, 4)
    crossed = cross_fitted(chosen, rejected, ["same"] * 20, num_folds=1)
    assert crossed.heads == (crossed.full,)
    assert torch.equal(crossed.chosen.mean, predict(crossed.full, chosen).mean)


def test_one_prompt_cannot_be_cross_fitted_and_nothing_is_fitted_first():
    chosen, rejected = simulate(20, 2, 4)

    def fit(rows: torch.Tensor) -> None:
        raise AssertionError(f"{len(rows)} pairs were fitted to before the folds were checked")

    with pytest.raises(DataError, match=re.escape("all 1 prompts fall into fold")):
        cross_fit(chosen, rejected, ["same"] * 20, num_folds=3, seed=0, fit=fit)


def test_every_pair_needs_a_group():
    chosen, rejected = simulate(20, 2, 4)
    with pytest.raises(ShapeError, match="19 groups for 20 pairs"):
        cross_fitted(chosen, rejected, ["same"] * 19)
