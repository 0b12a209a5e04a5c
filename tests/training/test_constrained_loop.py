"""The online loop under a constraint: the multiplier's path, its checkpoint, and what the records say.

Real here: a two-layer model, its checkpoints, the round files. Made up: the responses, their rewards and their costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constrained_rounds import costly_round
from tiny_rounds import tiny_round
from tiny_run import save_tiny_model

from raylign.config import RunConfig, load_config
from raylign.constraints.multipliers import MultiplierState
from raylign.errors import CheckpointError, TrainingError
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.training.constrained import open_multiplier, start_multiplier
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.micro_batches import Packing
from raylign.training.online_loop import train_online
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round, RoundSchedule, RoundStore
from raylign.training.state import POLICY, TrainerState, load_training, save_checkpoint
from raylign.training.world import World

SCHEDULE = RoundSchedule(num_prompts=12, prompts_per_round=4, num_rounds=3, batch_size=2, round_epochs=1, seed=0)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=64)
# a window of more than one round, so that a resume needs the costs of the rounds before
WINDOW = {"multiplier_window": 20, "multiplier_learning_rate": 0.5}
TRIALS: dict[str, dict[str, Any]] = {
    "none": {"constraint": {"kind": "none"}},
    "rectified": {"constraint": {"kind": "rectified", **WINDOW}},
    "rectified gae": {"constraint": {"kind": "rectified", **WINDOW}, "policy_gradient": {"advantage": "gae"}},
    "expected": {"constraint": {"kind": "expected", **WINDOW, "multiplier_space": "linear"}},
    "split per part": {"constraint": {"kind": "split", "split_reduction": "per_part", **WINDOW}},
    "fixed_penalty": {"constraint": {"kind": "fixed_penalty", "multiplier": 3.0}},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Trial:
    """A run that can stop at an update and go on from its checkpoint."""

    def __init__(self, model_dir: Path, directory: Path, name: str, **constraint: Any) -> None:
        values = {**TRIALS[name], "constraint": {**TRIALS[name]["constraint"], **constraint}}
        train = {"method": "policy_gradient", "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 1}
        self.config: RunConfig = load_config(values={**values, "train": train})
        self.model_dir = model_dir
        self.directory = directory
        self.store = RoundStore(directory / "rounds")
        self.records: list[dict[str, float]] = []

    def state(self, source: Path) -> TrainerState:
        multiplier = start_multiplier(self.config.constraint)
        is_gae = self.config.policy_gradient.advantage == "gae"
        policy = PolicyForward(load_policy(source, dtype="float32"), num_values=2 * is_gae)
        optimizer = build_optimizer(
            policy, learning_rate=1e-2, weight_decay=0.1, heads=policy.value_heads, head_learning_rate=1e-2
        )
        scheduler = build_scheduler(optimizer, schedule="cosine", num_updates=SCHEDULE.num_updates, warmup_fraction=0.1)
        window = GradientWindow(has_cost_values=is_gae)
        return TrainerState(
            policy=policy, optimizer=optimizer, scheduler=scheduler, window=window, multiplier=multiplier
        )

    def open(self, index: int, state: TrainerState) -> Round:
        if not self.store.has(index):
            made = costly_round(4, 3, index=index, shift=0.5)
            self.store.write(index, made.scored, made.facts)
        round_ = self.store.read(index)
        if round_.policy_logps is None:
            logps, values = round_logps(state.policy, round_, packing=PACKING, world=World())
            self.store.write_policy(index, logps, values)
            round_ = round_.with_policy(logps, values)
        return round_

    def run(self, state: TrainerState, stop_after: int | None = None) -> TrainerState:
        tokenizer = load_tokenizer(self.model_dir)

        def save(state: TrainerState, record: dict[str, float]) -> None:
            save_checkpoint(self.directory / f"step_{state.update}", state, tokenizer=tokenizer, identity={})
            if state.update == stop_after:
                raise KeyboardInterrupt

        train_online(
            state,
            self.open,
            SCHEDULE,
            config=self.config,
            packing=PACKING,
            on_record=self.records.append,
            on_checkpoint=save,
        )
        return state

    def resume(self, update: int) -> TrainerState:
        checkpoint = self.directory / f"step_{update}"
        state = self.state(checkpoint / POLICY)
        load_training(checkpoint, state)
        return self.run(state)


def round_costs(index: int) -> np.ndarray:
    return costly_round(4, 3, index=index, shift=0.5).costs


@pytest.mark.parametrize(
    ("name", "stop_after"),  # the end of a round of two updates, and the middle of the next
    [("rectified", 2), ("rectified", 3), ("rectified gae", 3), ("expected", 3), ("split per part", 2)],
)
def test_a_resumed_run_continues_the_multiplier_and_the_weights_exactly(
    model_dir: Path, tmp_path: Path, name: str, stop_after: int
) -> None:
    whole = Trial(model_dir, tmp_path / "whole", name)
    end = whole.run(whole.state(model_dir))
    broken = Trial(model_dir, tmp_path / "broken", name)
    with pytest.raises(KeyboardInterrupt):
        broken.run(broken.state(model_dir), stop_after=stop_after)
    again = broken.resume(stop_after)
    assert again.multiplier == end.multiplier
    assert end.multiplier.num_steps == 3
    assert end.multiplier.value != whole.config.constraint.multiplier
    values = again.policy.state_dict()
    assert all(torch.equal(values[key], value) for key, value in end.policy.state_dict().items())
    names = [name for name in whole.records[-1] if not name.startswith("perf/")]
    for ours, theirs in zip(broken.records, whole.records, strict=True):
        assert [ours.get(name) for name in names] == [theirs.get(name) for name in names]


@pytest.mark.parametrize("delay", [0, 1])
def test_the_multiplier_moves_once_a_round_before_the_policy(model_dir: Path, tmp_path: Path, delay: int) -> None:
    """Log space by hand: the path that the records tell is that of the rounds' own costs."""
    trial = Trial(model_dir, tmp_path, "rectified", multiplier_delay=delay)
    trial.run(trial.state(model_dir))
    told = [record["constraint/multiplier"] for record in trial.records if "constraint/multiplier" in record]
    value, seen, path = 1.0, np.zeros(0), []
    for index in range(3):
        seen = np.concatenate([seen, round_costs(index)])[-20:]
        if index >= delay:
            value = value * np.exp(0.5 * value * np.maximum(seen, 0).mean())
        path.append(value)
    assert told == pytest.approx(path, rel=1e-12)
    assert (told[0] > 1.0) == (delay == 0)


def test_the_records_tell_of_the_costs_by_hand(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "rectified", multiplier_max=1.2, cvar_level=0.25)
    trial.run(trial.state(model_dir))
    last = [record for record in trial.records if "constraint/multiplier" in record]
    assert len(last) == 3
    costs = round_costs(2)
    by_prompt = costs.reshape(4, 3)
    expected = {
        "multiplier": 1.2,
        "at_cap": 1.0,
        "mean_cost": costs.mean(),
        "rectified_cost": np.maximum(costs, 0).mean(),
        "safety_rate": (costs <= 0).mean(),
        "prompt_safety_rate": (by_prompt <= 0).all(1).mean(),
        "cvar": np.sort(costs)[-3:].mean(),
        "under": np.maximum(by_prompt.mean(1), 0).mean(),
        "over": np.maximum(-by_prompt.mean(1), 0).mean(),
    }
    expected["compensation"] = min(expected["under"], expected["over"])
    found = {name.partition("/")[2]: value for name, value in last[2].items() if name.startswith("constraint/")}
    assert found == pytest.approx(expected)
    assert last[0]["constraint/at_cap"] == 1.0  # one step of e^(.5 x .6) is beyond 1.2 already


def test_without_a_constraint_nothing_changes_but_costs_are_reported(model_dir: Path, tmp_path: Path) -> None:
    """The unconstrained run equals the one whose penalty weighs nothing, to the bit; costs alone change no weight."""
    ends = {}
    for name, options in {"none": {}, "fixed_penalty": {"multiplier": 0.0}}.items():
        trial = Trial(model_dir, tmp_path / name, name, **options)
        ends[name] = trial.run(trial.state(model_dir))
        told = {key for record in trial.records for key in record if key.startswith("constraint/")}
        assert ("constraint/multiplier" in told) == (name != "none")
        assert "constraint/compensation" in told
    costless = Trial(model_dir, tmp_path / "costless", "none")
    for index in range(3):
        costless.store.write(index, tiny_round(4, 3, index=index).scored, {})
    ends["costless"] = costless.run(costless.state(model_dir))
    assert not {key for record in costless.records for key in record if key.startswith("constraint/")}
    weights = {name: state.policy.state_dict() for name, state in ends.items()}
    assert all(torch.equal(weights["none"][key], weights[name][key]) for name in weights for key in weights["none"])


def test_a_fixed_penalty_never_moves(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "fixed_penalty")
    trial.run(trial.state(model_dir))
    told = [record["constraint/multiplier"] for record in trial.records if "constraint/multiplier" in record]
    assert told == [3.0] * 3
    assert not any(record.get("constraint/at_cap") for record in trial.records)
    assert not any("critic/cost_value_loss" in record for record in trial.records)


def test_a_run_with_critics_tells_of_the_cost_critic(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "rectified gae")
    trial.run(trial.state(model_dir))
    losses = ("actor/policy_loss", "critic/value_loss", "critic/cost_value_loss")
    for record in trial.records:
        assert record["loss"] == pytest.approx(sum(record[loss] for loss in losses))
    assert "critic/cost_explained_variance" in trial.records[-1]


def test_a_missing_cost_stops_before_the_first_update(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "rectified")
    trial.store.write(0, tiny_round(4, 3).scored, {})
    state = trial.state(model_dir)
    with pytest.raises(TrainingError, match=r"12 of the 12 responses of round 1 have none.*cost_model"):
        trial.run(state)
    assert (state.update, state.multiplier) == (0, start_multiplier(trial.config.constraint))


def test_a_checkpoint_with_and_one_without_a_multiplier_are_told_apart(model_dir: Path, tmp_path: Path) -> None:
    for name, other in (("rectified", "none"), ("none", "rectified")):
        trial = Trial(model_dir, tmp_path / name, name)
        with pytest.raises(KeyboardInterrupt):
            trial.run(trial.state(model_dir), stop_after=1)
        checkpoint = tmp_path / name / "step_1"
        with pytest.raises(CheckpointError, match=r"constraint\.kind"):
            load_training(checkpoint, Trial(model_dir, tmp_path, other).state(checkpoint / POLICY))


def test_a_multiplier_of_another_round_is_refused() -> None:
    settings = load_config(values={"train": {"method": "policy_gradient"}, **TRIALS["rectified"]}).constraint
    state, round_ = MultiplierState(value=1.0, num_steps=1), costly_round(4, 3, index=1)
    moved = open_multiplier(state, round_, settings=settings)
    assert moved.num_steps == 2
    assert open_multiplier(moved, round_, settings=settings) is moved
    with pytest.raises(CheckpointError, match=r"seen 1 rounds, and round 3 is next"):
        open_multiplier(state, costly_round(4, 3, index=2), settings=settings)
