"""What a policy says of its tokens: read after the token, before the next one, and from nothing behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_run import tiny_model, tiny_pairs

from raylign.data.packing import pack_pairs
from raylign.errors import ModelError
from raylign.models.forward import PolicyForward
from raylign.models.token_forward import TokenForm
from raylign.models.variational_policy import TokenScores, VariationalPolicy
from raylign.types import Layout, TokenizedPair

LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


def make_policy(**form: object) -> VariationalPolicy:
    return VariationalPolicy(tiny_model(), form=TokenForm(**{"q_from": "logits"} | form), seed=0).eval()  # type: ignore[arg-type]


@torch.no_grad()
def score(policy: PolicyForward, pairs: list[TokenizedPair], layout: Layout = "shared") -> TokenScores:
    return policy(pack_pairs(pairs, layout=layout, pad_token_id=0))


def edited(pair: TokenizedPair, position: int) -> TokenizedPair:
    ids = pair.chosen_ids.copy()
    ids[position] = 2 + (ids[position] + 7) % 50
    return TokenizedPair(prompt_ids=pair.prompt_ids, chosen_ids=ids, rejected_ids=pair.rejected_ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_is_read_after_its_token_and_before_the_next(layout: Layout) -> None:
    pair = TokenizedPair(
        prompt_ids=np.array([5, 6, 7], np.int32),
        chosen_ids=np.array([11, 12, 13, 14, 1], np.int32),
        rejected_ids=np.array([21, 22, 1], np.int32),
    )
    policy = make_policy()
    before = score(policy, [pair], layout)
    for position in range(5):
        after = score(policy, [edited(pair, position)], layout)
        is_same = [torch.allclose(after.token_mu[t], before.token_mu[t], atol=1e-6) for t in range(8)]
        assert is_same == [t < position or t >= 5 for t in range(8)]
        is_same = [torch.allclose(after.token_sigma[t], before.token_sigma[t], atol=1e-6) for t in range(8)]
        assert is_same == [t < position or t >= 5 for t in range(8)]


def test_layouts_and_company_change_nothing() -> None:
    pairs, policy = tiny_pairs(5), make_policy()
    together = score(policy, pairs)
    for layout in LAYOUTS:
        other = score(policy, pairs, layout)
        torch.testing.assert_close(other.token_mu, together.token_mu, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.token_q, together.token_q, rtol=1e-5, atol=1e-5)
    alone = [score(policy, [pair]) for pair in pairs]
    chosen = torch.cat([scores.token_sigma[: int(scores.chosen_lengths)] for scores in alone])
    torch.testing.assert_close(chosen, together.token_sigma[together.token_sequence < 5], rtol=1e-5, atol=1e-6)


def test_it_scores_pairs_as_a_policy_without_a_head() -> None:
    pairs = tiny_pairs(4)
    plain, rewarding = score(PolicyForward(tiny_model()).eval(), pairs), score(make_policy(), pairs)
    for name in ("chosen_logps", "rejected_logps", "token_logps", "chosen_lengths", "rejected_lengths"):
        assert torch.equal(getattr(plain, name), getattr(rewarding, name))


def test_q_is_the_log_probability_unless_it_is_scaled() -> None:
    pairs = tiny_pairs(4)
    scores = score(make_policy(), pairs)
    assert torch.equal(scores.token_q, scores.token_logps)
    flat = score(make_policy(q_from="probs"), pairs)
    assert float(flat.token_q.max() - flat.token_q.min()) < 1
    assert float(scores.token_q.max() - scores.token_q.min()) > 1e-2
    sharp = score(make_policy(logit_scale=50.0), pairs)
    assert float(sharp.token_q.min()) < float(scores.token_q.min()) - 1
    assert torch.equal(sharp.token_logps, scores.token_logps)


def test_sigma_stays_above_its_floor() -> None:
    policy = make_policy(sigma_floor=0.25)
    with torch.no_grad():
        policy.token_heads.reward.bias[1] = -100
    assert torch.allclose(score(policy, tiny_pairs(2)).token_sigma, torch.tensor(0.25))


def test_bfloat16_trunks_keep_float32_rewards() -> None:
    policy = VariationalPolicy(
        tiny_model(), form=TokenForm(q_from="logits"), seed=0, autocast_dtype=torch.bfloat16
    ).eval()
    scores = score(policy, tiny_pairs(3))
    assert scores.token_mu.dtype == scores.token_sigma.dtype == torch.float32
    assert not torch.equal(scores.token_mu, scores.token_mu.bfloat16().float())


def test_forms_and_states_that_a_policy_has_not_are_refused() -> None:
    for q_from in ("q_head", None):
        with pytest.raises(ModelError, match=f"q_from={q_from} is no value of the policy"):
            make_policy(q_from=q_from)
    with pytest.raises(ModelError, match=r"layers=\[1\]"):
        make_policy()(pack_pairs(tiny_pairs(1), layout="shared", pad_token_id=0), layers=(1,))
