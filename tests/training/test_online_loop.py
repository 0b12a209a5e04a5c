"""The online loop without Ray: rounds, updates, records, and a resume in the middle of a round that ends the same.

Real here: a two-layer model, its checkpoints, the round files. Made up: the responses, which no model sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rounds import tiny_round, with_token_rewards
from tiny_run import save_tiny_model

from raylign.config import RunConfig, load_config
from raylign.errors import CheckpointError
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.online_loop import train_online
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round, RoundSchedule, RoundStore
from raylign.training.state import POLICY, TrainerState, load_training, save_checkpoint
from raylign.training.world import World

METHODS: dict[str, dict[str, Any]] = {
    "online_dpo": {"train": {"method": "online_dpo"}},
    "moving_reference": {"train": {"method": "online_dpo"}, "online": {"reference": "previous_round"}},
    "group": {"train": {"method": "policy_gradient"}},
    "gae": {"train": {"method": "policy_gradient"}, "policy_gradient": {"advantage": "gae"}},
    "token": {
        "train": {"method": "policy_gradient"},
        "policy_gradient": {"credit": "token"},
        "reward": {"kind": "ava_p"},
    },
    "token gae": {
        "train": {"method": "policy_gradient"},
        "policy_gradient": {"credit": "token", "advantage": "gae"},
        "reward": {"kind": "ava_p"},
    },
}
SCHEDULE = RoundSchedule(num_prompts=12, prompts_per_round=4, num_rounds=3, batch_size=2, round_epochs=2, seed=0)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Trial:
    """A run that can stop at an update and go on from its checkpoint, in a directory of its own."""

    def __init__(self, model_dir: Path, directory: Path, method: str) -> None:
        values = METHODS[method]
        train = {**values["train"], "learning_rate": 1e-2, "log_every": 1, "checkpoint_every": 1}
        self.config: RunConfig = load_config(values={**values, "train": train})
        self.model_dir = model_dir
        self.directory = directory
        self.store = RoundStore(directory / "rounds")
        self.opened: list[int] = []
        self.records: list[dict[str, float]] = []

    def state(self, source: Path) -> TrainerState:
        is_gradient = self.config.train.method == "policy_gradient"
        is_gae = is_gradient and self.config.policy_gradient.advantage == "gae"
        policy = PolicyForward(load_policy(source, dtype="float32"), num_values=int(is_gae))
        optimizer = build_optimizer(
            policy, learning_rate=1e-2, weight_decay=0.1, heads=policy.value_heads, head_learning_rate=1e-2
        )
        scheduler = build_scheduler(optimizer, schedule="cosine", num_updates=SCHEDULE.num_updates, warmup_fraction=0.1)
        window = GradientWindow() if is_gradient else MetricWindow(has_confidence=False)
        return TrainerState(policy=policy, optimizer=optimizer, scheduler=scheduler, window=window)

    def open(self, index: int, state: TrainerState) -> Round:
        """As the worker does it: stored responses are never made again, nor is what the trainer said of them."""
        self.opened.append(index)
        if not self.store.has(index):
            made = tiny_round(4, 3, index=index)
            if self.config.policy_gradient.credit == "token":
                made = with_token_rewards(made)
            self.store.write(index, made.scored, made.facts)
        round_ = self.store.read(index)
        if round_.policy_logps is None:
            logps, values = round_logps(state.policy, round_, packing=PACKING, world=World())
            self.store.write_policy(index, logps, values)
            round_ = round_.with_policy(logps, values)
        return round_

    def run(self, state: TrainerState, stop_after: int | None = None) -> None:
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

    def resume(self, update: int) -> None:
        checkpoint = self.directory / f"step_{update}"
        state = self.state(checkpoint / POLICY)
        load_training(checkpoint, state)
        self.run(state)


def weights(directory: Path) -> bytes:
    return (directory / f"step_{SCHEDULE.num_updates}" / POLICY / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop_after", [4, 6])  # the end of a round of four updates, and the middle of the next
def test_a_resumed_run_ends_with_the_same_weights(
    model_dir: Path, tmp_path: Path, method: str, stop_after: int
) -> None:
    whole = Trial(model_dir, tmp_path / "whole", method)
    whole.run(whole.state(model_dir))
    assert whole.opened == [0, 1, 2]
    broken = Trial(model_dir, tmp_path / "broken", method)
    with pytest.raises(KeyboardInterrupt):
        broken.run(broken.state(model_dir), stop_after=stop_after)
    assert weights(tmp_path / "whole") != (model_dir / "model.safetensors").read_bytes()
    broken.resume(stop_after)
    assert broken.opened == ([0, 1, 2] if stop_after == 4 else [0, 1, 1, 2])
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    names = [name for name in whole.records[-1] if not name.startswith("perf/")]
    for ours, theirs in zip(broken.records, whole.records, strict=True):
        assert [ours.get(name) for name in names] == [theirs.get(name) for name in names]


def test_the_last_record_of_a_round_tells_of_the_round(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "online_dpo")
    trial.run(trial.state(model_dir))
    told = [record["round"] for record in trial.records if "critic/score/mean" in record]
    assert told == [1, 2, 3]
    assert [record["step"] for record in trial.records] == list(range(1, SCHEDULE.num_updates + 1))
    assert trial.records[3]["online/reward_margin"] > 0


@pytest.mark.parametrize("method", ["online_dpo", "group"])
def test_shaped_rewards_are_what_is_maximised(model_dir: Path, tmp_path: Path, method: str) -> None:
    """Negated rewards turn every preference and every advantage round; the same rewards change nothing."""
    ends = {}
    for name, shape in {"none": None, "same": lambda r: r.rewards, "negated": lambda r: -r.rewards}.items():
        trial = Trial(model_dir, tmp_path / name, method)
        state = trial.state(model_dir)
        train_online(state, trial.open, SCHEDULE, config=trial.config, packing=PACKING, shape_rewards=shape)
        ends[name] = state.policy.state_dict()
    assert all(torch.equal(ends["none"][key], ends["same"][key]) for key in ends["none"])
    assert not all(torch.equal(ends["none"][key], ends["negated"][key]) for key in ends["none"])


def test_values_are_part_of_the_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    trial = Trial(model_dir, tmp_path, "gae")
    trial.run(trial.state(model_dir))
    checkpoint = tmp_path / f"step_{SCHEDULE.num_updates}"
    state = trial.state(checkpoint / POLICY)
    assert not state.policy.value_heads.weight.any()
    load_training(checkpoint, state)
    assert state.policy.value_heads.weight.any()
    assert torch.isfinite(state.policy.value_heads.weight).all()
    with pytest.raises(CheckpointError, match=r"policy_gradient\.advantage"):
        load_training(checkpoint, Trial(model_dir, tmp_path, "group").state(checkpoint / POLICY))
