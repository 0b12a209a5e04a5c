"""The rank phase under a constraint, on the table of 64 prompts whose optima are known. Ray is real in one test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from raylign.config import RunConfig, load_config
from raylign.errors import DataError
from raylign.rewards.confidence import label_confidence
from raylign.runtime.constrain_job import PairConstraint, constrain_pairs, constrain_table, solve_constraint
from raylign.runtime.fitted_reward import RewardFacts

sys.path.append(str(Path(__file__).parents[1] / "constraints"))
from constraint_table import constraint_table, gibbs

FACTS = RewardFacts(kind="hybrid", centers=(0.25,), full_center=0.5, temperature=1.0, fold_seed=0, metrics={})
FIRST, SECOND = np.triu_indices(8, 1)
STAR = 0.385034


def config_of(*constraint: str, others: tuple[str, ...] = ()) -> RunConfig:
    keys = [f"constraint.{key}" for key in constraint]
    return load_config(None, ["train.beta=0.5", "confidence.squash=none", "confidence.temperature=1", *keys, *others])


def ranked_table(prompts: int = 64, **columns: object) -> pa.Table:
    """All pairs of answers to each prompt of the table, ranked by the reward alone; every answer is in 7 pairs."""
    reward, cost = (table[:prompts].astype(np.float32) for table in constraint_table())
    sides = {"chosen": FIRST, "rejected": SECOND}
    num = prompts * len(FIRST)
    content = {
        "row_id": [f"r{i:05d}" for i in range(num)],
        "prompt_key": [f"{i // len(FIRST):04x}" for i in range(num)],
        "split": ["train"] * num,
        "margin_mean": (reward[:, FIRST] - reward[:, SECOND]).reshape(-1),
        "margin_variance": np.zeros(num, np.float32),
        "label_confidence": np.full(num, 0.5, np.float32),
        "fold": np.zeros(num, np.int16),
    }
    content |= {f"{side}_reward": reward[:, index].reshape(-1) for side, index in sides.items()}
    content |= {f"{side}_cost": cost[:, index].reshape(-1) for side, index in sides.items()}
    return pa.table(content | columns)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def test_dual_multiplier_and_what_it_promises_are_those_of_the_table() -> None:
    reward, cost = constraint_table()
    constraint, facts = solve_constraint(
        ranked_table(), reward=FACTS, config=config_of("kind=expected", "multiplier=dual")
    )
    assert constraint.multiplier == pytest.approx(STAR, abs=1e-5)
    names = ("mean_reward", "statistic", "mean_cost", "rectified_cost", "safety_rate", "prompt_safety_rate")
    names += ("under", "over")
    before = (-0.034, -0.133, -0.133, 0.688, 0.543, 0.031, 0.345, 0.478)
    after = (1.674, 0.000, 0.000, 0.858, 0.506, 0.203, 0.646, 0.646)
    assert [facts.before[name] for name in names] == pytest.approx(before, abs=5.1e-4)
    assert [facts.after[name] for name in names] == pytest.approx(after, abs=5.1e-4)
    policy = gibbs(reward - STAR * cost)
    assert facts.after["beta"] == 0.5
    assert facts.after["effective_responses"] == pytest.approx(7 * (1 / (policy**2).sum(1)).mean(), rel=1e-4)
    score = reward - STAR * cost
    turned = np.sign(reward[:, FIRST] - reward[:, SECOND]) != np.sign(score[:, FIRST] - score[:, SECOND])
    assert facts.share_turned == pytest.approx(turned.mean())
    num_unsafe = (cost > 0)[:, FIRST].astype(int) + (cost > 0)[:, SECOND]
    shares = (facts.share_both_safe, facts.share_mixed, facts.share_both_unsafe)
    assert shares == pytest.approx([(num_unsafe == num).mean() for num in range(3)])
    assert (facts.is_dual, facts.is_at_cap, facts.num_pairs) == (True, False, 64 * 28)
    assert json.loads(json.dumps(facts.to_dict())) == facts.to_dict()


def test_temperature_sets_the_scale_of_the_dual_loop() -> None:
    """The optimum depends on temperature times beta alone."""
    config = config_of("kind=expected", "multiplier=dual", others=("confidence.temperature=4", "train.beta=0.125"))
    assert solve_constraint(ranked_table(), reward=FACTS, config=config)[0].multiplier == pytest.approx(STAR, abs=1e-5)


@pytest.mark.parametrize(("tolerance", "expected", "is_at_cap"), [(0.462, 1.0, False), (0.0, 20.0, True)])
def test_rectified_multipliers_meet_their_tolerance_or_their_cap(tolerance, expected, is_at_cap) -> None:
    config = config_of("kind=rectified", "multiplier=dual", f"tolerance={tolerance}")
    constraint, facts = solve_constraint(ranked_table(), reward=FACTS, config=config)
    assert constraint.multiplier == pytest.approx(expected, abs=2e-3)
    assert facts.is_at_cap is is_at_cap
    assert [text for text in facts.warnings if "at its cap, 20," in text] == facts.warnings
    assert len(facts.warnings) == is_at_cap


def test_a_constraint_that_the_reward_meets_is_told_of() -> None:
    config = config_of("kind=expected", "multiplier=dual", "threshold=1.1")
    constraint, facts = solve_constraint(ranked_table(), reward=FACTS, config=config)
    assert constraint.multiplier == 0
    (warning,) = facts.to_dict()["warnings"]
    assert "the reward alone meets the constraint" in warning
    assert solve_constraint(ranked_table(), reward=FACTS, config=config_of("kind=rectified"))[1].warnings == []


@pytest.mark.parametrize(("kind", "multiplier"), [("expected", STAR), ("rectified", 1.0)])
def test_labels_are_the_confidence_in_reward_less_cost(kind: str, multiplier: float) -> None:
    reward, cost = constraint_table()
    config = config_of(f"kind={kind}", f"multiplier={multiplier}")
    table = ranked_table()
    constraint, facts = solve_constraint(table, reward=FACTS, config=config)
    found = constrain_table(table, shared=constraint)
    score = reward - multiplier * (cost if kind == "expected" else np.maximum(cost, 0))
    margin = (score[:, FIRST] - score[:, SECOND]).reshape(-1)
    np.testing.assert_allclose(column(found, "label_confidence"), 1 / (1 + np.exp(-margin)), atol=1e-6)
    np.testing.assert_allclose(column(found, "margin_mean"), margin, atol=1e-5)
    same = [name for name in table.column_names if name not in ("margin_mean", "label_confidence")]
    assert found.select(same).equals(table.select(same))
    assert found.schema == table.schema
    policy = gibbs(score)
    assert facts.after["mean_reward"] == pytest.approx((policy * reward).sum(1).mean(), abs=1e-5)


def test_labels_do_not_depend_on_the_blocks() -> None:
    table = ranked_table()
    config = config_of("kind=rectified", "multiplier=2", "labels=sampled")
    constraint, _ = solve_constraint(table, reward=FACTS, config=config)
    whole = constrain_table(table, shared=constraint)
    assert set(column(whole, "label_confidence")) == {0.0, 1.0}
    mixed = table.take(np.random.default_rng(0).permutation(len(table)))
    parts = [constrain_table(part, shared=constraint) for part in (mixed.slice(0, 100), mixed.slice(100))]
    assert pa.concat_tables(parts).sort_by("row_id").equals(whole)


def test_multipliers_are_of_training_pairs_whatever_their_order() -> None:
    config = config_of("kind=expected", "multiplier=dual")
    table = ranked_table()
    split = pa.array(["test" if i < 28 * 20 else "train" for i in range(len(table))])
    table = table.set_column(table.schema.get_field_index("split"), "split", split)
    first = solve_constraint(table, reward=FACTS, config=config)
    mixed = table.take(np.random.default_rng(0).permutation(len(table)))
    assert solve_constraint(mixed, reward=FACTS, config=config) == first
    alone = table.filter(pc.equal(table["split"], "train"))
    assert solve_constraint(alone, reward=FACTS, config=config) == first
    assert first[0].multiplier != pytest.approx(STAR, abs=1e-3)


def test_squashed_rewards_keep_their_centre_under_the_constraint() -> None:
    """What the cost takes off all rewards on average comes off their centre too."""
    table = ranked_table()
    config = load_config(None, ["constraint.kind=rectified", "constraint.multiplier=3"])
    constraint, facts = solve_constraint(table, reward=FACTS, config=config)
    assert facts.after is None  # the tilted reference is not what a squash ends at
    weighed = [np.maximum(column(table, f"{side}_cost"), 0) for side in ("chosen", "rejected")]
    assert constraint.cost_center == pytest.approx(np.mean(weighed), abs=1e-6)
    rewards = [
        torch.from_numpy(column(table, f"{side}_reward") - 3 * x)
        for side, x in zip(("chosen", "rejected"), weighed, strict=True)
    ]
    gamma = label_confidence(
        *rewards,
        alpha=config.confidence.alpha,
        floor=0.0,
        center=0.25 - 3 * float(np.mean(weighed)),
        level="pair",
        squash="sigmoid",
        temperature=1.0,
    )
    found = constrain_table(table, shared=constraint)
    np.testing.assert_allclose(column(found, "label_confidence"), gamma.numpy(), atol=1e-5)


def test_members_of_the_cost_make_labels_less_sure() -> None:
    table, rng = ranked_table(), np.random.default_rng(0)
    for side in ("chosen", "rejected"):
        mean = column(table, f"{side}_cost")
        noise = rng.normal(0, 1, (len(table), 4)).astype(np.float32)
        members = mean[:, None] + noise - noise.mean(1, keepdims=True)
        table = table.append_column(f"{side}_head_costs", pa.array(list(members)))
    config = config_of("kind=expected", "multiplier=2")
    constraint, _ = solve_constraint(table, reward=FACTS, config=config)
    found = constrain_table(table, shared=constraint)
    point = constrain_table(ranked_table(), shared=constraint)
    assert found.column_names == point.column_names
    np.testing.assert_allclose(column(found, "margin_mean"), column(point, "margin_mean"), atol=1e-4)
    deviation = np.stack(table["chosen_head_costs"].to_pylist()) - np.stack(table["rejected_head_costs"].to_pylist())
    np.testing.assert_allclose(column(found, "margin_variance"), 4 * deviation.var(1), rtol=1e-3)
    doubt = abs(column(point, "label_confidence") - 0.5) - abs(column(found, "label_confidence") - 0.5)
    assert doubt.min() > -1e-5
    assert doubt.mean() > 0.01


def test_costs_that_cannot_be_used_stop_the_run() -> None:
    config = config_of("kind=expected", "multiplier=dual", "threshold=-9")
    with pytest.raises(DataError, match=r"raise constraint\.threshold above"):
        solve_constraint(ranked_table(), reward=FACTS, config=config)
    table = ranked_table(prompts=2)
    costs = column(table, "chosen_cost").copy()
    costs[3] = np.nan
    table = table.set_column(table.schema.get_field_index("chosen_cost"), "chosen_cost", pa.array(costs))
    with pytest.raises(DataError, match="1 of 112 stored responses"):
        solve_constraint(table, reward=FACTS, config=config_of("kind=rectified"))


@pytest.mark.ray
def test_ray_path_equals_plain_path_and_asks_for_costs(ray_cluster: None) -> None:
    import ray.data

    table = ranked_table()
    config = config_of("kind=expected", "multiplier=dual", "labels=sampled")
    constraint, facts = solve_constraint(table, reward=FACTS, config=config)
    assert isinstance(constraint, PairConstraint)
    blocks = [table.slice(900), table.slice(0, 300), table.slice(300, 600)]
    dataset, found = constrain_pairs(ray.data.from_arrow(blocks), reward=FACTS, config=config)
    assert found == facts
    batches = list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))
    assert pa.concat_tables(batches).sort_by("row_id").equals(constrain_table(table, shared=constraint))
    free = ray.data.from_arrow(table.drop_columns(["rejected_cost"]))
    with pytest.raises(DataError, match=r"no rejected_cost, which constraint\.kind=expected weighs.*cost_model"):
        constrain_pairs(free, reward=FACTS, config=config)
