"""Reward and rank jobs on made-up states: who scores whom, and that the parts add up. Ray is real, states are not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from raylign.config import ConfidenceSection, RunConfig, load_config
from raylign.data.states import states_to_column
from raylign.errors import CheckpointError, DataError
from raylign.rewards.confidence import label_confidence
from raylign.rewards.cross_fit import grouped_folds
from raylign.rewards.fit import predict
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.pair_states import read_states
from raylign.runtime.rank_job import FULL, rank_pairs, rank_table
from raylign.runtime.reward_job import fit_reward

NUM_LAYERS, WIDTH = 3, 8


def config_of(**reward) -> RunConfig:
    return load_config(values={"reward": {"folds": 3, "epochs": 2, "batch_size": 16, **reward}})


def made_up_pairs(num_pairs: int = 240, *, strength: float = 1.0, seed: int = 0) -> pa.Table:
    """Chosen states lie on one side of a random direction; several pairs share a prompt."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(NUM_LAYERS, WIDTH))
    noise = rng.normal(size=(2, num_pairs, NUM_LAYERS, WIDTH))
    keys = [f"{i // 2:04x}" for i in range(num_pairs)]
    splits = [("train", "train", "train", "valid", "test")[(i // 2) % 5] for i in range(num_pairs)]
    return pa.table(
        {
            "row_id": [f"r{i:04d}" for i in range(num_pairs)],
            "prompt_key": keys,
            "split": splits,
            "chosen_states": states_to_column((noise[0] + strength * direction).astype(np.float16)),
            "rejected_states": states_to_column((noise[1] - strength * direction).astype(np.float16)),
        }
    )


@pytest.fixture(scope="module")
def fitted(ray_cluster: None) -> FittedReward:
    import ray.data

    dataset = ray.data.from_arrow(made_up_pairs())
    return fit_reward(dataset, config=config_of())


@pytest.mark.ray
def test_separable_states_are_found_and_counted(fitted):
    metrics = fitted.metrics
    assert (metrics["num_train_pairs"], metrics["num_valid_pairs"], metrics["num_test_pairs"]) == (144, 48, 48)
    assert metrics["test_accuracy"]["mean"] > 0.95
    assert metrics["out_of_fold_accuracy"] > 0.95
    assert [record["position"] for record in metrics["layers"]] == [0, 1, 2]


@pytest.mark.ray
def test_states_without_signal_stay_at_chance_out_of_fold(ray_cluster):
    """In-sample scoring would confirm the labels: the reason for folds."""
    import ray.data

    table = made_up_pairs(400, strength=0.0)
    dataset = ray.data.from_arrow(table)
    fits = {folds: fit_reward(dataset, config=config_of(folds=folds, batch_size=32, ridge=1e-3)) for folds in (1, 5)}
    assert abs(fits[5].metrics["out_of_fold_accuracy"] - 0.5) < 0.1
    assert fits[1].metrics["out_of_fold_accuracy"] is None
    ranked = rank_table(table, shared=(fits[1], ConfidenceSection())).filter(pc.equal(table["split"], "train"))
    in_sample = pc.mean(pc.cast(pc.greater(ranked["margin_mean"], 0), pa.float64())).as_py()
    assert in_sample > 0.6


@pytest.mark.ray
def test_training_pairs_are_scored_by_the_head_of_their_fold_and_others_by_the_full_head(fitted):
    table = made_up_pairs()
    confidence = ConfidenceSection(alpha=3.0)
    ranked = rank_table(table, shared=(fitted, confidence)).to_pydict()
    folds = grouped_folds(table["prompt_key"].to_pylist(), 3, fitted.fold_seed).tolist()
    states = read_rows(table)
    for row, split in enumerate(table["split"].to_pylist()):
        expected = folds[row] if split == "train" else FULL
        assert ranked["fold"][row] == expected
        head = fitted.full if expected == FULL else fitted.heads[expected]
        center = fitted.full_center if expected == FULL else fitted.centers[expected]
        chosen, rejected = (predict(head, part[row : row + 1]).mean for part in states)
        gamma = label_confidence(
            chosen,
            rejected,
            alpha=3.0,
            floor=0.0,
            center=center,
            level="pair",
            squash="sigmoid",
            temperature=1.0,
        )
        assert ranked["label_confidence"][row] == pytest.approx(float(gamma), abs=1e-6)
        assert ranked["margin_mean"][row] == pytest.approx(float(chosen - rejected), abs=1e-5)


def read_rows(table: pa.Table) -> tuple[torch.Tensor, torch.Tensor]:
    from raylign.data.states import states_from_column

    return tuple(torch.from_numpy(states_from_column(table[f"{n}_states"]).copy()) for n in ("chosen", "rejected"))


@pytest.mark.ray
def test_ray_path_equals_plain_path_and_drops_the_states(fitted):
    import ray.data

    table = made_up_pairs()
    plain = rank_table(table, shared=(fitted, ConfidenceSection())).sort_by("row_id")
    dataset = rank_pairs(
        ray.data.from_arrow([table.slice(0, 100), table.slice(100)]), reward=fitted, confidence=ConfidenceSection()
    )
    batches = list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))
    assert pa.concat_tables(batches).sort_by("row_id").equals(plain)
    assert "chosen_states" not in plain.column_names


@pytest.mark.ray
def test_heads_survive_the_disk_and_damage_is_named(fitted, tmp_path):
    fitted.save(tmp_path)
    back = FittedReward.load(tmp_path)
    states, _ = read_rows(made_up_pairs())
    for ours, theirs in zip((*fitted.heads, fitted.full), (*back.heads, back.full), strict=True):
        assert torch.equal(predict(ours, states).head_rewards, predict(theirs, states).head_rewards)
    assert (back.centers, back.temperature, back.metrics) == (fitted.centers, fitted.temperature, fitted.metrics)
    (tmp_path / "heads.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="rerun the reward phase"):
        FittedReward.load(tmp_path)


@pytest.mark.ray
def test_sampling_pairs_takes_whole_rows_in_order(ray_cluster):
    """Slices and filters must not let rows trade states."""
    import ray.data

    table = made_up_pairs()
    states = read_states(ray.data.from_arrow(table).repartition(7), max_pairs=60)
    chosen, _ = read_rows(table)
    assert len(states.prompt_key) == 156  # 60 of the 144 training pairs, and 48 of each held-out split
    ids = table["row_id"].to_pylist()
    kept = sorted(row_id for row_id in ids if table["prompt_key"][ids.index(row_id)].as_py() in set(states.prompt_key))
    assert len(kept) == 156
    for i, row_id in enumerate(kept):
        assert torch.equal(states.chosen[i], chosen[ids.index(row_id)])


@pytest.mark.ray
def test_missing_split_is_a_data_error(ray_cluster):
    import ray.data

    table = made_up_pairs()
    only_train = table.filter(pc.equal(table["split"], "train"))
    with pytest.raises(DataError, match="no pair in the 'valid' split"):
        fit_reward(ray.data.from_arrow(only_train), config=config_of())


KINDS = {
    "ensemble": {},
    "brme": {"num_heads": 3},
    "laplace": {"num_heads": 6},
}


@pytest.fixture(scope="module", params=KINDS)
def uncertain(request, ray_cluster) -> FittedReward:
    """A fitted reward of each kind with members."""
    import ray.data

    sections = {"brme": {"epochs": 2}} if request.param == "brme" else {}
    reward = {"kind": request.param, "folds": 3, **KINDS[request.param]}
    if request.param != "laplace":
        reward |= {"epochs": 2, "batch_size": 16}
    dataset = ray.data.from_arrow(made_up_pairs(400, strength=0.2))
    return fit_reward(dataset, config=load_config(values={"reward": reward, **sections}))


@pytest.mark.ray
def test_every_kind_finds_the_signal_and_knows_that_it_is_unsure(uncertain):
    metrics = uncertain.metrics
    assert metrics["out_of_fold_accuracy"] > 0.6
    assert metrics["test_disagreement"] > 0
    assert len(uncertain.heads) == 3


@pytest.mark.ray
def test_every_kind_survives_the_disk_bitwise(uncertain, tmp_path):
    uncertain.save(tmp_path)
    back = FittedReward.load(tmp_path)
    states, _ = read_rows(made_up_pairs())
    for ours, theirs in zip((*uncertain.heads, uncertain.full), (*back.heads, back.full), strict=True):
        first, second = predict(ours, states), predict(theirs, states)
        for name in ("mean", "deviations", "head_rewards", "head_scales"):
            expected, found = getattr(first, name), getattr(second, name)
            assert (expected is None and found is None) or torch.equal(expected, found), name
    assert back.kind == uncertain.kind


@pytest.mark.ray
@pytest.mark.parametrize("squash", ["sigmoid", "none"])
def test_pairs_that_members_disagree_about_weigh_less(uncertain, squash):
    """The same margins without their variance would be believed more, every one of them."""
    confidence = ConfidenceSection(squash=squash)
    table = rank_table(made_up_pairs(strength=0.1, seed=1), shared=(uncertain, confidence))
    margin, variance, gamma = (
        torch.from_numpy(table[name].to_numpy().copy())
        for name in ("margin_mean", "margin_variance", "label_confidence")
    )
    assert (variance > 0).all()
    assert torch.equal(gamma > 0.5, margin > 0)
    sure = [
        label_confidence(
            torch.tensor([float(chosen)]),
            torch.tensor([float(rejected)]),
            alpha=confidence.alpha,
            floor=0.0,
            center=uncertain.full_center if fold == FULL else uncertain.centers[fold],
            level="pair",
            squash=squash,
            temperature=uncertain.temperature,
        )
        for chosen, rejected, fold in zip(
            table["chosen_reward"].to_pylist(),
            table["rejected_reward"].to_pylist(),
            table["fold"].to_pylist(),
            strict=True,
        )
    ]
    doubt = (torch.cat(sure) - 0.5).abs() - (gamma - 0.5).abs()
    assert doubt.min() > -1e-6
    assert doubt.median() > 1e-5


@pytest.mark.ray
def test_one_fold_is_saved_although_its_two_heads_are_one(ray_cluster, tmp_path):
    import ray.data

    fitted = fit_reward(ray.data.from_arrow(made_up_pairs()), config=config_of(folds=1))
    assert fitted.heads[0] is fitted.full
    fitted.save(tmp_path)
    states, _ = read_rows(made_up_pairs())
    back = FittedReward.load(tmp_path)
    assert torch.equal(predict(back.heads[0], states).mean, predict(fitted.full, states).mean)


def test_collapsed_sigmas_and_members_without_a_common_zero_are_warned_of():
    from raylign.rewards.gaussian import GaussianHeads
    from raylign.runtime.reward_job import member_warnings

    states = torch.randn(64, NUM_LAYERS, WIDTH, generator=torch.Generator().manual_seed(0))
    heads = GaussianHeads(NUM_LAYERS, WIDTH, num_heads=3, sigma_floor=0.05)
    with torch.no_grad():
        heads.weight_mean.normal_(generator=torch.Generator().manual_seed(1))
        assert member_warnings(heads, predict(heads, states)) == []
        heads.bias_scale.fill_(-20)
        heads.bias_mean[1] += 30
        collapsed, apart = member_warnings(heads, predict(heads, states))
    assert "100% of the test answers (variance collapse)" in collapsed
    assert "reward.standardize=true" in apart
