"""The reward phase of texts: who scores whom, what is written, and what ranking and online scoring read of it.

Ray, transformers and peft are real; the policy has two layers, and states and texts are made up.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import pytest
import torch
from tiny_texts import save_policy, text_pairs

from raylign.config import ConfidenceSection, RewardModelSection, RunConfig, load_config
from raylign.cost.ledger import Ledger
from raylign.cost.rows import read_ledger
from raylign.data.states import states_to_column
from raylign.errors import CheckpointError, DataError
from raylign.rewards.cross_fit import grouped_folds
from raylign.runtime import text_reward_phase
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.fitted_reward import FULL, FittedReward, FittedTexts, load_reward
from raylign.runtime.rank_job import rank_table
from raylign.runtime.reward_job import anchor_warnings
from raylign.runtime.reward_scorer import load_response_reward
from raylign.runtime.text_reward_phase import SCORED_DIR, fit_text_reward
from raylign.runtime.text_rewards import HEAD_REWARD_COLUMNS, REWARD_FILE, make_text_reward

OPTIONS = ActorOptions(num_cpus=0.5, dtype="float32")


def config_of(**reward: Any) -> RunConfig:
    model = {"lora_rank": 2, "lora_alpha": 4, "epochs": 2, "batch_size": 8, "learning_rate": 1e-2}
    return load_config(
        values={
            "reward": {"kind": "lora_ensemble", "num_heads": 2, "folds": 2, **reward},
            "reward_model": {**model, "batch_tokens": 512},
            "policy": {"dtype": "float32"},
            "run": {"seed": 3},
        }
    )


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer()))


@pytest.fixture(scope="module")
def table(make_tokenizer: Any) -> pa.Table:
    pairs, rng = text_pairs(make_tokenizer()), np.random.default_rng(1)
    for name in ("chosen_states", "rejected_states"):
        pairs = pairs.append_column(name, states_to_column(rng.normal(size=(len(pairs), 2, 16)).astype(np.float16)))
    return pairs


@pytest.fixture(scope="module")
def directory(table, policy_dir, ray_cluster, tmp_path_factory) -> Path:
    """Of a finished phase with two folds."""
    import ray.data

    directory = tmp_path_factory.mktemp("reward")
    ledger = Ledger(directory / LEDGER_DIR)
    with ledger.measure("reward", devices={"cpu": 1}):
        fitted = fit_text_reward(
            ray.data.from_arrow(table),
            config=config_of(),
            model_path=policy_dir,
            directory=directory,
            options=replace(OPTIONS, ledger=ledger.below()),
        )
    fitted.save(directory)
    return directory


@pytest.fixture(scope="module")
def scored(directory) -> pa.Table:
    return pa.dataset.dataset(directory / SCORED_DIR).to_table().sort_by("row_id")


@pytest.mark.ray
@pytest.mark.slow
def test_every_pair_is_scored_once_by_members_that_did_not_see_its_prompt(directory, scored, table, policy_dir):
    assert scored["row_id"].to_pylist() == table["row_id"].to_pylist()
    folds = grouped_folds(table["prompt_key"].to_pylist(), 2, 3).tolist()
    expected = [
        fold if split == "train" else FULL for fold, split in zip(folds, table["split"].to_pylist(), strict=True)
    ]
    assert scored["fold"].to_pylist() == expected
    assert {0, 1, FULL} == set(expected)
    for fold, name in ((0, "fold0"), (1, "fold1"), (FULL, "full")):
        rows = np.flatnonzero(np.array(expected) == fold)
        reward = make_text_reward(policy_dir, config_of().reward_model, directory=directory / name, options=OPTIONS)
        beliefs = reward.posterior_of_pairs(pairs_from_table(table.take(rows)))
        for column, belief in zip(HEAD_REWARD_COLUMNS, beliefs, strict=True):
            found = np.stack(scored[column].to_numpy()[rows])
            np.testing.assert_allclose(found, belief.head_rewards.numpy(), rtol=0, atol=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_fits_and_scores_are_charged_with_what_they_reserve(directory):
    outer, *rows = read_ledger(directory / LEDGER_DIR)
    assert [outer.phase, {row.parent for row in rows}] == ["reward", {outer.id}]
    fits = [row for row in rows if row.phase == "fit_reward"]
    assert [row.devices for row in fits] == [{"cpu": 0.5}] * 3 * 2  # members of the fits of all pairs and of two folds
    assert all(row.cost.wall_s > 0.1 and row.is_finished for row in fits)
    scores = [row for row in rows if row.phase == "score_pairs"]
    assert [row.devices for row in scores] == [{"cpu": 1.5}] * 3
    assert len(rows) == 9


@pytest.mark.ray
@pytest.mark.slow
def test_what_is_saved_is_read_back_and_is_no_head_on_states(directory):
    fitted = load_reward(directory)
    assert isinstance(fitted, FittedTexts)
    assert (fitted.kind, fitted.members, len(fitted.centers)) == ("lora_ensemble", directory / "full", 2)
    assert fitted.metrics["out_of_fold_accuracy"] > 0.7
    assert fitted.metrics["test_disagreement"] > 0
    assert [record["position"] for record in fitted.metrics["layers"]] == [0, 1]
    assert fitted.metrics["warnings"] == []
    members = fitted.metrics["members"]
    assert [(record["fold"], record["member"]) for record in members] == [
        (fold, member) for fold in (None, 0, 1) for member in (0, 1)
    ]
    assert all(record["valid_accuracy"] > 0.7 and record["last_loss"] > 0 for record in members)
    with pytest.raises(CheckpointError, match="reward of texts"):
        FittedReward.load(directory)


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_call_fits_only_what_the_first_did_not_finish(directory, table, policy_dir, tmp_path, monkeypatch):
    import ray.data

    shutil.copytree(directory, tmp_path / "reward")
    (tmp_path / "reward" / "fold1" / REWARD_FILE).unlink()
    fitted_to = []

    def fit(*args: Any, output_dir: Path, **options: Any) -> Any:
        fitted_to.append((output_dir.name, options["excluded_folds"]))
        shutil.copy(directory / "fold1" / REWARD_FILE, output_dir)

    monkeypatch.setattr(text_reward_phase, "fit_members", fit)
    again = fit_text_reward(
        ray.data.from_arrow(table),
        config=config_of(),
        model_path=policy_dir,
        directory=tmp_path / "reward",
        options=OPTIONS,
    )
    assert fitted_to == [("fold1", [1])]
    assert again.metrics["members"] == load_reward(directory).metrics["members"]
    assert again.metrics["temperature"] == pytest.approx(load_reward(directory).metrics["temperature"], rel=1e-3)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "message"),
    [("valid", "no pair in the 'valid' split"), ("test", "no pair in the 'test' split"), ("fold", "fall into fold")],
)
def test_what_is_missing_is_said_before_anything_is_fitted(change, message, table, tmp_path, ray_cluster, monkeypatch):
    import ray.data

    def fit(*args: Any, **options: Any) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr(text_reward_phase, "fit_members", fit)
    if change == "fold":
        keys = pa.array(["same"] * len(table))
        left = table.set_column(table.column_names.index("prompt_key"), "prompt_key", keys)
    else:
        left = table.filter(pa.compute.not_equal(table["split"], change))
    with pytest.raises(DataError, match=message):
        fit_text_reward(
            ray.data.from_arrow(left), config=config_of(), model_path="none", directory=tmp_path, options=OPTIONS
        )


def test_members_without_a_common_zero_are_warned_of():
    rewards = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert anchor_warnings(rewards) == anchor_warnings(rewards[:, :1]) == []
    (warning,) = anchor_warnings(rewards + torch.tensor([0.0, 2.0, 4.0]))
    assert "1.6" in warning and "reward.standardize" in warning


@pytest.mark.ray
@pytest.mark.slow
def test_ranking_reads_the_scores_and_keeps_what_training_needs(directory, scored):
    ranked = rank_table(scored, shared=(load_reward(directory), ConfidenceSection()))
    chosen, rejected = (np.stack(scored[name].to_numpy()) for name in HEAD_REWARD_COLUMNS)
    np.testing.assert_allclose(ranked["margin_mean"], (chosen - rejected).mean(1), atol=1e-5)
    np.testing.assert_allclose(ranked["margin_variance"], (chosen - rejected).var(1), atol=1e-5)
    gamma = ranked["label_confidence"].to_numpy()
    assert ((gamma > 0.5) == (ranked["margin_mean"].to_numpy() > 0)).all()
    assert not set(HEAD_REWARD_COLUMNS) & set(ranked.column_names)
    assert {"prompt_ids", "chosen_ids", "rejected_ids", "fold", "weight"} <= set(ranked.column_names)


@pytest.mark.ray
@pytest.mark.slow
def test_new_responses_are_scored_by_what_was_fitted_to_all_pairs(directory, table, policy_dir):
    section = config_of().reward_model
    reward = load_response_reward(policy_dir, str(directory), (1, 2), "cpu", reward_model=section, options=OPTIONS)
    assert reward.layers is None
    pairs = pairs_from_table(table.slice(0, 6))
    found = reward([pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs], None)
    whole = make_text_reward(policy_dir, section, directory=directory / "full", options=OPTIONS)
    torch.testing.assert_close(found.head_rewards, whole.posterior_of_pairs(pairs)[0].head_rewards, rtol=0, atol=1e-4)


@pytest.mark.ray
@pytest.mark.slow
def test_an_external_classifier_scores_all_pairs_without_folds(directory, table, policy_dir, tmp_path):
    """A member that was merged by hand stands for a classifier of somebody else."""
    import ray.data
    from transformers import AutoTokenizer

    from raylign.models.classifiers import load_classifier, load_members

    base = load_classifier(policy_dir, pad_token_id=0, seed=3)
    merged = load_members(base, [directory / "full" / "member0"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(policy_dir).save_pretrained(tmp_path / "model")
    config = load_config(
        values={
            "reward": {"kind": "external"},
            "reward_model": RewardModelSection(model=str(tmp_path / "model")).model_dump(include={"model"}),
            "policy": {"dtype": "float32"},
        }
    )
    fitted = fit_text_reward(
        ray.data.from_arrow(table), config=config, model_path=policy_dir, directory=tmp_path, options=OPTIONS
    )
    assert fitted.members is None and "members" not in fitted.metrics
    assert fitted.metrics["out_of_fold_accuracy"] > 0.7
    scored = pa.dataset.dataset(tmp_path / SCORED_DIR).to_table()
    assert set(scored["fold"].to_pylist()) == {FULL}
    assert rank_table(scored, shared=(fitted, ConfidenceSection())).num_rows == len(table)
