"""Why the defaults are what they are: heads trained on simulated layers of known strength, ten seeds at once.

Rows as in docs/math.md: A random probes, vote alone trained; D all trained on raw states with the margin loss; E the
same on normalised states; F the same with the anchor; G ridge start. Measured item and pair accuracy (A .51 .51, D .63
.73, E .72 .92, F .80 .93, G .78 .92) are means over the seeds; the tests hold relations, not digits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from raylign.losses.reward import anchor_loss, margin_loss
from raylign.rewards.fit import fit_hybrid, predict
from raylign.rewards.hybrid import HybridReward
from raylign.rewards.probes import fit_normalizer, ridge_probes

NUM_SEEDS, NUM_PAIRS, NUM_TRAIN, WIDTH = 10, 400, 200, 64
SCALE = torch.tensor([1.0, 2, 4, 6, 8, 16])
STRENGTH = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.8, 0.5])
NUM_LAYERS = len(SCALE)


@dataclass(frozen=True)
class Row:
    starts_from_ridge: bool = False
    trains_probes: bool = True
    normalises: bool = True
    bce_weight: float = 0.0
    learning_rate: float = 1e-3


ROWS = {
    "A": Row(trains_probes=False),
    "D": Row(normalises=False),
    "E": Row(),
    "F": Row(bce_weight=1.0),
    "G": Row(bce_weight=1.0, starts_from_ridge=True, learning_rate=1e-4),
}


def simulate(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen and rejected states, each (NUM_PAIRS, L, D): layer offset, signal, what the pair shares, and noise."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(NUM_LAYERS, WIDTH, generator=generator)
    direction = STRENGTH[:, None] * direction / direction.norm(dim=1, keepdim=True)
    offset = torch.randn(NUM_LAYERS, WIDTH, generator=generator)
    shared = 0.7 * torch.randn(NUM_PAIRS, NUM_LAYERS, WIDTH, generator=generator)
    noise = torch.randn(2, NUM_PAIRS, NUM_LAYERS, WIDTH, generator=generator)
    chosen, rejected = (
        SCALE[:, None] * (offset + sign * direction + shared + noise[i]) for i, sign in ((0, 1), (1, -1))
    )
    return chosen, rejected


def started(row: Row, seed: int, chosen: torch.Tensor, rejected: torch.Tensor) -> HybridReward:
    generator = torch.Generator().manual_seed(1000 + seed)
    head = HybridReward(NUM_LAYERS, WIDTH, generators=[generator])
    with torch.no_grad():
        head.probe_bias.uniform_(-1, 1, generator=generator)
        if row.normalises:
            head.layer_mean, head.layer_rms = fit_normalizer(chosen, rejected)
        if row.starts_from_ridge:
            head.probe_bias.zero_()
            head.probe_weight.copy_(
                ridge_probes(chosen, rejected, layer_mean=head.layer_mean, layer_rms=head.layer_rms, ridge=0.1)
            )
    return head


@functools.cache
def held_out_rewards(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards (seeds, held-out pairs) of a row's heads, all seeds at once: ten epochs, batch 1, Adam, L2 .01."""
    row = ROWS[name]
    data = [simulate(seed) for seed in range(NUM_SEEDS)]
    chosen, rejected = (torch.stack(side) for side in zip(*data, strict=True))
    train = slice(NUM_TRAIN)
    heads = [started(row, seed, chosen[seed, train], rejected[seed, train]) for seed in range(NUM_SEEDS)]
    parameters, buffers = torch.func.stack_module_state(heads)
    trained = list(parameters.values()) if row.trains_probes else [parameters["vote"]]
    optimizer = torch.optim.Adam(trained, lr=row.learning_rate, weight_decay=0.01)

    def reward(parameters: dict, buffers: dict, features: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(heads[0], (parameters, buffers), (features,)).mean

    all_rewards = torch.func.vmap(reward)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for pair in torch.randperm(NUM_TRAIN, generator=generator).tolist():
            both = all_rewards(parameters, buffers, torch.stack([chosen[:, pair], rejected[:, pair]], dim=1))
            loss = margin_loss(both[:, 0], both[:, 1], margin_target=1.0)
            if row.bce_weight:
                loss = loss + row.bce_weight * anchor_loss(both[:, 0], both[:, 1])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    with torch.no_grad():
        held_out = chosen[:, NUM_TRAIN:], rejected[:, NUM_TRAIN:]
        return tuple(all_rewards(parameters, buffers, side) for side in held_out)


def item_accuracy(name: str) -> float:
    chosen, rejected = held_out_rewards(name)
    return torch.cat([chosen > 0, rejected < 0]).float().mean().item()


def pair_accuracy(name: str) -> float:
    chosen, rejected = held_out_rewards(name)
    return (chosen > rejected).float().mean().item()


def test_a_vote_over_random_probes_is_a_coin():
    assert 0.45 <= pair_accuracy("A") <= 0.60


def test_normalising_layers_helps():
    assert item_accuracy("E") - item_accuracy("D") >= 0.05
    assert pair_accuracy("E") - pair_accuracy("D") >= 0.05


def test_the_anchor_fixes_the_zero_and_leaves_the_order():
    assert item_accuracy("F") - item_accuracy("E") >= 0.03
    assert abs(pair_accuracy("F") - pair_accuracy("E")) <= 0.03


def test_ridge_start_reaches_the_same_order_with_a_tenth_of_the_step():
    assert pair_accuracy("G") >= pair_accuracy("F") - 0.03
    assert item_accuracy("G") >= item_accuracy("F") - 0.04


@pytest.mark.parametrize(("permutes", "low", "high"), [(False, 0.88, 0.97), (True, 0.45, 0.55)])
def test_fit_finds_the_order_and_nothing_where_labels_are_permuted(permutes, low, high):
    accuracies = []
    for seed in range(NUM_SEEDS):
        chosen, rejected = simulate(seed)
        if permutes:
            swap = torch.rand(NUM_PAIRS, generator=torch.Generator().manual_seed(seed)) < 0.5
            chosen, rejected = (
                torch.where(swap[:, None, None], a, b) for a, b in ((rejected, chosen), (chosen, rejected))
            )
        fit = fit_hybrid(
            chosen[:150],
            rejected[:150],
            valid_chosen=chosen[150:200],
            valid_rejected=rejected[150:200],
            epochs=3,
            batch_size=32,
            learning_rate=1e-4,
            weight_decay=0.01,
            ridge=0.1,
            bce_weight=1.0,
            margin_target=1.0,
            train_probes=True,
            seed=seed,
        )
        held_out = predict(fit.head, chosen[200:]).mean, predict(fit.head, rejected[200:]).mean
        accuracies.append((held_out[0] > held_out[1]).float().mean().item())
    assert low <= sum(accuracies) / NUM_SEEDS <= high
