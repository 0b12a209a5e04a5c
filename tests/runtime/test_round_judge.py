"""Judged rounds belong to one training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from raylign.config import load_config
from raylign.errors import CacheMismatchError
from raylign.models.loading import model_fingerprint
from raylign.runtime.phases import Run
from raylign.runtime.round_judge import judge_rounds, rounds_key

TRAINED = ["train.method=policy_gradient"]


def policy(directory: Path, weights: str) -> Path:
    directory.mkdir()
    (directory / "model.safetensors").write_text(weights)
    return directory


@pytest.mark.parametrize(
    ("override", "counts"),
    [
        ("run.seed=7", True),
        ("online.num_rounds=3", True),
        ("policy_gradient.clip=0.37", True),
        ("run.name=other", False),
        ("train.log_every=7", False),
    ],
)
def test_what_trained_counts(override, counts):
    key = rounds_key(load_config(None, TRAINED), "a")
    assert (rounds_key(load_config(None, [*TRAINED, override]), "a") != key) == counts
    assert rounds_key(load_config(None, TRAINED), "b") != key


def test_another_training_is_not_answered_with_old_rounds(tmp_path):
    """The same settings, name and judge, but the training was done again on other pairs or rewards."""
    config = load_config(None, TRAINED)
    first, other = policy(tmp_path / "first", "a"), policy(tmp_path / "other", "b")
    run = Run(tmp_path / "run")
    judged = {"kl": 0.5, "proxy": [[1.0, 2.0]], "gold": [[-1.0, 1.0]]}
    run.phase("judge_rounds", rounds_key(config, model_fingerprint(first)), lambda _: {"rounds": [judged]})
    phases = SimpleNamespace(config=config, run=run, ledger=None)
    (found,) = judge_rounds(phases, first)
    assert (found.kl, found.gold.tolist()) == (0.5, [[-1.0, 1.0]])
    with pytest.raises(CacheMismatchError, match="checkpoint: was"):
        judge_rounds(phases, other)
