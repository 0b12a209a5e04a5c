"""Live confidence: what gamma is computed from, who judges whom, and that tracking never touches the policy's gradient.

Real here: a two-layer model, two heads, whole updates.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import HIDDEN, NUM_LAYERS, tiny_model, tiny_table

from raylign.config import ConfidenceSection, RewardSection, TrainSection
from raylign.data.packing import pack_pairs
from raylign.errors import CheckpointError, ConfigError, DataError
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.models.forward import PolicyForward
from raylign.rewards.hybrid import HybridReward
from raylign.training import offline
from raylign.training.live_confidence import LiveConfidence
from raylign.training.micro_batches import Packing, encode
from raylign.training.offline import UpdateSummary, offline_update
from raylign.training.table import PairTable
from raylign.training.world import World

NUM_PAIRS = 9
LAYERS = (1, 2)


def packing(batch_tokens: int) -> Packing:
    return Packing(layout="shared", pad_token_id=0, batch_tokens=batch_tokens)


def make_heads(num_heads: int = 2) -> list[HybridReward]:
    return [HybridReward(NUM_LAYERS, HIDDEN, generators=[torch.Generator().manual_seed(k)]) for k in range(num_heads)]


def make_live(
    *, num_heads: int = 2, batch_tokens: int = 4096, temperature: Any = None, **settings: Any
) -> LiveConfidence:
    return LiveConfidence(
        make_heads(num_heads),
        layers=LAYERS,
        settings=ConfidenceSection(source="live", **settings),
        reward=RewardSection(),
        packing=packing(batch_tokens),
        temperature=temperature,
        anchors=PairTable(tiny_table(0, num_valid=5, seed=4)),
    )


def update(
    policy: PolicyForward, live: LiveConfidence, *, number: int = 0, batch_tokens: int = 4096
) -> tuple[UpdateSummary, list[torch.Tensor]]:
    """One update; also minus the movement of the weights under SGD of step 1, which is the gradient."""
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    summary = offline_update(
        policy,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        PairTable(tiny_table(NUM_PAIRS)).batch(np.arange(NUM_PAIRS)),
        update=number,
        settings=TrainSection(objective="label_confidence", max_grad_norm=1e9),
        packing=packing(batch_tokens),
        seed=0,
        live=live,
    )
    return summary, [old - new.detach() for old, new in zip(before, policy.parameters(), strict=True)]


def rewards_by_own_head(policy: PolicyForward, heads: list[HybridReward]) -> torch.Tensor:
    """Chosen and rejected rewards of each pair by the head of its fold (fold of pair i is i mod 2). Shape (2, B)."""
    batch = PairTable(tiny_table(NUM_PAIRS)).batch(np.arange(NUM_PAIRS))
    scores = policy(pack_pairs(batch.tokens, layout="padded", pad_token_id=0), layers=LAYERS)
    with torch.no_grad():
        rows = [[heads[i % len(heads)](states[i : i + 1]).mean for i in range(NUM_PAIRS)] for states in _both(scores)]
    return torch.tensor(rows).double()


def _both(scores: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return scores.chosen_states, scores.rejected_states


def test_gamma_is_e4_of_the_own_folds_rewards_centred_by_the_first_batch() -> None:
    policy = PolicyForward(tiny_model())
    chosen, rejected = rewards_by_own_head(policy, make_heads())
    center = torch.cat([chosen, rejected]).mean()
    expected = 1 / (
        1 + torch.exp(-7.5 * (1 / (1 + torch.exp(center - chosen)) - 1 / (1 + torch.exp(center - rejected))))
    )

    summary, _ = update(policy, make_live())
    torch.testing.assert_close(summary.columns["confidence"], expected, rtol=0, atol=1e-5)


def test_a_pair_is_never_judged_by_the_head_that_saw_it() -> None:
    """Head 1 saw the pairs of fold 0: breaking it must not move their gamma."""
    intact, broken = make_live(center="none"), make_live(center="none")
    with torch.no_grad():
        broken.heads[1].probe_bias.add_(5.0)
    first = update(PolicyForward(tiny_model()), intact)[0].columns["confidence"]
    second = update(PolicyForward(tiny_model()), broken)[0].columns["confidence"]
    assert torch.equal(first[0::2], second[0::2])
    assert (first[1::2] != second[1::2]).all()


def test_batch_level_is_one_value_of_the_whole_update_however_it_is_cut() -> None:
    policy = PolicyForward(tiny_model())
    chosen, rejected = rewards_by_own_head(policy, make_heads())
    center = torch.cat([chosen, rejected]).mean()
    logits = 7.5 * (torch.sigmoid(chosen - center) - torch.sigmoid(rejected - center))

    for batch_tokens in (4096, 1):
        live = make_live(level="batch", batch_tokens=batch_tokens)
        gamma = update(copy.deepcopy(policy), live, batch_tokens=batch_tokens)[0].columns["confidence"]
        torch.testing.assert_close(gamma, torch.sigmoid(logits.mean()).expand(NUM_PAIRS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"level": "batch"}, {"track": "anchor"}, {"track": "stored_order"}])
def test_cutting_the_batch_changes_neither_gamma_nor_gradient_nor_heads(settings: dict[str, Any]) -> None:
    outcomes = []
    for batch_tokens in (4096, 1):
        policy, live = PolicyForward(tiny_model()), make_live(batch_tokens=batch_tokens, **settings)
        for number in range(2):
            summary, gradient = update(policy, live, number=number, batch_tokens=batch_tokens)
        assert live.center.value is not None
        state = [live.center.value, *(p.detach() for head in live.heads for p in head.parameters())]
        outcomes.append((summary.columns["confidence"], gradient, state))
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-4, atol=2e-5)


def test_center_is_the_mean_of_the_updates_before() -> None:
    """Update 0 is centred by its own mean; update 1 by the same value, update 2 by the moved one."""
    policy, live = PolicyForward(tiny_model()), make_live(center_decay=0.5)
    means, seen = [], []
    for number in range(3):
        means.append(rewards_by_own_head(policy, live.heads).mean())
        update(policy, live, number=number)
        assert live.center.value is not None
        seen.append(float(live.center.value))
    expected = float(means[0])
    for mean, value in zip(means, seen, strict=True):
        expected = 0.5 * expected + 0.5 * float(mean)
        assert value == pytest.approx(expected, rel=1e-5)


def test_floor_and_temperature_reach_the_formula() -> None:
    policy = PolicyForward(tiny_model())
    chosen, rejected = rewards_by_own_head(policy, make_heads())
    live = make_live(squash="none", temperature=0.7, floor=0.5)
    expected = torch.sigmoid((chosen - rejected) / 0.7).clamp(min=0.5)
    assert (expected == 0.5).any()
    torch.testing.assert_close(update(policy, live)[0].columns["confidence"], expected, rtol=0, atol=1e-5)


def test_gamma_carries_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    formula = offline.pair_losses

    def watched(margin: torch.Tensor, confidence: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(confidence.requires_grad)
        return formula(margin, confidence, **options)

    monkeypatch.setattr(offline, "pair_losses", watched)
    update(PolicyForward(tiny_model()), make_live(track="stored_order"))
    assert seen == [False]


@pytest.mark.parametrize("track", ["anchor", "stored_order"])
@pytest.mark.parametrize("level", ["pair", "batch"])
def test_tracking_does_not_touch_the_policys_gradient_but_moves_the_heads(track: Any, level: Any) -> None:
    _, still = update(PolicyForward(tiny_model()), make_live(level=level))
    live = make_live(track=track, level=level)
    _, tracked = update(PolicyForward(tiny_model()), live)
    assert all(torch.equal(a, b) for a, b in zip(still, tracked, strict=True))
    for head, start in zip(live.heads, make_heads(), strict=True):
        for moved, old in zip(head.parameters(), start.parameters(), strict=True):
            assert not torch.equal(moved, old)


def test_stored_order_moves_a_head_only_by_pairs_outside_its_fold() -> None:
    """The step is AdamW's on E2 + E3, averaged over the pairs of the other fold, written out here."""
    policy = PolicyForward(tiny_model())
    batch = PairTable(tiny_table(NUM_PAIRS)).batch(np.arange(NUM_PAIRS))
    scores = policy(pack_pairs(batch.tokens, layout="shared", pad_token_id=0), layers=LAYERS)
    expected = make_heads()
    for number, head in enumerate(expected):
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
        rows = [i for i in range(NUM_PAIRS) if i % 2 != number]
        chosen, rejected = head(scores.chosen_states[rows]).mean, head(scores.rejected_states[rows]).mean
        (margin_loss(chosen, rejected, margin_target=1.0) + anchor_loss(chosen, rejected)).mean().backward()
        optimizer.step()
    live = make_live(track="stored_order")
    update(policy, live)
    for head, wanted in zip(live.heads, expected, strict=True):
        torch.testing.assert_close(list(head.parameters()), list(wanted.parameters()), rtol=0, atol=1e-5)


def test_additional_forwards_draw_no_random_number_and_have_no_dropout() -> None:
    """Otherwise reading states would change the dropout of the forward that trains."""
    policy = PolicyForward(tiny_model())
    for layer in policy.decoder_layers():
        layer.self_attn.attention_dropout = 0.5
    policy.train()
    tokens = PairTable(tiny_table(4)).batch(np.arange(4)).tokens
    before = torch.random.get_rng_state()
    first, second = (list(encode(policy, tokens, layers=LAYERS, packing=packing(64), world=World())) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert policy.training
    for (_, mine), (_, theirs) in zip(first, second, strict=True):
        assert torch.equal(mine.chosen_states, theirs.chosen_states)


def test_untrained_probes_stay() -> None:
    live = LiveConfidence(
        make_heads(),
        layers=LAYERS,
        settings=ConfidenceSection(source="live", track="stored_order"),
        reward=RewardSection(train_probes=False),
        packing=packing(4096),
    )
    update(PolicyForward(tiny_model()), live)
    for head, start in zip(live.heads, make_heads(), strict=True):
        assert torch.equal(head.probe_weight, start.probe_weight)
        assert not torch.equal(head.vote, start.vote)


def test_state_of_other_heads_is_refused() -> None:
    tracked = make_live(num_heads=3, track="anchor").state_dict()
    with pytest.raises(CheckpointError, match="holds 3 reward heads, this run has 2"):
        make_live(track="anchor").load_state_dict(tracked)
    with pytest.raises(CheckpointError, match=r"holds tracked reward heads, .* confidence\.track=none"):
        make_live().load_state_dict(tracked)
    with pytest.raises(CheckpointError, match=r"holds no tracked reward heads, .* confidence\.track=anchor"):
        make_live(track="anchor").load_state_dict(make_live().state_dict())


@pytest.mark.parametrize("track", ["none", "anchor"])
def test_heads_that_stay_are_not_in_the_state_and_the_next_update_is_the_same(track: Any) -> None:
    policy, live = PolicyForward(tiny_model()), make_live(track=track)
    update(policy, live)
    resumed, state = make_live(track=track), live.state_dict()
    assert (state["heads"] is None) == (track == "none")
    resumed.load_state_dict(copy.deepcopy(state))
    assert resumed.center == live.center
    outcomes = [update(copy.deepcopy(policy), each, number=1) for each in (live, resumed)]
    assert torch.equal(*(summary.columns["confidence"] for summary, _ in outcomes))
    for mine, theirs in zip(live.heads, resumed.heads, strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


def test_what_is_missing_is_named() -> None:
    options: dict[str, Any] = {"layers": LAYERS, "reward": RewardSection(), "packing": packing(1)}
    with pytest.raises(DataError, match="at least one reward head"):
        LiveConfidence([], settings=ConfidenceSection(), **options)
    with pytest.raises(ConfigError, match="labelled held-out pairs"):
        LiveConfidence(make_heads(), settings=ConfidenceSection(track="anchor"), **options)
    with pytest.raises(ConfigError, match="temperature=fitted"):
        LiveConfidence(make_heads(), settings=ConfidenceSection(squash="none"), **options)
