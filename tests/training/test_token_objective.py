"""What rewards of tokens are trained on: layouts and weights change nothing, terms left out leave what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_texts import save_policy

from raylign.config import AvaSection
from raylign.losses.ava import AvaCounts, ava_shares, ava_sums
from raylign.losses.variational import TdScale, td_errors, td_moments
from raylign.models.classifiers import add_adapters
from raylign.models.loading import load_policy
from raylign.models.token_forward import TokenForm, TokenHeads, TokenRewardForward
from raylign.models.token_reward import read_pairs
from raylign.training.reward_model import Backward, MemberTraining, train_members
from raylign.training.token_objective import NUM_RECORDS, AvaObjective, BradleyTerryTokens
from raylign.types import TokenizedPair

FORM = TokenForm(q_from="logits", sigma_floor=0.01)


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


def members(policy_dir: Path, names: tuple[str, ...] = ("member0",), form: TokenForm = FORM) -> TokenRewardForward:
    model = load_policy(policy_dir)
    seeds = [int(name[-1]) for name in names]
    heads = {
        name: TokenHeads(16, model.config.vocab_size, form, seed=seed) for name, seed in zip(names, seeds, strict=True)
    }
    adapters = add_adapters(model, names, rank=2, alpha=4, seeds=seeds, task_type="CAUSAL_LM")
    return TokenRewardForward(adapters, heads, form=form).eval()


def made_up_pairs(num_pairs: int = 24) -> list[TokenizedPair]:
    """Chosen responses hold the token 7, rejected ones the token 8; lengths differ."""
    rng = np.random.default_rng(0)

    def response(token: int) -> np.ndarray:
        return np.array([*rng.integers(10, 250, rng.integers(0, 5)), token, *rng.integers(10, 250, 2), 2], np.int32)

    return [
        TokenizedPair(
            prompt_ids=rng.integers(10, 250, rng.integers(2, 6)).astype(np.int32),
            chosen_ids=response(7),
            rejected_ids=response(8),
        )
        for _ in range(num_pairs)
    ]


def options(**changes: Any) -> MemberTraining:
    plain: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "anchor_weight": 0.0,
        "diversity_weight": 0.0,
        "batch_tokens": 512,
        "layout": "shared",
        "pad_token_id": 0,
    }
    return MemberTraining(**(plain | changes))


def gradient(forward: TokenRewardForward, backward: Backward, pairs: list[TokenizedPair], **changes: Any) -> Any:
    """Loss and gradient of one batch of all pairs, by name of the parameter."""
    weights = changes.pop("weights", torch.ones(len(pairs)))
    forward.train()
    forward.activate("member0")
    forward.heads.requires_grad_(True)
    forward.zero_grad()
    loss = backward(forward, "member0", pairs, np.arange(len(pairs)), weights, options(**changes))
    return loss, {name: p.grad.clone() for name, p in forward.named_parameters() if p.grad is not None}


def assert_same(first: Any, second: Any, scale: float = 1.0) -> None:
    assert first[0] == pytest.approx(scale * second[0], abs=1e-5)
    assert first[1].keys() == second[1].keys() and len(first[1]) > 10
    for name, value in first[1].items():
        torch.testing.assert_close(value, scale * second[1][name], rtol=1e-4, atol=1e-6)


OBJECTIVES = {
    "ava_p": lambda: AvaObjective(AvaSection(), has_rejected=True),
    "ava_d": lambda: AvaObjective(AvaSection(terminal="drop"), has_rejected=False),
    "token_bt": lambda: BradleyTerryTokens("mean"),
}
UNSCALED = {  # the deviation of TD errors is over the pairs that count, whatever their weights
    **OBJECTIVES,
    "ava_p": lambda: AvaObjective(AvaSection(standardize_td=False), has_rejected=True),
    "ava_d": lambda: AvaObjective(AvaSection(standardize_td=False, terminal="drop"), has_rejected=False),
}


@pytest.mark.parametrize("kind", list(OBJECTIVES))
@pytest.mark.parametrize(
    "changes", [{"layout": "padded"}, {"layout": "packed"}, {"batch_tokens": 64}, {"pad_token_id": 2}]
)
def test_layouts_pads_and_micro_batches_change_no_loss_and_no_gradient(kind, changes, policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs()
    expected = gradient(forward, OBJECTIVES[kind](), pairs)
    assert_same(gradient(forward, OBJECTIVES[kind](), pairs, **changes), expected)


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_a_pair_of_weight_two_counts_twice_and_one_of_weight_zero_is_gone(kind, policy_dir):
    """With the counts of the batch: four pairs of which one is doubled, one is left out, all of one length."""
    forward = members(policy_dir)
    first, second, third, fourth = [pair for pair in made_up_pairs() if pair.num_tokens >= 12][:4]
    chosen, rejected = first.chosen_ids, first.rejected_ids
    same = [
        TokenizedPair(
            prompt_ids=pair.prompt_ids,
            chosen_ids=np.resize(pair.chosen_ids, len(chosen)),
            rejected_ids=np.resize(pair.rejected_ids, len(rejected)),
        )
        for pair in (first, second, third, fourth)
    ]
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0])
    weighted = gradient(forward, UNSCALED[kind](), same, weights=weights)
    assert_same(weighted, gradient(forward, UNSCALED[kind](), [same[0], same[0], same[2], same[3]]))


def test_the_loss_is_that_of_the_terms_over_the_whole_batch(policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs()
    plain = AvaSection(standardize_td=False)
    found, _ = gradient(forward, AvaObjective(plain, has_rejected=True), pairs, batch_tokens=64)
    out = read_pairs(forward.eval(), pairs, layout="padded", pad_token_id=0, batch_tokens=4096)
    sums = ava_sums(
        out.q, out.mu, out.sigma, out.sequence, len(pairs), has_rejected=True, discount=0.95, terminal="zero",
        likelihood_weight=1.0, negative="unlikelihood", cer="log_sigmoid",
    )  # fmt: skip
    counts = AvaCounts(
        chosen_tokens=sum(len(pair.chosen_ids) for pair in pairs),
        rejected_tokens=sum(len(pair.rejected_ids) for pair in pairs),
        num_responses=len(pairs),
    )
    expected = ava_shares(sums, counts, terminal="zero", irl_weight=0.1, td_weight=0.5, cer_weight=1.0).loss
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_without_other_terms_ava_p_is_bradley_terry_on_the_last_token(policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs()
    bare = AvaSection(irl_weight=0, likelihood_weight=0, negative="none")
    loss, found = gradient(forward, AvaObjective(bare, has_rejected=True), pairs)
    expected_loss, expected = gradient(forward, BradleyTerryTokens("last"), pairs)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_bare_demonstrations_are_fine_tuning_on_the_chosen_responses(policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs()
    bare = AvaSection(irl_weight=0)
    loss, _ = gradient(forward, AvaObjective(bare, has_rejected=False), pairs)
    out = read_pairs(forward.eval(), pairs, layout="padded", pad_token_id=0, batch_tokens=4096)
    chosen = out.q[out.sequence < len(pairs)]
    assert loss == pytest.approx(-float(chosen.mean()), abs=1e-5)


def test_td_errors_are_divided_by_the_deviation_of_the_updates_before(policy_dir):
    """The first update by its own; the last one by moments in which the first ones, before training, count too."""
    pairs = made_up_pairs(16)
    forward = members(policy_dir)
    out = read_pairs(forward, pairs, layout="shared", pad_token_id=0, batch_tokens=512)
    moments = td_moments(*td_errors(out.q, out.sequence, discount=0.95, terminal="zero")).tolist()
    expected = TdScale().updated(count=moments[0], total=moments[1], squares=moments[2]).std
    objective = AvaObjective(AvaSection(), has_rejected=True)
    train_members(forward, ["member0"], pairs, options=options(batch_size=16, epochs=3), seeds=[0], backward=objective)
    first, second, third = objective.records["member0"]
    assert (first.update, second.update, third.update) == (1, 2, 3)
    assert first.td_std == pytest.approx(expected, rel=1e-4)
    assert second.td_std == pytest.approx(expected, rel=1e-4)
    assert third.td_std != pytest.approx(expected, rel=1e-4)
    plain = AvaObjective(AvaSection(standardize_td=False), has_rejected=True)
    train_members(members(policy_dir), ["member0"], pairs, options=options(), seeds=[0], backward=plain)
    assert {record.td_std for record in plain.records["member0"]} == {1.0}


def test_inverse_rl_does_not_drown_the_other_terms_of_the_first_update(policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs()
    objective = AvaObjective(AvaSection(), has_rejected=True)
    gradient(forward, objective, pairs)
    (record,) = objective.records["member0"]
    assert record.sigma_min > 0.6  # near log 2, until rho is trained
    assert record.grad_norms["td"] < 20 * record.grad_norms["likelihood"]
    start = forward.heads["member0"].reward.weight.detach()
    assert start.shape == (2, 16) and start.square().mean().sqrt() < 0.003  # near the prior's mean, too
    plain = TokenHeads(16, 30, TokenForm(q_from=None)).reward.weight
    assert plain.square().mean().sqrt() > 0.01  # a reward that is compared alone has no prior to start at


def test_members_trained_together_are_those_trained_alone_and_records_hold_every_term(policy_dir):
    pairs, names = made_up_pairs(), ("member0", "member1")
    together = members(policy_dir, names)
    objective = AvaObjective(AvaSection(), has_rejected=True)
    train_members(together, names, pairs, options=options(epochs=2), seeds=[5, 6], backward=objective)
    for position, name in enumerate(names):
        alone = members(policy_dir, (name,))
        train_members(
            alone, [name], pairs, options=options(epochs=2), seeds=[5 + position],
            backward=AvaObjective(AvaSection(), has_rejected=True),
        )  # fmt: skip
        whole = together.state_dict()
        own = {key: value for key, value in alone.state_dict().items() if f".{name}." in key}
        assert len(own) > 10 and all(torch.equal(whole[key], value) for key, value in own.items())
        records = objective.records[name]
        assert len(records) == NUM_RECORDS and records[-1].update == 6
        assert set(records[0].terms) == set(records[0].grad_norms) == {"likelihood", "negative", "kl", "td", "cer"}
        # adapters add nothing at first, so that A has no gradient, but B has one of every term
        assert all(norm > 0 for record in records for norm in record.grad_norms.values())
        assert 0.01 < records[-1].sigma_min <= records[-1].sigma_mean
    assert not any(parameter.requires_grad for parameter in together.parameters())


def test_norms_of_terms_are_those_of_their_gradients(policy_dir):
    forward, pairs = members(policy_dir), made_up_pairs(8)
    whole = AvaObjective(AvaSection(), has_rejected=True)
    gradient(forward, whole, pairs)
    bare = AvaSection(irl_weight=0, likelihood_weight=0, negative="none")
    _, only_cer = gradient(forward, AvaObjective(bare, has_rejected=True), pairs)
    lora = torch.cat([value.flatten() for name, value in only_cer.items() if ".lora_" in name])
    head = torch.cat([value.flatten() for name, value in only_cer.items() if "reward" in name])
    assert whole.records["member0"][0].grad_norms["cer"] == pytest.approx(float(lora.norm()), rel=1e-4)
    assert whole.records["member0"][0].head_grad_norms["cer"] == pytest.approx(float(head.norm()), rel=1e-4)
