"""Parts of a training worker that need no Ray: what identifies a training."""

from __future__ import annotations

import pytest
from tiny_run import save_tiny_model

from raylign.config import load_config
from raylign.runtime.train_worker import method_identity, run_identity

LIVE = "confidence.source=live"


@pytest.mark.parametrize(
    "override",
    ["train.batch_tokens=128", "train.log_every=1", "train.max_failures=0", "train.parallel=fsdp", "policy.model=/m"],
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


def test_the_whole_identity_adds_what_was_read(tmp_path):
    model = save_tiny_model(tmp_path)
    whole = run_identity(load_config(), model=model, reward=None)
    assert whole == method_identity(load_config()) | {"model": whole["model"]}
