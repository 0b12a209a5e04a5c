"""Members that reward tokens, fitted without Ray: what they learn, what lies on disk, and what is said of them.

Transformers and peft are real, the policy has two layers; chosen responses hold a word that rejected ones lack.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tiny_texts import save_policy, text_pairs

from raylign.config import AvaSection, PolicySection, RewardModelSection, RewardSection, TokenRewardSection, load_config
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.rank_job import scored_beliefs
from raylign.runtime.text_reward_job import FitTask, fit_group
from raylign.runtime.text_reward_phase import floor_warnings, text_key
from raylign.runtime.text_rewards import PairScorer, make_text_reward
from raylign.runtime.token_members import kind_facts

SECTION = RewardModelSection(lora_rank=2, lora_alpha=4, epochs=6, batch_size=8, learning_rate=1e-2, batch_tokens=512)
OPTIONS = ActorOptions(dtype="float32")


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


@pytest.fixture(scope="module")
def table(make_tokenizer: Any) -> pa.Table:
    return text_pairs(make_tokenizer())


def part(table: pa.Table, split: str) -> list:
    return pairs_from_table(table.filter(pc.equal(table["split"], split)))


def fit_here(table: pa.Table, policy_dir: Path, directory: Path, kind: str, **changes: Any) -> list[dict[str, Any]]:
    """All members in this process, and the facts that `fit_members` would write."""
    num_heads = changes.pop("num_heads", 1)
    task = FitTask(
        reward=RewardSection(kind=kind, num_heads=num_heads, head_data="all"),
        reward_model=SECTION.model_copy(update={"epochs": changes.pop("epochs", 6)}),
        policy=PolicySection(dtype="float32"),
        token_reward=TokenRewardSection(score=changes.pop("score", "last")),
        ava=AvaSection(**changes),
        model_path=str(policy_dir),
        output_dir=directory,
        seed=3,
        num_cpus=1,
        num_gpus=0,
    )
    parts = tuple(table.filter(pc.equal(table["split"], split)) for split in ("train", "valid"))
    records = [record for member in range(num_heads) for record in fit_group(parts, task, [member])]
    facts = {"kind": kind, "names": task.names, "scale": None, "shift": None, "seed": 3, **kind_facts(task)}
    (directory / "text_reward.json").write_text(json.dumps(facts))
    return records


def test_members_learn_a_planted_preference_and_state_a_sigma(table, policy_dir, tmp_path):
    records = fit_here(table, policy_dir, tmp_path, "ava_p", num_heads=2)
    reward = make_text_reward(policy_dir, SECTION, directory=tmp_path, options=OPTIONS)
    chosen, rejected = reward.posterior_of_pairs(part(table, "test"))
    assert float((chosen.mean > rejected.mean).double().mean()) > 0.9
    assert chosen.head_scales is not None and chosen.head_scales.shape == (16, 2)
    assert float(chosen.disagreement.min()) > 0
    for record in records:
        assert record["valid_accuracy"] == record["valid_accuracies"]["last"] > 0.9
        assert record["valid_accuracies"]["log_prob"] > 0.9
        assert record["sigma"]["min"] > 0.1 and record["sigma"]["floor_share"] == 0
        first, last = record["terms"][0], record["terms"][-1]
        assert (first["update"], last["update"], len(record["terms"])) == (1, record["num_updates"], 4)
        assert last["terms"]["likelihood"] > first["terms"]["likelihood"]
        assert last["terms"]["cer"] > first["terms"]["cer"]
        assert all(math.isfinite(norm) for term in record["terms"] for norm in term["grad_norms"].values())
        assert 0 < first["td_std"] != last["td_std"] > 0
    assert floor_warnings(records) == []
    (warning,) = floor_warnings([{"sigma": {"floor_share": 0.2}}, {"sigma": {"floor_share": 0.75}}, {}])
    assert "75%" in warning and "ava.td_weight" in warning


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("ava_d", {"score": "log_prob", "epochs": 1}),
        ("ava_p", {"q_from": "q_head", "score": "sum", "terminal": "drop", "cer": "sigmoid", "epochs": 1}),
        (
            "ava_p",
            {"q_from": "probs", "logit_scale": 20.0, "score": "mean", "negative": "raw", "detach_q": True, "epochs": 1},
        ),
        ("ava_p", {"irl_weight": 0.0, "negative": "none", "standardize_td": False, "epochs": 1}),
        ("token_bt", {"score": "last"}),
        ("token_bt", {"score": "sum"}),
    ],
)
def test_every_objective_fits_and_what_is_loaded_says_what_was_fitted(kind, changes, table, policy_dir, tmp_path):
    (record,) = fit_here(table, policy_dir, tmp_path, kind, **changes)
    reward = make_text_reward(policy_dir, SECTION, directory=tmp_path, options=OPTIONS)
    chosen, rejected = reward.posterior_of_pairs(part(table, "valid"))
    torch.testing.assert_close(torch.stack([chosen.mean, rejected.mean]), record["valid_rewards"], rtol=0, atol=1e-5)
    assert (chosen.head_scales is None) == (kind == "token_bt" or changes.get("score") == "log_prob")
    assert ("sigma" in record) == ("terms" in record) == (kind != "token_bt")
    assert ("log_prob" in record["valid_accuracies"]) == (kind != "token_bt")
    assert math.isfinite(record["last_loss"])
    if kind == "token_bt":
        assert record["valid_accuracy"] > 0.9
    files = sorted(path.name for path in (tmp_path / "member0").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "heads.safetensors"]


def test_stored_beliefs_hold_sigma_where_members_state_one(table, policy_dir, tmp_path):
    for kind in ("ava_p", "token_bt"):
        directory = tmp_path / kind
        directory.mkdir()
        fit_here(table, policy_dir, directory, kind, num_heads=2, epochs=1)
        scored = PairScorer(str(policy_dir), SECTION, str(directory), OPTIONS)(table)
        reward = make_text_reward(policy_dir, SECTION, directory=directory, options=OPTIONS)
        for found, expected in zip(
            scored_beliefs(scored), reward.posterior_of_pairs(pairs_from_table(table)), strict=True
        ):
            torch.testing.assert_close(found.head_rewards, expected.head_rewards, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-6)
            assert (found.head_scales is None) == (kind == "token_bt")
            if found.head_scales is not None:
                torch.testing.assert_close(found.head_scales, expected.head_scales, rtol=0, atol=1e-6)


def test_what_the_phase_is_keyed_by(policy_dir):
    def key(*overrides: str) -> dict[str, Any]:
        options = ["reward.kind=ava_p", "reward_model.epochs=2", *overrides]
        return text_key(load_config(None, options), str(policy_dir))

    plain = key()
    assert plain["score"] == "last" and plain["ava"]["td_weight"] == 0.5
    assert key("ava.td_weight=0.4") != plain != key("token_reward.score=sum")
    by_token = ["train.method=policy_gradient", "policy_gradient.credit=token"]
    assert key(*by_token, "token_reward.credit=attention") == key(*by_token) == plain
    assert "ava" not in key("reward.kind=token_bt") and "score" in key("reward.kind=token_bt")
    assert not {"ava", "score"} & set(key("reward.kind=lora_ensemble"))
