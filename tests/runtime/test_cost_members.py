"""Fine-tuned members of a cost model: who is fitted to what, and who prices which pair.

The policy has two layers, pairs are made up: chosen answers say no and are safe, rejected ones say yes and are unsafe.
Ray is real where a test is marked so.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tiny_texts import save_policy, text_pairs

from raylign.config import RunConfig, load_config
from raylign.cost.ledger import Ledger
from raylign.cost.rows import read_ledger
from raylign.errors import DataError, ModelError, TrainingError
from raylign.rewards.cross_fit import grouped_folds
from raylign.runtime.cost_job import cost_key, priced_facts, run_cost
from raylign.runtime.cost_members import MemberTask, fit_cost_members, fit_directory, fit_member, member_facts
from raylign.runtime.cost_scorer import load_response_cost
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_cost import COST_COLUMNS, HEAD_COST_COLUMNS, FittedCost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.price_job import PairPricer, of_fold, read_priced

OPTIONS = ActorOptions(dtype="float32")
SEED, FOLDS = 3, 2


def config_of(*overrides: str) -> RunConfig:
    fixed = ["cost_model.source=fine_tuned", f"run.seed={SEED}", f"cost_model.folds={FOLDS}", "policy.dtype=float32"]
    steps = ["cost_model.lora_rank=2", "cost_model.lora_alpha=4", "cost_model.epochs=6", "cost_model.batch_size=8"]
    return load_config(
        None, [*fixed, *steps, "cost_model.learning_rate=0.01", "cost_model.batch_tokens=512", *overrides]
    )


@pytest.fixture(scope="module")
def policy_dir(make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), make_tokenizer())


@pytest.fixture(scope="module")
def table(make_tokenizer: Any) -> pa.Table:
    """Every tenth pair lacks one verdict, every eleventh both."""
    table = text_pairs(make_tokenizer())
    known = [index % 11 != 5 for index in range(len(table))]
    chosen = [True if known[index] and index % 10 != 3 else None for index in range(len(table))]
    table = table.append_column("chosen_safe", pa.array(chosen, pa.bool_()))
    table = table.append_column("rejected_safe", pa.array([False if k else None for k in known], pa.bool_()))
    return table


def split_of(table: pa.Table, split: str) -> pa.Table:
    table = table.filter(pc.and_(pc.equal(table["split"], split), pc.is_valid(table["rejected_safe"])))
    return table.sort_by([("prompt_key", "ascending"), ("row_id", "ascending")])


@pytest.fixture(scope="module")
def fitted(table, policy_dir, tmp_path_factory) -> tuple[FittedCost, Path]:
    """Two members of every fit, without Ray."""
    directory, config = tmp_path_factory.mktemp("cost"), config_of("cost_model.num_heads=2")
    for fold in (FULL, *range(FOLDS)):
        for member in (0, 1):
            task = MemberTask(
                cost_model=config.cost_model,
                policy=config.policy,
                model_path=str(policy_dir),
                output_dir=fit_directory(directory, fold),
                fold=fold,
                member=member,
                seed=SEED,
                num_cpus=1,
                num_gpus=0,
            )
            fit_member((split_of(table, "train"), split_of(table, "valid")), task)
    found = FittedCost(
        source="fine_tuned", members=("member0", "member1"), num_folds=FOLDS, fold_seed=SEED, model="fingerprint"
    )
    found.save(directory)
    return found, directory


def priced(fitted: tuple[FittedCost, Path], table: pa.Table, policy_dir: Path) -> pa.Table:
    """What the pools write, one part per fold."""
    config = config_of()
    parts = []
    for fold in (FULL, *range(FOLDS)):
        own = of_fold(table, fold=fold, num_folds=FOLDS, seed=SEED)
        pricer = PairPricer(str(policy_dir), fitted[0], str(fitted[1]), config.cost_model, OPTIONS, fold)
        parts.append(pricer(own))
    return pa.concat_tables(parts).sort_by("row_id")


def test_what_was_saved_comes_back(fitted):
    assert FittedCost.load(fitted[1]) == fitted[0]


def test_members_are_fitted_to_labelled_pairs_of_the_other_folds(fitted, table):
    facts = member_facts(fitted[1], fitted[0])
    train = split_of(table, "train")
    folds = grouped_folds(train["prompt_key"].to_pylist(), FOLDS, SEED).tolist()
    assert [(one["fold"], one["member"]) for one in facts] == [(f, m) for f in (None, 0, 1) for m in (0, 1)]
    for one in facts:
        assert one["num_pairs"] == len(train) - folds.count(one["fold"])
        assert one["valid_accuracy"] > 0.8


def test_training_pairs_are_priced_by_members_that_did_not_see_their_prompt(fitted, table, policy_dir):
    found = priced(fitted, table, policy_dir)
    assert found["row_id"].to_pylist() == sorted(table["row_id"].to_pylist())  # each pair once
    folds = grouped_folds(found["prompt_key"].to_pylist(), FOLDS, SEED).tolist()
    expected = [own if split == "train" else FULL for own, split in zip(folds, found["split"].to_pylist(), strict=True)]
    assert found["fold"].to_pylist() == expected
    members = np.stack(found[HEAD_COST_COLUMNS[0]].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(members.mean(1), found[COST_COLUMNS[0]].to_numpy(), atol=1e-6)
    facts = priced_facts(found, num_folds=FOLDS)
    for name in ("held_out", "out_of_fold"):
        assert facts[name].auc.mean > 0.95  # cost > 0 is unsafe, whatever the sign inside
        assert facts[name].accuracy > 0.85
    assert facts["num_unlabelled_pairs"] == len(table) - int(pc.sum(pc.is_valid(table["rejected_safe"])).as_py())


def test_sampled_responses_are_priced_by_the_members_of_all_pairs(fitted, table, policy_dir):
    found = priced(fitted, table, policy_dir)
    price = load_response_cost(
        str(policy_dir), str(fitted[1]), "cpu", cost_model=config_of().cost_model, options=OPTIONS
    )
    assert price.layers is None
    rows = [row for row in table.sort_by("row_id").to_pylist() if row["split"] == "test"]
    costs = price([row["prompt_ids"] for row in rows], [row["rejected_ids"] for row in rows], None)
    stored = found.filter(pc.equal(found["split"], "test"))["rejected_cost"].to_numpy()
    torch.testing.assert_close(costs, torch.from_numpy(stored.copy()), atol=1e-4, rtol=0)
    assert float((costs > 0).double().mean()) > 0.85


def test_a_missing_member_is_named(fitted, policy_dir, tmp_path):
    FittedCost.load(fitted[1]).save(tmp_path)
    with pytest.raises(ModelError, match=r"full/member0 holds no adapter_model\.safetensors"):
        load_response_cost(str(policy_dir), str(tmp_path), "cpu", cost_model=config_of().cost_model, options=OPTIONS)


def test_keys_of_members_count_for_members_alone(policy_dir):
    def key(*overrides: str) -> dict[str, Any]:
        return dict(cost_key(load_config(None, overrides), model_path=str(policy_dir), features_digest="f"))

    assert "lora_rank" not in key("cost_model.source=labels")["cost_model"]
    tuned = ["cost_model.source=fine_tuned"]
    assert key(*tuned)["cost_model"]["lora_rank"] == 8
    assert key(*tuned) != key(*tuned, "cost_model.lora_alpha=32")
    assert key(*tuned) == key(*tuned, "cost_model.batch_tokens=64")


def test_a_classifier_with_another_tokenizer_prices_anew(policy_dir, tmp_path):
    external = Path(shutil.copytree(policy_dir, tmp_path / "classifier"))
    overrides = ["cost_model.source=external", f"cost_model.model={external}"]

    def key() -> dict[str, Any]:
        return dict(cost_key(load_config(None, overrides), model_path=str(policy_dir), features_digest="f"))

    before = key()
    assert key() == before
    (external / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert key() != before


@pytest.mark.ray
def test_the_phase_fits_each_member_once_and_prices_every_pair(ray_cluster, table, policy_dir, tmp_path, monkeypatch):
    import ray.data

    from raylign.runtime import cost_job

    # a two-layer policy of random weights knows nothing of the answers of no run
    monkeypatch.setattr(cost_job, "known_answers", lambda *args, **options: cost_job.cost_quality(np.zeros(2), [0, 1]))
    states = pa.array([np.zeros(1, np.float32)] * len(table))
    rows = ray.data.from_arrow(table.append_column("chosen_states", states).append_column("rejected_states", states))
    ledger = Ledger(tmp_path / "ledger")
    options = replace(OPTIONS, ledger=ledger)
    settings = {"layers": (1,), "model_path": str(policy_dir), "directory": tmp_path, "options": options}
    facts = run_cost(rows, config=config_of("cost_model.epochs=4"), **settings)
    spent = [(row.phase, row.devices) for row in read_ledger(ledger.directory)]
    assert sorted(spent, key=str) == [("fit_cost", {"cpu": 1})] * 3 + [("price_pairs", {"cpu": 2})] * 3
    assert [one["fold"] for one in facts["members"]] == [None, 0, 1]
    assert facts["held_out"]["auc"]["mean"] > 0.95 and facts["out_of_fold"]["accuracy"] > 0.85
    assert len(read_priced(tmp_path)) == len(table)
    assert not list(tmp_path.rglob(".member*"))
    # what an interrupted call finished is kept
    stamp = json.loads((tmp_path / "fold0" / "member0.json").read_text())
    (tmp_path / "fold1" / "member0.json").unlink()
    again = run_cost(rows, config=config_of("cost_model.epochs=4"), **settings)
    assert json.loads((tmp_path / "fold0" / "member0.json").read_text()) == stamp
    assert again["members"][1] == facts["members"][1] and again["members"][2] != facts["members"][2]
    assert again["held_out"]["auc"] == facts["held_out"]["auc"]
    # verdicts of the held-out pairs against those of the fit
    swapped = pc.if_else(pc.equal(table["split"], "test"), pc.invert(table["chosen_safe"]), table["chosen_safe"])
    other = pc.if_else(pc.equal(table["split"], "test"), pc.invert(table["rejected_safe"]), table["rejected_safe"])
    place = table.column_names.index
    wrong = table.set_column(place("chosen_safe"), "chosen_safe", swapped)
    wrong = wrong.set_column(place("rejected_safe"), "rejected_safe", other)
    rows = ray.data.from_arrow(wrong.append_column("chosen_states", states).append_column("rejected_states", states))
    with pytest.raises(ModelError, match=r"cost_model\.source=fine_tuned\) has its sign flipped.*\(held_out\)"):
        run_cost(rows, config=config_of("cost_model.epochs=4"), **settings)


@pytest.mark.ray
def test_verdicts_that_nothing_can_be_fitted_to_are_refused(ray_cluster, table, policy_dir, tmp_path):
    import ray.data

    def fit(rows: pa.Table) -> FittedCost:
        return fit_cost_members(
            ray.data.from_arrow(rows),
            config=config_of(),
            model_path=str(policy_dir),
            model="f",
            directory=tmp_path,
            options=OPTIONS,
        )

    with pytest.raises(DataError, match="'valid' split"):
        fit(table.filter(pc.not_equal(table["split"], "valid")))
    unsafe = table.set_column(table.column_names.index("chosen_safe"), "chosen_safe", table["rejected_safe"])
    with pytest.raises(DataError, match="answers with a verdict are unsafe"):
        fit(unsafe)


@pytest.mark.ray
def test_a_member_that_finds_no_room_is_not_waited_for_without_end(ray_cluster, table, policy_dir, tmp_path):
    import ray.data

    with pytest.raises(TrainingError, match=r"no member finished within 0.2 s, 3 are left"):
        fit_cost_members(
            ray.data.from_arrow(table),
            config=config_of(),
            model_path=str(policy_dir),
            model="f",
            directory=tmp_path,
            options=replace(OPTIONS, num_cpus=64),
            timeout_s=0.2,
        )
