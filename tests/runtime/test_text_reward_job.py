"""Fitting members as Ray tasks on a two-layer policy: plain directories, exact merges, and who is left out.

Ray is real, and so are transformers and peft; pairs are made up. Chosen responses hold a word that rejected ones lack.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_texts import save_policy, text_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raylign.config import PolicySection, RewardModelSection, RewardSection
from raylign.errors import CheckpointError, DataError, ModelError, TrainingError
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.merge import weights_hash
from raylign.runtime.execution import execution
from raylign.runtime.features_job import pairs_from_table
from raylign.runtime.text_reward_job import FitTask, _merge, _read_pairs, fit_group, fit_members, wait_for_members
from raylign.runtime.text_rewards import HEAD_REWARD_COLUMNS, PairScorer, make_text_reward, score_dataset

SECTION = RewardModelSection(lora_rank=2, lora_alpha=4, epochs=3, batch_size=8, learning_rate=1e-2, batch_tokens=512)
POLICY = PolicySection(dtype="float32")


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


@pytest.fixture(scope="module")
def table(make_tokenizer: Any) -> pa.Table:
    return text_pairs(make_tokenizer())


def fit(table: pa.Table, policy_dir: Path, output_dir: Path, *, kind: str = "lora_ensemble", **options: Any) -> dict:
    import ray.data

    section = SECTION.model_copy(update=options.pop("section", {}))
    return fit_members(
        ray.data.from_arrow(table),
        reward=RewardSection(kind=kind, num_heads=2, folds=4, **options.pop("reward", {})),
        reward_model=section,
        policy=POLICY,
        model_path=policy_dir,
        output_dir=output_dir,
        seed=3,
        timeout_s=200,
        **options,
    )


@pytest.fixture(scope="module")
def ensemble(table, policy_dir, ray_cluster, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ensemble")
    fit(table, policy_dir, directory, num_cpus=0.5)
    return directory


def part(table: pa.Table, split: str) -> list:
    return pairs_from_table(table.filter(pa.compute.equal(table["split"], split)))


@pytest.mark.ray
@pytest.mark.slow
def test_members_learn_differ_and_share_mean_and_spread_on_validation_pairs(ensemble, table, policy_dir):
    facts = json.loads((ensemble / "text_reward.json").read_text())
    assert (facts["num_train_pairs"], facts["num_valid_pairs"], facts["names"]) == (48, 16, ["member0", "member1"])
    assert [record["member"] for record in facts["members"]] == [0, 1]
    assert min(record["valid_accuracy"] for record in facts["members"]) > 0.9
    reward = make_text_reward(policy_dir, SECTION, directory=ensemble)
    chosen, rejected = reward.posterior_of_pairs(part(table, "valid"))
    both = torch.cat([chosen.head_rewards, rejected.head_rewards])
    torch.testing.assert_close(both[:, 0].mean(), both[:, 1].mean(), rtol=0, atol=1e-4)
    torch.testing.assert_close(both[:, 0].std(), both[:, 1].std(), rtol=0, atol=1e-4)
    assert float(chosen.disagreement.min()) > 0
    chosen, rejected = reward.posterior_of_pairs(part(table, "test"))
    assert float((chosen.mean > rejected.mean).double().mean()) > 0.9


@pytest.mark.ray
@pytest.mark.slow
def test_each_member_directory_is_a_plain_adapter(ensemble, table, policy_dir):
    from peft import PeftModel

    facts = json.loads((ensemble / "text_reward.json").read_text())
    pair = part(table, "test")[0]
    ids = torch.tensor([[*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()]])
    expected = make_text_reward(policy_dir, SECTION, directory=ensemble).posterior_of_pairs([pair])[0]
    for member in range(2):
        base = AutoModelForSequenceClassification.from_pretrained(policy_dir, num_labels=1, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            plain = PeftModel.from_pretrained(base, ensemble / f"member{member}").eval()
        with torch.no_grad():
            output = float(plain(ids).logits[0, 0])
        found = output * facts["scale"][member] + facts["shift"][member]
        assert found == pytest.approx(float(expected.head_rewards[0, member]), abs=1e-5)
    assert sorted(path.name for path in ensemble.iterdir()) == ["member0", "member1", "text_reward.json"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_pool_adds_the_rewards_of_the_plain_path(ensemble, table, policy_dir):
    import ray.data

    plain = PairScorer(str(policy_dir), SECTION, str(ensemble), _options())(table)
    dataset = score_dataset(
        ray.data.from_arrow([table.slice(0, 30), table.slice(30)]),
        model_path=policy_dir,
        reward_model=SECTION,
        directory=ensemble,
        options=_options(num_cpus=0.5),
    )
    with execution(dataset):
        rows = pa.concat_tables(dataset.iter_batches(batch_format="pyarrow", batch_size=None)).sort_by("row_id")
    for name in HEAD_REWARD_COLUMNS:
        assert plain[name].type == pa.list_(pa.float32())
        found, expected = (np.array(t[name].to_pylist()) for t in (rows, plain))
        assert found.shape == (80, 2)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert rows["row_id"].to_pylist() == table["row_id"].to_pylist()


@pytest.mark.ray
def test_the_error_of_a_member_reaches_the_caller_as_itself(table, ray_cluster, tmp_path):
    with pytest.raises(ModelError, match="no tokenizer"):
        fit(table, tmp_path, tmp_path / "out", num_cpus=0.5)
    with pytest.raises(CheckpointError, match="no finished reward model"):
        make_text_reward(tmp_path, SECTION, directory=tmp_path / "out")


@pytest.mark.ray
@pytest.mark.slow
def test_averaged_members_that_train_in_one_task_become_one_reward(table, policy_dir, ray_cluster, tmp_path):
    facts = fit(table, policy_dir, tmp_path, kind="warm", section={"diversity_weight": 0.01}, num_cpus=0.5)
    assert facts["merged_valid_accuracy"] > 0.9 and facts["scale"] is None
    assert facts["members"][0]["start_hash"] == facts["members"][1]["start_hash"]
    reward = make_text_reward(policy_dir, SECTION, directory=tmp_path)
    chosen, rejected = reward.posterior_of_pairs(part(table, "test"))
    assert reward.num_heads == 1
    assert float((chosen.mean > rejected.mean).double().mean()) > 0.9


@pytest.mark.ray
def test_a_member_that_never_finishes_ends_the_wait(ray_cluster):
    import ray

    endless = ray.remote(lambda: time.sleep(600)).options(num_cpus=0.1, max_retries=0).remote()
    with pytest.raises(TrainingError, match=r"within 0.5 s, 1 are left"):
        wait_for_members([endless], 0.5)
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.WorkerCrashedError)):
        ray.get(endless, timeout=60)


@pytest.mark.ray
def test_folds_are_left_out_by_prompt(table, ray_cluster):
    import ray.data

    reward = RewardSection(kind="lora_ensemble", folds=4)
    dataset = ray.data.from_arrow(table)
    whole, valid = _read_pairs(dataset, reward, 3, [])
    parts = [_read_pairs(dataset, reward, 3, [fold])[0] for fold in range(4)]
    folds = grouped_folds(whole["prompt_key"].to_pylist(), 4, 3).tolist()
    ids = whole["row_id"].to_pylist()
    for fold, kept in enumerate(parts):
        assert kept["row_id"].to_pylist() == [i for i, f in zip(ids, folds, strict=True) if f != fold]
    assert set(whole["split"].to_pylist()) == {"train"} and set(valid["split"].to_pylist()) == {"valid"}
    with pytest.raises(DataError, match="no train pair"):
        _read_pairs(dataset, reward, 3, [0, 1, 2, 3])
    few, _ = _read_pairs(dataset, reward.model_copy(update={"max_pairs": 9}), 3, [])
    assert few["row_id"].to_pylist() == ids[:9]


def _options(**changes: Any) -> Any:
    from raylign.runtime.evaluators import ActorOptions

    return ActorOptions(dtype="float32", **changes)


def fit_here(table: pa.Table, policy_dir: Path, directory: Path, kind: str) -> tuple[FitTask, tuple, list[dict]]:
    """Both members in this process, without Ray."""
    parts = tuple(table.filter(pa.compute.equal(table["split"], split)) for split in ("train", "valid"))
    task = FitTask(
        reward=RewardSection(kind=kind, num_heads=2),
        reward_model=SECTION,
        policy=POLICY,
        model_path=str(policy_dir),
        output_dir=directory,
        seed=3,
        num_cpus=1,
        num_gpus=0,
    )
    records = [record for member in range(2) for record in fit_group(parts, task, [member])]
    return task, parts, records


def test_merged_members_are_a_plain_classifier_of_their_mean_weights(table, policy_dir, tmp_path):
    from peft import PeftModel

    task, parts, records = fit_here(table, policy_dir, tmp_path, "warm")
    hashes = [record["start_hash"] for record in records]
    assert hashes[0] == hashes[1]
    merged_rewards = _merge(parts, task, hashes)
    assert float((merged_rewards[0] > merged_rewards[1]).double().mean()) > 0.9

    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    wholes = []
    for member in range(2):
        base = AutoModelForSequenceClassification.from_pretrained(policy_dir, num_labels=1, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            model = PeftModel.from_pretrained(base, tmp_path / f"member{member}")
        wholes.append(model.merge_and_unload().state_dict())
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, (wholes[0][name] + wholes[1][name]) / 2, rtol=0, atol=1e-6)
    moved = [name for name in wholes[0] if not torch.equal(wholes[0][name], wholes[1][name])]
    assert "score.weight" in moved and len(moved) == 15
    assert weights_hash(wholes[0]) not in hashes

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.pad_token_id == merged.config.pad_token_id == 0
    pair = pairs_from_table(parts[1])[0]
    ids = torch.tensor([[*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()]])
    assert float(merged(ids).logits.detach()[0, 0]) == pytest.approx(float(merged_rewards[0, 0]), abs=1e-5)
    (tmp_path / "text_reward.json").write_text(
        json.dumps({"kind": "warm", "names": ["member0", "member1"], "scale": None, "shift": None, "seed": 3})
    )
    belief = make_text_reward(policy_dir, SECTION, directory=tmp_path).posterior([pair.prompt_ids], [pair.chosen_ids])
    assert belief.num_heads == 1 and float(belief.mean[0]) == pytest.approx(float(merged_rewards[0, 0]), abs=1e-5)
    with pytest.raises(DataError) as error:
        _merge(parts, task, [hashes[0], "f00d"])
    assert hashes[0] in str(error.value) and "f00d" in str(error.value)


def test_members_of_an_ensemble_start_at_their_own_heads_and_fits_repeat_to_the_bit(table, policy_dir, tmp_path):
    _, _, first = fit_here(table, policy_dir, tmp_path / "first", "lora_ensemble")
    _, _, again = fit_here(table, policy_dir, tmp_path / "again", "lora_ensemble")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one["valid_rewards"], other["valid_rewards"])
        assert one["start_hash"] is None
    assert not torch.equal(first[0]["valid_rewards"], first[1]["valid_rewards"])


def test_members_of_one_task_are_those_of_their_own_tasks_unless_diversity_couples_them(table, policy_dir, tmp_path):
    task, parts, alone = fit_here(table, policy_dir, tmp_path, "lora_ensemble")
    together = fit_group(parts, task, [0, 1])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one["valid_rewards"], other["valid_rewards"])
    pull = SECTION.model_copy(update={"diversity_weight": 1.0})
    coupled = fit_group(parts, replace(task, reward_model=pull), [0, 1])
    assert not torch.equal(coupled[0]["valid_rewards"], together[0]["valid_rewards"])


def test_an_external_classifier_of_the_policys_tokenizer_reads_its_ids(table, policy_dir, tmp_path):
    external = Path(shutil.copytree(policy_dir, tmp_path / "external"))
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSequenceClassification.from_pretrained(
            policy_dir, num_labels=2, id2label={0: "bad", 1: "good"}, dtype=torch.float32
        ).eval()
    model.save_pretrained(external)
    pair = part(table, "test")[0]
    ids = torch.tensor([[*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()]])
    with torch.no_grad():
        expected = model(ids).logits[0]
    for label, sign, column in (("good", 1, 1), ("bad", -1, 0)):
        section = RewardModelSection(model=str(external), label=label, is_cost=sign < 0)
        reward = make_text_reward(policy_dir, section, options=_options())
        belief = reward.posterior([pair.prompt_ids], [pair.chosen_ids])
        assert float(belief.mean[0]) == pytest.approx(sign * float(expected[column]), abs=1e-5)
        assert float(belief.variance[0]) == 0
    with pytest.raises(ModelError, match=r"\['bad', 'good'\]"):
        make_text_reward(policy_dir, RewardModelSection(model=str(external)), options=_options())
