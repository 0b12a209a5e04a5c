"""Save and restore: a resumed run ends with the weights of the uninterrupted one, to the bit, and refuses the rest.

Real here: a two-layer model, full and LoRA with dropout, with fixed and with live confidence. Ray's part of the resume
is in tests/runtime/test_trainer.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import HIDDEN, NUM_LAYERS, save_tiny_model, tiny_table
from transformers import AutoModelForCausalLM

from raylign.config import ConfidenceSection, RewardSection, TrainSection
from raylign.errors import CheckpointError
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.rewards.hybrid import HybridReward
from raylign.training.live_confidence import LiveConfidence
from raylign.training.loop import train_offline
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.order import DataOrder
from raylign.training.state import (
    POLICY,
    TrainerState,
    check_checkpoint,
    load_training,
    restore_adapter,
    save_checkpoint,
)
from raylign.training.table import PairTable, anchor_pairs

NUM_UPDATES = 10  # two epochs of 20 pairs in batches of 4
IDENTITY = {"train.beta": 0.15, "pairs": "abc"}
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=64)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Trial:
    """A training that can be run in pieces, each from the checkpoint of the last."""

    def __init__(self, model_dir: Path, *, adapter: Any = "full", track: str | None = None) -> None:
        self.model_dir = model_dir
        self.adapter = adapter
        self.confidence = ConfidenceSection(source="live", track=track) if track else ConfidenceSection()
        self.settings = TrainSection(
            learning_rate=1e-2, epochs=2, batch_size=4, checkpoint_every=1, log_every=3, weight_decay=0.1
        )
        self.table = tiny_table(20, num_valid=6)
        self.order = DataOrder(num_pairs=20, batch_size=4, seed=3, epochs=2)
        self.records: dict[int, dict[str, float]] = {}

    def run(self, *, save_to: dict[int, Path] | None = None, start: Path | None = None) -> TrainerState:
        state = self.build(start)
        targets = save_to or {}

        def on_checkpoint(state: TrainerState, _: Any) -> None:
            if state.update in targets:
                save_checkpoint(
                    targets[state.update],
                    state,
                    tokenizer=load_tokenizer(self.model_dir),
                    identity=IDENTITY,
                    base="org/base",
                )

        train_offline(
            state,
            PairTable(self.table.slice(0, 20)),
            self.order,
            settings=self.settings,
            packing=PACKING,
            seed=3,
            on_record=lambda record: self.records.update({int(record["step"]): record}),
            on_checkpoint=on_checkpoint,
        )
        return state

    def build(self, start: Path | None) -> TrainerState:
        is_lora = self.adapter == "lora"
        model = load_policy(
            self.model_dir if start is None or is_lora else start / POLICY,
            dtype="float32",
            adapter=self.adapter,
            lora_dropout=0.3,
            seed=3,
        )
        if start is not None and is_lora:
            restore_adapter(start, model)
        policy = PolicyForward(model)
        optimizer = build_optimizer(policy, learning_rate=1e-2, weight_decay=0.1)
        state = TrainerState(
            policy=policy,
            optimizer=optimizer,
            scheduler=build_scheduler(optimizer, schedule="cosine", num_updates=NUM_UPDATES, warmup_fraction=0.2),
            window=MetricWindow(has_confidence=True),
            live=self.live() if self.confidence.source == "live" else None,
        )
        if start is not None:
            check_checkpoint(start, IDENTITY)
            load_training(start, state)
        return state

    def live(self) -> LiveConfidence:
        heads = [HybridReward(NUM_LAYERS, HIDDEN, generators=[torch.Generator().manual_seed(k)]) for k in range(2)]
        return LiveConfidence(
            heads,
            layers=(1, 2),
            settings=self.confidence,
            reward=RewardSection(),
            packing=PACKING,
            anchors=PairTable(anchor_pairs(self.table.slice(20))),
        )


def weights(state: TrainerState) -> dict[str, torch.Tensor]:
    found = dict(state.policy.state_dict())
    for number, head in enumerate(state.live.heads if state.live else []):
        found |= {f"head{number}.{name}": value for name, value in head.state_dict().items()}
    return found


def assert_bitwise(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize(
    ("adapter", "track"),
    [("full", None), ("lora", None), ("full", "none"), ("full", "anchor"), ("lora", "stored_order")],
)
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(
    model_dir: Path, tmp_path: Path, adapter: str, track: str | None
) -> None:
    """At the first update, in the middle of an epoch and of a metric window, at an epoch's end, at the last update."""
    points = {update: tmp_path / f"step_{update}" for update in (1, 4, 5, 9, NUM_UPDATES)}
    trial = Trial(model_dir, adapter=adapter, track=track)
    whole = trial.run(save_to=points)
    records = dict(trial.records)

    for update, directory in points.items():
        trial = Trial(model_dir, adapter=adapter, track=track)
        resumed = trial.run(start=directory)
        assert_bitwise(weights(resumed), weights(whole))
        for step, record in trial.records.items():
            for name, value in record.items():
                assert name.startswith("perf/") or value == records[step][name], (update, step, name)
        if resumed.live is not None and whole.live is not None:
            assert resumed.live.center == whole.live.center


def test_dropout_is_really_drawn(model_dir: Path, tmp_path: Path) -> None:
    """Guards the test above: without dropout, resuming its stream would prove nothing."""
    trial = Trial(model_dir, adapter="lora")
    batch = PACKING.pack(PairTable(trial.table).batch(range(3)).tokens, _first_three(), _world())
    policy = trial.build(None).policy.train()
    trained = trial.run().policy.train()
    assert torch.equal(policy(batch).chosen_logps, policy(batch).chosen_logps)  # B of the adapter is zero at the start
    assert not torch.equal(trained(batch).chosen_logps, trained(batch).chosen_logps)


def _first_three() -> Any:
    from raylign.data.packing import MicroBatch

    return MicroBatch((0, 1, 2))


def _world() -> Any:
    from raylign.training.world import World

    return World()


def test_plain_transformers_loads_the_trained_policy(model_dir: Path, tmp_path: Path) -> None:
    state = Trial(model_dir).run(save_to={NUM_UPDATES: tmp_path / "last"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last" / POLICY, dtype="auto")
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        trained = state.policy.model.eval()(ids).logits
        initial = AutoModelForCausalLM.from_pretrained(model_dir)(ids).logits
        assert torch.equal(loaded(ids).logits, trained)
    assert not torch.allclose(trained, initial, atol=1e-2)
    assert load_tokenizer(tmp_path / "last" / POLICY).eos_token_id == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft 0.21's use of it
def test_plain_peft_loads_the_trained_adapter(model_dir: Path, tmp_path: Path) -> None:
    state = Trial(model_dir, adapter="lora").run(save_to={NUM_UPDATES: tmp_path / "last"})
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        initial = base(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "last" / POLICY).eval()
        assert torch.equal(loaded(ids).logits, state.policy.model.eval()(ids).logits)
        assert not torch.allclose(loaded(ids).logits, initial, atol=1e-2)
    assert not (tmp_path / "last" / POLICY / "model.safetensors").exists()
    stored = json.loads((tmp_path / "last" / POLICY / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "org/base"  # and not the directory on this machine
    check_checkpoint(tmp_path / "last", IDENTITY)


@pytest.fixture
def checkpoint(model_dir: Path, tmp_path: Path) -> Path:
    Trial(model_dir).run(save_to={1: tmp_path / "step_1"})
    return tmp_path / "step_1"


def test_another_configuration_is_refused_by_key_and_values(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"train\.beta: was 0\.15, now 0\.5.*new run\.name"):
        check_checkpoint(checkpoint, IDENTITY | {"train.beta": 0.5})
    with pytest.raises(CheckpointError, match=r"pairs: was 'abc', now None"):
        check_checkpoint(checkpoint, {"train.beta": 0.15})
    check_checkpoint(checkpoint, {"train.beta": 0.15}, unknown=["pairs"])


def test_damage_is_named_with_a_cure(checkpoint: Path) -> None:
    weights_file = checkpoint / POLICY / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"policy/model\.safetensors has \d+ bytes instead of.*new run\.name"):
        check_checkpoint(checkpoint, IDENTITY)
    weights_file.unlink()
    with pytest.raises(CheckpointError, match=r"policy/model\.safetensors is missing"):
        check_checkpoint(checkpoint, IDENTITY)


def test_a_directory_without_trainer_state_is_refused(model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no trainer checkpoint"):
        check_checkpoint(model_dir, IDENTITY)


def test_another_schema_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "trainer_state" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99, this version reads 1"):
        check_checkpoint(checkpoint, IDENTITY)


def test_unreadable_training_state_is_refused(checkpoint: Path, model_dir: Path) -> None:
    state = Trial(model_dir).build(None)
    file = checkpoint / "trainer_state" / "training.pt"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"training\.pt cannot be read"):
        load_training(checkpoint, state)


def test_nothing_is_unpickled_from_a_checkpoint(checkpoint: Path, model_dir: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)

    torch.save({"optimizer": Attack()}, checkpoint / "trainer_state" / "training.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_training(checkpoint, Trial(model_dir).build(None))
    assert not (tmp_path / "owned").exists()


def test_live_state_needs_a_live_run(checkpoint: Path, model_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"another confidence\.source"):
        load_training(checkpoint, Trial(model_dir, track="none").build(None))
