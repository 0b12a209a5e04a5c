"""Sampled responses scored token by token by fitted members, as the trainer and the report read them, without Ray.

Real here: a two-layer policy, its members of AVA, their files, the scorer. The members have learned next to nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_texts import save_policy, text_pairs
from tiny_token_reward import SECTION, save_token_reward

from raylign.config import RobustSection, TokenRewardSection
from raylign.data.tokenization import end_of_response_id
from raylign.models.loading import load_tokenizer
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.scorer import ResponseScorer
from raylign.runtime.text_rewards import make_text_reward
from raylign.runtime.token_examples import token_examples
from raylign.types import Rollout

OPTIONS = ActorOptions(dtype="float32", num_cpus=torch.get_num_threads())


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


@pytest.fixture(scope="module")
def reward_dir(make_tokenizer: Any, policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_token_reward(tmp_path_factory.mktemp("reward") / "fitted", text_pairs(make_tokenizer()), policy_dir)


@pytest.fixture(scope="module")
def rollouts(make_tokenizer: Any, policy_dir: Path) -> list[Rollout]:
    """Three responses to one prompt: ended, cut, and ended by another stop token."""
    pair = pairs_from_table(text_pairs(make_tokenizer()))[0]
    tokenizer = load_tokenizer(policy_dir)
    end, body = end_of_response_id(tokenizer), pair.chosen_ids[:-1]
    stop = next(token for token in tokenizer.all_special_ids if token != end)
    return [
        Rollout(
            prompt_index=0,
            sample_index=sample,
            prompt_ids=pair.prompt_ids,
            response_ids=np.array(ids, np.int32),
            sampler_logps=np.zeros(len(ids), np.float32),
            reached_end=is_ended,
            weight_version=0,
        )
        for sample, (ids, is_ended) in enumerate((([*body, end], True), (body, False), ([*body, stop], True)))
    ]


def scored(policy_dir: Path, reward_dir: Path, rollouts: list[Rollout], rule: str = "mean", **credit: Any) -> list:
    scorer = ResponseScorer(
        str(policy_dir),
        str(reward_dir),
        (),
        RobustSection(rule=rule),
        OPTIONS,
        SECTION,
        token_reward=TokenRewardSection(**credit),
    )
    return scorer.score(rollouts)


@pytest.mark.parametrize("credit", ["own", "differences", "attention"])
def test_rewards_of_tokens_belong_to_the_response_that_is_scored(policy_dir, reward_dir, rollouts, credit):
    items = scored(policy_dir, reward_dir, rollouts, credit=credit)
    ended, cut, stopped = (item.token_rewards for item in items)
    assert [len(item.token_rewards) for item in items] == [len(rollout.response_ids) for rollout in rollouts]
    np.testing.assert_allclose(stopped, ended, rtol=0, atol=1e-5)  # closed by the end token, all three
    np.testing.assert_allclose(cut[:-1], ended[:-2], rtol=0, atol=1e-5)
    assert cut[-1] == pytest.approx(ended[-2] + ended[-1], abs=1e-5)
    rewards = [item.reward for item in items]
    assert rewards == pytest.approx([rewards[0]] * 3, abs=1e-5)
    if credit == "attention":
        assert ended.sum() == pytest.approx(rewards[0], abs=1e-5)
    if credit == "own":
        assert ended[-1] == pytest.approx(rewards[0], abs=1e-5)  # score=last
    sparse = scored(policy_dir, reward_dir, rollouts, credit="differences", dense_weight=0.0)[0].token_rewards
    np.testing.assert_allclose(sparse, [0.0] * (len(sparse) - 1) + [rewards[0]], rtol=0, atol=1e-5)


def test_a_rule_over_members_comes_off_the_last_token(policy_dir, reward_dir, rollouts):
    mean, lowest = (scored(policy_dir, reward_dir, rollouts, rule=rule) for rule in ("mean", "min"))
    for plain, robust in zip(mean, lowest, strict=True):
        assert robust.reward < plain.reward - 1e-4
        np.testing.assert_array_equal(robust.token_rewards[:-1], plain.token_rewards[:-1])
        taken = plain.token_rewards[-1] - robust.token_rewards[-1]
        assert taken == pytest.approx(plain.reward - robust.reward, abs=1e-5)


def test_the_report_shows_the_same_rewards_with_their_sigma(policy_dir, reward_dir, rollouts, make_tokenizer):
    reward = make_text_reward(policy_dir, SECTION, directory=reward_dir / "full", options=OPTIONS)
    ended = rollouts[0]
    row = {"prompt_ids": ended.prompt_ids, "chosen_ids": ended.response_ids, "rejected_ids": ended.response_ids[2:]}
    chosen, rejected = token_examples(reward, make_tokenizer(), ["a question"], [row])
    (item,) = scored(policy_dir, reward_dir, [ended])
    np.testing.assert_allclose(chosen.means, item.token_rewards, rtol=0, atol=1e-5)
    assert len(rejected.tokens) == len(rejected.means) == len(ended.response_ids) - 2
    assert min(*chosen.sigmas, *rejected.sigmas) > 0.01  # the floor
