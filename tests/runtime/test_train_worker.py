"""Parts of a training worker that need no Ray: what identifies a training, and what it builds before it starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_run import HIDDEN, NUM_LAYERS, save_tiny_model, tiny_table, write_pairs

from raylign.config import load_config
from raylign.errors import DataError, ResourceError
from raylign.models.forward import PolicyForward
from raylign.models.token_forward import TokenForm
from raylign.rewards.hybrid import HybridReward
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.identity import base_model_name, method_identity, run_identity
from raylign.runtime.reporter import Reporter
from raylign.runtime.train_worker import WorkerTask, build_live_confidence, build_state, final_error
from raylign.training.micro_batches import Packing
from raylign.training.order import DataOrder
from raylign.training.table import PairTable, read_split
from raylign.training.world import World

LIVE = "confidence.source=live"


@pytest.mark.parametrize(
    "override",
    ["train.batch_tokens=128", "train.log_every=1", "train.max_failures=0", "train.parallel=fsdp"],
)
def test_settings_that_only_move_cost_identify_nothing(override):
    assert method_identity(load_config(overrides=[override])) == method_identity(load_config())


@pytest.mark.parametrize("override", ["train.beta=0.3", "train.epochs=2", "run.seed=1", "policy.adapter=lora", LIVE])
def test_settings_of_the_method_identify_a_training(override):
    assert method_identity(load_config(overrides=[override])) != method_identity(load_config())


def test_heads_count_only_where_they_are_read():
    fixed = method_identity(load_config(overrides=["reward.folds=3"]))
    assert fixed == method_identity(load_config())
    assert method_identity(load_config(overrides=[LIVE]))["reward.folds"] == 5


def test_idle_keys_identify_nothing():
    assert not [key for key in method_identity(load_config(overrides=["train.objective=dpo"])) if "confidence." in key]


def test_the_variational_section_identifies_its_own_objectives_alone():
    def found(*overrides):
        return {k: v for k, v in method_identity(load_config(overrides=overrides)).items() if k.startswith("ava.")}

    first = found("train.objective=ava_p")
    assert (first["ava.td_weight"], first["ava.cer_weight"]) == (0.5, 1.0)
    assert found("train.objective=ava_p", "ava.discount=0.9") != first
    assert "ava.cer_weight" not in found("train.objective=ava_d")
    assert not found("train.objective=dpo", "reward.kind=ava_p", "ava.discount=0.9")
    assert not found("train.method=online_dpo", "reward.kind=ava_p")


def test_the_whole_identity_adds_what_was_read(tmp_path):
    model = save_tiny_model(tmp_path)
    whole = run_identity(load_config(), model=model, reward=None)
    assert whole == method_identity(load_config()) | {"model": whole["model"]}


def make_task(tmp_path, *overrides, layers=None, num_head_layers=NUM_LAYERS):
    first, second, full = (HybridReward(num_head_layers, HIDDEN) for _ in range(3))
    reward = tmp_path / "reward"
    reward.mkdir()
    FittedReward(
        heads=(first, second),
        centers=(0.0, 0.0),
        full=full,
        full_center=0.0,
        temperature=1.0,
        fold_seed=0,
        metrics={},
        layers=layers,
    ).save(reward)
    return WorkerTask(
        config=load_config(overrides=list(overrides)),
        pairs=str(write_pairs(tmp_path / "pairs", tiny_table(4))),
        model=str(save_tiny_model(tmp_path / "model")),
        base=None,
        identity={},
        reward=str(reward),
        metrics="",
    )


def build_live(task):
    packing = Packing(layout="shared", pad_token_id=1, batch_tokens=64)
    return build_live_confidence(task, PairTable(read_split(task.pairs, "train")), packing, World(), num_layers=2)


def test_live_heads_read_the_layers_they_were_fitted_on(tmp_path):
    task = make_task(tmp_path, LIVE, "features.layers=[1]", layers=(2,), num_head_layers=1)
    assert build_live(task).layers == (2,)


def test_without_stored_layers_those_of_the_configuration_are_read(tmp_path):
    assert build_live(make_task(tmp_path, LIVE, "features.layers=[2]", num_head_layers=1)).layers == (2,)


@pytest.mark.parametrize(("layers", "num_head_layers"), [(None, 1), ((1,), 2), ((3,), 1)])
def test_layers_that_do_not_fit_the_heads_or_the_policy_are_refused(tmp_path, layers, num_head_layers):
    with pytest.raises(DataError, match=r"reward heads read \d layers.*features\.layers"):
        build_live(make_task(tmp_path, LIVE, layers=layers, num_head_layers=num_head_layers))


def test_variational_objectives_get_their_policy_and_others_the_plain_one(tmp_path):
    table = PairTable(tiny_table(4))
    order = DataOrder(num_pairs=4, batch_size=4, seed=0, epochs=1)
    ava = ["train.objective=ava_d", "ava.q_from=probs", "ava.logit_scale=9", "ava.sigma_floor=0.2"]
    task = make_task(tmp_path, *ava)
    state, _ = build_state(task, table, order, World())
    assert state.policy.form == TokenForm(q_from="probs", logit_scale=9, sigma_floor=0.2)
    optimised = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in state.policy.token_heads.parameters()} < optimised
    assert state.variational is not None

    plain, _ = build_state(dataclasses.replace(task, config=load_config()), table, order, World())
    assert type(plain.policy) is PolicyForward
    assert plain.variational is None


def test_hub_ids_stay_and_directories_are_resolved(tmp_path):
    assert base_model_name("org/name", "/cache/snapshots/3f") == "org/name"
    assert base_model_name("embedded", "/package/tiny_chat") == "/package/tiny_chat"
    assert base_model_name(str(tmp_path), "/resolved") == "/resolved"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert base_model_name("org/adapter", str(tmp_path)) is None


def test_memory_that_a_device_lacks_is_told_with_its_cure(monkeypatch):
    class Context:
        def get_world_rank(self):
            return 1

        def get_world_size(self):
            return 2

    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("ray.train.get_context", Context)
    with pytest.raises(ResourceError, match=r"worker 1 of 2 ran out of device memory.*2 GiB.*train\.batch_tokens"):
        final_error(work)


def test_a_checkpoint_takes_the_place_of_one_that_was_never_reported(tmp_path):
    import ray.train

    reporter = object.__new__(Reporter)
    reporter._file = tmp_path / "metrics.jsonl"
    for place, content in (("step_0000002", "half"), (".checkpoint-x/checkpoint", "whole")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / content).write_text("")
    written = ray.train.Checkpoint.from_directory(tmp_path / ".checkpoint-x" / "checkpoint")
    placed = reporter._put(written, "step_0000002")
    assert placed.path == str(tmp_path / "step_0000002")
    assert [file.name for file in (tmp_path / "step_0000002").iterdir()] == ["whole"]
