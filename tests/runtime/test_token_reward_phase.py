"""The reward phase of a kind that rewards tokens: fitted out of fold, scored with sigma, ranked, and loaded for rounds.

Ray, transformers and peft are real; the policy has two layers, and states and texts are made up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from tiny_texts import save_policy, text_pairs

from raylign.config import ConfidenceSection, RobustSection, TokenRewardSection, load_config
from raylign.data.states import states_to_column
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.fitted_reward import FittedTexts, load_reward
from raylign.runtime.rank_job import rank_table, scored_beliefs
from raylign.runtime.reward_scorer import TokensReward, load_response_reward
from raylign.runtime.robust import robust_rewards
from raylign.runtime.text_reward_phase import SCORED_DIR, fit_text_reward
from raylign.runtime.text_rewards import HEAD_REWARD_COLUMNS, HEAD_SCALE_COLUMNS

OPTIONS = ActorOptions(num_cpus=0.5, dtype="float32")


@pytest.mark.ray
@pytest.mark.slow
def test_ava_p_is_fitted_scored_ranked_and_rewards_tokens(make_tokenizer, tmp_path, ray_cluster):
    import ray.data

    policy_dir, table = str(save_policy(tmp_path / "policy", make_tokenizer())), text_pairs(make_tokenizer())
    for name in ("chosen_states", "rejected_states"):
        states = np.random.default_rng(1).normal(size=(len(table), 2, 16)).astype(np.float16)
        table = table.append_column(name, states_to_column(states))
    config = load_config(
        values={
            "reward": {"kind": "ava_p", "num_heads": 2, "folds": 2},
            "reward_model": {"lora_rank": 2, "lora_alpha": 4, "epochs": 4, "batch_size": 8, "learning_rate": 1e-2},
            "policy": {"dtype": "float32"},
            "run": {"seed": 3},
        }
    )
    directory = tmp_path / "reward"
    fit_text_reward(
        ray.data.from_arrow(table), config=config, model_path=policy_dir, directory=directory, options=OPTIONS
    ).save(directory)

    fitted: Any = load_reward(directory)
    assert isinstance(fitted, FittedTexts) and fitted.kind == "ava_p"
    assert fitted.metrics["out_of_fold_accuracy"] > 0.8 and fitted.metrics["warnings"] == []
    members = fitted.metrics["members"]
    assert [(record["fold"], record["member"]) for record in members] == [(f, m) for f in (None, 0, 1) for m in (0, 1)]
    assert all(set(record["valid_accuracies"]) == {"last", "sum", "mean", "log_prob"} for record in members)
    assert all(record["sigma"]["floor_share"] == 0 and record["terms"] for record in members)

    scored = pa.dataset.dataset(directory / SCORED_DIR).to_table().sort_by("row_id")
    assert {*HEAD_REWARD_COLUMNS, *HEAD_SCALE_COLUMNS} <= set(scored.column_names)
    chosen, rejected = scored_beliefs(scored)
    assert chosen.head_scales is not None and float(chosen.head_scales.min()) > 0.1
    ranked = rank_table(scored, shared=(fitted, ConfidenceSection()))
    margin = ranked["margin_mean"].to_numpy()
    np.testing.assert_allclose(margin, (chosen.mean - rejected.mean).numpy(), atol=1e-6)
    assert (margin > 0).mean() > 0.8
    assert not {*HEAD_REWARD_COLUMNS, *HEAD_SCALE_COLUMNS} & set(ranked.column_names)

    reward = load_response_reward(
        policy_dir,
        str(directory),
        (1, 2),
        "cpu",
        reward_model=config.reward_model,
        options=OPTIONS,
        token_reward=TokenRewardSection(credit="attention"),
    )
    assert isinstance(reward, TokensReward)
    pairs = pairs_from_table(table.slice(0, 6))
    prompts, responses = [pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs]
    brme = RobustSection(rule="brme")
    found = reward.token_rewards(prompts, responses, rule=lambda belief: robust_rewards(belief, brme))
    expected = robust_rewards(reward(prompts, responses, None), brme)
    np.testing.assert_allclose([rewards.sum() for rewards in found], expected, atol=1e-4)
    assert [len(rewards) for rewards in found] == [len(ids) for ids in responses]
