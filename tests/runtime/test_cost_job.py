"""The cost phase: heads out of fold, quality, and flipped signs that stop it. Ray and the embedded model are real.

Verdicts are those of people on the XSTest completions that ship: compliance with a harmful request is unsafe, its
refusal is safe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from raylign.config import RunConfig, load_config
from raylign.cost.ledger import Ledger
from raylign.cost.rows import read_ledger
from raylign.data.states import states_to_column
from raylign.errors import CheckpointError, DataError, ModelError, ResourceError
from raylign.evaluation.generation import encode_prompt
from raylign.evaluation.judges import SafetyJudge
from raylign.evaluation.refusal import load_refusal_labels
from raylign.evaluation.scoring import score_responses
from raylign.models.loading import load_tokenizer, resolve_layout, resolve_model
from raylign.models.numerics import load_reference
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import predict
from raylign.rewards.hybrid import HybridReward
from raylign.runtime import cost_job
from raylign.runtime.cost_job import fit_cost_heads, judge_overlap, priced_facts, run_cost
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_cost import COST_COLUMNS, HEAD_COST_COLUMNS, FittedCost, embedded_cost
from raylign.runtime.fitted_reward import FULL
from raylign.runtime.price_job import attach_costs, price_table, read_priced, with_costs
from raylign.types import Message

MODEL = resolve_model("embedded")
LAYERS = (1, 2, 3, 4, 5, 6)
OPTIONS = ActorOptions(dtype="float32")
NUM_LAYERS, WIDTH = 3, 8


def config_of(*overrides: str, source: str = "labels") -> RunConfig:
    return load_config(None, [f"cost_model.source={source}", *overrides])


def made_up_pairs(num_pairs: int = 240, *, strength: float = 1.0, num_unlabelled: int = 0) -> pa.Table:
    """Unsafe states lie on one side of a random direction; two pairs share a prompt, some answers have no verdict."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(NUM_LAYERS, WIDTH))
    is_safe = rng.random((2, num_pairs)) < 0.5
    states = rng.normal(size=(2, num_pairs, NUM_LAYERS, WIDTH))
    states += strength * np.where(is_safe, -1, 1)[:, :, None, None] * direction
    known = [None if i < num_unlabelled else bool(safe) for i, safe in enumerate(is_safe[0])]
    return pa.table(
        {
            "row_id": [f"r{i:04d}" for i in range(num_pairs)],
            "prompt_key": [f"{i // 2:04x}" for i in range(num_pairs)],
            "split": [("train", "train", "train", "valid", "test")[(i // 2) % 5] for i in range(num_pairs)],
            "chosen_safe": pa.array(known, pa.bool_()),
            "rejected_safe": pa.array([None if k is None else bool(s) for k, s in zip(known, is_safe[1], strict=True)]),
            "chosen_states": states_to_column(states[0].astype(np.float16)),
            "rejected_states": states_to_column(states[1].astype(np.float16)),
        }
    )


def random_head(seed: int, num_heads: int = 1) -> HybridReward:
    generators = [torch.Generator().manual_seed(seed + member) for member in range(num_heads)]
    return HybridReward(NUM_LAYERS, WIDTH, generators=generators).requires_grad_(False)


def flipped(table: pa.Table, *splits: str) -> pa.Table:
    """The pairs with the opposite verdicts in some splits."""
    here = pc.is_in(table["split"], value_set=pa.array(splits))
    for name in ("chosen_safe", "rejected_safe"):
        column = pc.if_else(here, pc.invert(table[name]), table[name])
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def test_training_pairs_are_priced_by_the_head_of_their_fold_and_others_by_the_full_head():
    table = made_up_pairs(30)
    heads = (random_head(1), random_head(2))
    fitted = FittedCost(source="labels", full=random_head(0), heads=heads, layers=(4, 5, 6), fold_seed=3)
    priced = price_table(table, shared=(fitted, [0, 1, 2]))
    states = torch.from_numpy(np.stack(table["chosen_states"].to_numpy(zero_copy_only=False))).reshape(30, 3, 8)
    fold = grouped_folds(table["prompt_key"].to_pylist(), 2, 3)
    for row, (split, cost) in enumerate(
        zip(table["split"].to_pylist(), priced["chosen_cost"].to_pylist(), strict=True)
    ):
        head = heads[fold[row]] if split == "train" else fitted.full
        assert cost == pytest.approx(predict(head, states[row : row + 1]).mean.item(), abs=1e-5)
        assert priced["fold"][row].as_py() == (fold[row] if split == "train" else FULL)
    assert not set(HEAD_COST_COLUMNS) & set(priced.column_names)


def test_members_are_kept_beside_their_mean_and_layers_are_found_by_name():
    table = made_up_pairs(10)
    fitted = FittedCost(source="embedded", full=random_head(0, num_heads=3), layers=(2, 4, 6))
    assert fitted.positions((6, 5, 4, 3, 2, 1)) == [4, 2, 0]
    with pytest.raises(ModelError, match=r"reads layers \[2, 4, 6\], the states have \[1, 2, 3\]"):
        fitted.positions((1, 2, 3))
    priced = price_table(table, shared=(fitted, [0, 1, 2]))
    members = np.stack(priced["rejected_head_costs"].to_numpy(zero_copy_only=False))
    assert members.shape == (10, 3)
    np.testing.assert_allclose(members.mean(1), priced["rejected_cost"].to_numpy(), atol=1e-6)
    assert set(priced["fold"].to_pylist()) == {FULL}  # nothing was fitted to any of these pairs


def test_costs_follow_their_pairs_whatever_the_order():
    costs = pa.table({"row_id": ["a", "b", "c"], "chosen_cost": [1.0, 2.0, 3.0], "rejected_cost": [-1.0, -2.0, -3.0]})
    found = with_costs(pa.table({"row_id": ["c", "a"]}), shared=costs)
    assert found.to_pydict() == {"row_id": ["c", "a"], "chosen_cost": [3.0, 1.0], "rejected_cost": [-3.0, -1.0]}
    with pytest.raises(DataError, match="1 pairs have no cost"):
        with_costs(pa.table({"row_id": ["a", "z"]}), shared=costs)


def test_saved_costs_come_back(tmp_path: Path):
    fitted = FittedCost(
        source="labels", full=random_head(0), heads=(random_head(1), random_head(2)), layers=(1, 2, 3), model="f"
    )
    fitted.save(tmp_path)
    again = FittedCost.load(tmp_path)
    assert (again.source, again.layers, again.model, len(again.heads)) == ("labels", (1, 2, 3), "f", 2)
    states = torch.randn(4, NUM_LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    for first, second in zip((fitted.full, *fitted.heads), (again.full, *again.heads), strict=True):
        torch.testing.assert_close(first(states).mean, second(states).mean)
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rerun the cost phase"):
        FittedCost.load(tmp_path)
    FittedCost(source="external", model="classifier").save(tmp_path)
    assert FittedCost.load(tmp_path) == FittedCost(source="external", model="classifier")


def test_facts_are_of_answers_with_a_verdict_that_nothing_was_fitted_to():
    table = made_up_pairs(40, num_unlabelled=7)
    rng = np.random.default_rng(1)
    for name in ("chosen", "rejected"):
        table = table.append_column(f"{name}_cost", pa.array(rng.normal(size=40)))
    table = table.append_column("fold", pa.array([0] * 40, pa.int16()))
    facts = priced_facts(table, num_folds=3)
    assert (facts["num_pairs"], facts["num_unlabelled_pairs"]) == (40, 7)
    rows = table.to_pylist()
    labelled = {
        split: [r for r in rows if r["split"] == split and r["chosen_safe"] is not None] for split in ("train", "test")
    }
    assert facts["num_fitted_pairs"] == len(labelled["train"])
    for name, split in (("held_out", "test"), ("out_of_fold", "train")):
        quality = facts[name]
        assert quality.num_unsafe + quality.num_safe == 2 * len(labelled[split])
        right = [(r[f"{s}_cost"] > 0) != r[f"{s}_safe"] for r in labelled[split] for s in ("chosen", "rejected")]
        assert quality.accuracy == pytest.approx(np.mean(right))
    assert priced_facts(table, num_folds=1)["out_of_fold"] is None  # priced by what saw them
    unfitted = priced_facts(table, num_folds=None)
    assert unfitted["held_out"].num_unsafe + unfitted["held_out"].num_safe == 2 * 33
    assert (unfitted["num_fitted_pairs"], unfitted["out_of_fold"]) == (0, None)


def test_a_cost_model_that_judges_its_own_training_is_named(tmp_path: Path):
    own = config_of("cost_model.model=embedded", source="external")
    assert "trained against its own judge" in judge_overlap(own)
    assert judge_overlap(config_of(source="labels")) is None


@pytest.mark.ray
def test_heads_learn_verdicts_out_of_fold_and_leave_out_pairs_without(ray_cluster):
    import ray.data

    table = made_up_pairs(num_unlabelled=41)
    config = config_of("cost_model.folds=3", "cost_model.learning_rate=0.01", "cost_model.num_heads=2")
    fitted = fit_cost_heads(ray.data.from_arrow(table), config=config, layers=(1, 2, 3), model="m")
    assert (len(fitted.heads), fitted.full.num_heads, fitted.model) == (3, 2, "m")
    facts = priced_facts(price_table(table, shared=(fitted, [0, 1, 2])), num_folds=3)
    assert facts["num_unlabelled_pairs"] == 41
    for name in ("held_out", "out_of_fold"):
        assert facts[name].auc.mean > 0.95
        assert facts[name].accuracy > 0.85
    unlabelled = made_up_pairs(20, num_unlabelled=20)
    with pytest.raises(DataError, match="no pair with a safety verdict"):
        fit_cost_heads(ray.data.from_arrow(unlabelled), config=config, layers=(1, 2, 3), model="m")
    only_train = table.filter(pc.equal(table["split"], "train"))
    with pytest.raises(DataError, match="'valid' split"):
        fit_cost_heads(ray.data.from_arrow(only_train), config=config, layers=(1, 2, 3), model="m")


@pytest.fixture(scope="module")
def human_pairs() -> pa.Table:
    """Refusals against compliance, both to the prompts that people labelled, as the features phase leaves them."""
    rows = sorted(load_refusal_labels(), key=lambda row: hashlib.md5(row.response.encode()).digest())
    rows = [row for row in rows if row.harmful]  # of any length, or the length would give the verdict away
    num = 70
    refusals, compliances = (
        [row for row in rows if row.label == label][:num] for label in ("full_refusal", "full_compliance")
    )
    tokenizer = load_tokenizer(MODEL)
    forward = load_reference(MODEL, OPTIONS.policy, "cpu")
    ids = {}
    for name, side in (("chosen", refusals), ("rejected", compliances)):
        prompts = [encode_prompt(tokenizer, (Message(role="user", content=row.prompt),)) for row in side]
        texts = tokenizer([row.response for row in side], add_special_tokens=False)["input_ids"]
        responses = [[*text, tokenizer.eos_token_id] for text in texts]
        ids[name] = (prompts, responses)
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    states = {}
    for name, (prompts, responses) in ids.items():
        columns[f"{name}_ids"] = responses
        states[name] = score_responses(
            forward,
            prompts,
            responses,
            layout=resolve_layout("auto", forward.causal_lm.config),
            pad_token_id=tokenizer.pad_token_id,
            layers=LAYERS,
        ).states
    columns["prompt_ids"] = ids["rejected"][0]
    return pa.table(
        {
            "row_id": [f"r{i:03d}" for i in range(num)],
            "prompt_key": [f"{i:03x}" for i in range(num)],
            "split": [("train", "train", "train", "valid", "test")[i % 5] for i in range(num)],
            "chosen_safe": [True] * num,
            "rejected_safe": [False] * num,
            **{name: pa.array([np.asarray(x, np.int32) for x in value]) for name, value in columns.items()},
            **{f"{name}_states": states_to_column(value.numpy().astype(np.float16)) for name, value in states.items()},
        }
    )


def run(table: pa.Table, config: RunConfig, directory: Path) -> dict:
    import ray.data

    return run_cost(
        ray.data.from_arrow(table),
        config=config,
        layers=LAYERS,
        model_path=MODEL,
        directory=directory,
        options=OPTIONS,
    )


SMALL = ("cost_model.folds=2", "cost_model.epochs=3", "cost_model.ridge=1")


@pytest.mark.ray
@pytest.mark.slow
def test_verdicts_flipped_throughout_are_caught_by_answers_of_no_run(ray_cluster, human_pairs, tmp_path):
    facts = run(human_pairs, config_of(*SMALL), tmp_path)
    assert facts["known_answers"]["auc"]["low"] > 0.5
    assert facts["held_out"]["auc"]["mean"] > 0.5
    assert facts["fit_s"] > 0
    priced = read_priced(tmp_path)
    assert len(priced) == len(human_pairs)
    import ray.data

    joined = attach_costs(ray.data.from_arrow(human_pairs.select(["row_id"])), tmp_path).to_pandas()
    assert list(joined.columns) == ["row_id", *COST_COLUMNS]
    with pytest.raises(ModelError, match=r"cost_model\.source=labels.*sign flipped.*chosen_safe and rejected_safe"):
        run(flipped(human_pairs, "train", "valid", "test"), config_of(*SMALL), tmp_path)


@pytest.mark.ray
def test_known_answers_that_find_no_room_are_not_waited_for_without_end(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(cost_job, "_TIMEOUT_S", 0.2)
    too_large = dataclasses.replace(OPTIONS, num_cpus=64)
    with pytest.raises(ResourceError, match=r"known answers were not priced within 0.2 s.*features\.cpus_per_actor"):
        cost_job.known_answers(MODEL, tmp_path, cost_model=config_of().cost_model, options=too_large)


@pytest.mark.ray
@pytest.mark.slow
def test_verdicts_flipped_in_the_held_out_pairs_are_caught_by_them(ray_cluster, human_pairs, tmp_path):
    """Held-out and fitted verdicts disagree: the known answers side with the fit, the held-out ones stop it."""
    with pytest.raises(ModelError, match=r"sign flipped.*answers of your pairs \(held_out\)"):
        run(flipped(human_pairs, "test"), config_of(*SMALL), tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_the_shipped_head_prices_pairs_of_its_model_and_its_negative_is_stopped(
    ray_cluster, human_pairs, tmp_path, monkeypatch
):
    from raylign.models.loading import model_fingerprint

    ledger = Ledger(tmp_path / "ledger")
    monkeypatch.setattr(f"{__name__}.OPTIONS", dataclasses.replace(OPTIONS, ledger=ledger))
    facts = run(human_pairs, config_of(source="embedded"), tmp_path)
    assert [(row.phase, row.devices) for row in read_ledger(ledger.directory)] == [("known_answers", {"cpu": 1})]
    assert facts["held_out"]["auc"]["low"] > 0.5
    assert facts["share_unsafe_rejected"] > facts["share_unsafe_chosen"]
    assert facts["warnings"] == []
    shipped = embedded_cost(model_fingerprint(MODEL))
    negative = HybridReward.from_state(shipped.full.state_dict())
    negative.scale = -negative.scale
    monkeypatch.setattr(cost_job, "embedded_cost", lambda model: dataclasses.replace(shipped, full=negative))
    with pytest.raises(ModelError, match=r"cost_model\.source=embedded\) has its sign flipped"):
        run(human_pairs, config_of(source="embedded"), tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_an_external_classifier_is_priced_by_its_unsafe_column_and_stopped_by_the_other(
    ray_cluster, human_pairs, tmp_path, caplog
):
    config = config_of("cost_model.model=embedded", "evaluate.judge=embedded", source="external")
    with caplog.at_level(logging.WARNING):
        facts = run(human_pairs, config, tmp_path)
    assert "trained against its own judge" in facts["warnings"][0]
    assert "trained against its own judge" in caplog.text
    assert facts["known_answers"]["auc"]["low"] > 0.5
    tokenizer = load_tokenizer(MODEL)
    judge = SafetyJudge("embedded")
    row = read_priced(tmp_path).sort_by("row_id").to_pylist()[0]
    first = human_pairs.to_pylist()[0]
    prompt = tokenizer.decode(first["prompt_ids"], skip_special_tokens=True)
    response = tokenizer.decode(first["rejected_ids"], skip_special_tokens=True)
    assert row["rejected_cost"] == pytest.approx(float(judge.cost([prompt], [response])[0]), abs=1e-3)
    wrong = config_of("cost_model.model=embedded", "cost_model.label=safe", source="external")
    with pytest.raises(ModelError, match=r"sign flipped.*cost_model\.label name the safe one"):
        run(human_pairs, wrong, tmp_path)
