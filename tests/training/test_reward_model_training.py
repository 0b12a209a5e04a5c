"""Fine-tuned members: what they learn, what couples them, and what does not. Two-layer model, made-up pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from raylign.errors import DataError, ShapeError, TrainingError
from raylign.losses.diversity import lora_diversity
from raylign.models.classifiers import ClassifierForward, add_members
from raylign.models.reward_model import score_pairs
from raylign.training.reward_model import MemberTraining, down_projections, train_members
from raylign.types import TokenizedPair

NAMES = ["member0", "member1"]
CONFIG = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 1,
    "pad_token_id": 0,
}


def members(names: list[str], *, seeds: list[int] | None = None) -> ClassifierForward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(LlamaConfig(**CONFIG)).eval()
    own = [int(name[-1]) for name in names]
    return ClassifierForward(add_members(base, names, rank=2, alpha=4, seeds=seeds or own, head_seeds=own))


def made_up_pairs(num_pairs: int = 48) -> list[TokenizedPair]:
    """Chosen responses hold the token 7, rejected ones the token 8."""
    rng = np.random.default_rng(0)

    def response(token: int) -> np.ndarray:
        body = rng.integers(10, 32, rng.integers(1, 5))
        return np.array([*body, token, *rng.integers(10, 32, 2), 2], np.int32)

    return [
        TokenizedPair(
            prompt_ids=rng.integers(10, 32, rng.integers(2, 6)).astype(np.int32),
            chosen_ids=response(7),
            rejected_ids=response(8),
        )
        for _ in range(num_pairs)
    ]


def options(**changes: object) -> MemberTraining:
    plain = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "anchor_weight": 0.1,
        "diversity_weight": 0.0,
        "batch_tokens": 512,
        "layout": "shared",
        "pad_token_id": 0,
    }
    return MemberTraining(**(plain | changes))


def rewards(forward: ClassifierForward, name: str, pairs: list[TokenizedPair]) -> torch.Tensor:
    forward.activate(name)
    return score_pairs(forward, pairs, layout="shared", pad_token_id=0, batch_tokens=512)


def trained(forward: ClassifierForward, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in forward.model.state_dict().items() if f".{name}." in key}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_member_learns_the_order_and_the_backbone_stays():
    pairs, forward = made_up_pairs(), members(["member0"])
    frozen = {k: v.clone() for k, v in forward.model.state_dict().items() if ".member0." not in k}
    losses = train_members(forward, ["member0"], pairs, options=options(epochs=12), seeds=[1])
    chosen, rejected = rewards(forward, "member0", made_up_pairs(64)[48:])
    assert losses.shape == (1, 72)
    assert float((chosen > rejected).double().mean()) > 0.9
    after = forward.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    assert not forward.training and not any(p.requires_grad for p in forward.parameters())


def test_uncoupled_members_end_with_the_weights_they_have_alone():
    """Also for another order of the same members, so that neither drawing nor switching leaks between them."""
    pairs = made_up_pairs(20)
    weights = torch.poisson(torch.ones(20, 2), generator=torch.Generator().manual_seed(0))
    together = members(NAMES)
    train_members(together, NAMES, pairs, options=options(), seeds=[5, 6], weights=weights)
    for position, name in enumerate(NAMES):
        alone = members([name])
        part = weights[:, position : position + 1]
        train_members(alone, [name], pairs, options=options(), seeds=[5 + position], weights=part)
        assert same(trained(together, name), trained(alone, name))
    assert not same(
        {key.replace("member0", "member1"): value for key, value in trained(together, "member0").items()},
        trained(together, "member1"),
    )


@pytest.mark.parametrize("changes", [{"layout": "padded"}, {"batch_tokens": 64}])
def test_layout_and_micro_batches_do_not_change_the_training(changes):
    pairs = made_up_pairs(24)
    plain, other = members(["member0"]), members(["member0"])
    # plain sums of gradients: the sign of Adam's first steps would turn rounding into steps
    first = train_members(plain, ["member0"], pairs, options=options(batch_size=24), seeds=[3])
    second = train_members(other, ["member0"], pairs, options=options(batch_size=24, **changes), seeds=[3])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards(plain, "member0", pairs), rewards(other, "member0", pairs), rtol=0, atol=2e-3)


def test_a_weight_of_two_is_the_pair_twice_and_of_zero_none():
    pairs = made_up_pairs(4)
    weighted, copied = members(["member0"]), members(["member0"])
    weights = torch.tensor([[2.0], [1.0], [1.0], [0.0]])
    first = train_members(weighted, ["member0"], pairs, options=options(batch_size=4), seeds=[0], weights=weights)
    copies = [pairs[0], pairs[0], pairs[1], pairs[2]]
    second = train_members(copied, ["member0"], copies, options=options(batch_size=4), seeds=[0])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        rewards(weighted, "member0", pairs), rewards(copied, "member0", pairs), rtol=0, atol=1e-4
    )


def test_the_loss_is_the_weighted_pair_loss_plus_the_anchor():
    pairs, forward = made_up_pairs(6), members(["member0"])
    chosen, rejected = rewards(forward, "member0", pairs).double()
    weights = torch.tensor([[1.0], [0.0], [3.0], [1.0], [0.0], [0.0]])
    [losses] = train_members(
        forward, ["member0"], pairs, options=options(batch_size=6, anchor_weight=0.3), seeds=[0], weights=weights
    )
    log1p = torch.log1p
    each = log1p((rejected - chosen).exp()) + 0.3 * (log1p((-chosen).exp()) + log1p(rejected.exp()))
    expected = (weights[:, 0].double() * each).sum() / weights.sum()
    assert float(losses[0]) == pytest.approx(float(expected), abs=1e-6)


def test_the_anchor_gives_members_one_zero():
    """Without it a common offset of a member is free: here the head of the start decides."""
    pairs = made_up_pairs()
    offsets = {}
    for anchor in (0.0, 1.0):
        forward = members(["member0"])
        train_members(forward, ["member0"], pairs, options=options(epochs=12, anchor_weight=anchor), seeds=[1])
        found = rewards(forward, "member0", pairs)
        offsets[anchor] = float(found.mean().abs() / (found[0] - found[1]).mean())
    assert offsets[1.0] < 0.1
    assert offsets[1.0] < offsets[0.0]


def test_diversity_parts_adapters_that_start_alike():
    pairs = made_up_pairs(24)
    found = {}
    for weight in (0.0, 1.0):
        forward = members(NAMES, seeds=[4, 4])
        stacks = down_projections(forward, NAMES)
        assert len(stacks) == 14 and stacks[0][0].shape == (2, 16)  # seven linear layers in each of two blocks
        assert all(torch.equal(*stack) for stack in stacks)
        train_members(forward, NAMES, pairs, options=options(diversity_weight=weight, epochs=4), seeds=[4, 5])
        found[weight] = float(lora_diversity(down_projections(forward, NAMES)))
    assert found[1.0] > found[0.0] + 0.05


def test_mistakes_are_named():
    pairs, forward = made_up_pairs(4), members(["member0"])
    with pytest.raises(ShapeError, match="4 pairs and 1 members"):
        train_members(forward, ["member0"], pairs, options=options(), seeds=[0], weights=torch.ones(4, 2))
    with pytest.raises(DataError, match="num_pairs=0"):
        train_members(forward, ["member0"], [], options=options(), seeds=[0])
    with pytest.raises(TrainingError, match="learning_rate"):
        train_members(forward, ["member0"], pairs, options=options(anchor_weight=float("inf")), seeds=[0])
