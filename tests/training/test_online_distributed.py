"""Two workers do what one does: rounds, values and policy gradients under DDP and FSDP2.

Real here: two processes, torch.distributed, the model, the checkpoint. Made up: the responses. Ray is not involved.
"""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tiny_rounds import tiny_round
from tiny_run import save_tiny_model

from raylign.config import load_config
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.online_loop import train_online
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.parallel import distribute, unwrap
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round, RoundSchedule
from raylign.training.state import POLICY, TrainerState, load_training, save_checkpoint
from raylign.training.world import World

SCHEDULE = RoundSchedule(num_prompts=8, prompts_per_round=5, num_rounds=2, batch_size=3, round_epochs=1, seed=0)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=48)
METHODS: dict[str, dict[str, Any]] = {
    "online_dpo": {"train": {"method": "online_dpo"}, "online": {"reference": "previous_round"}},
    "gae": {"train": {"method": "policy_gradient"}, "policy_gradient": {"advantage": "gae"}},
}


def train(model_dir: str, output: str, method: str, parallel: str, world: World) -> None:
    values = METHODS[method]
    values = {**values, "train": {**values["train"], "parallel": parallel, "log_every": 1, "learning_rate": 1e-2}}
    config = load_config(values=values)
    is_gradient = config.train.method == "policy_gradient"
    module = distribute(
        PolicyForward(load_policy(model_dir, dtype="float32"), num_values=int(is_gradient)),
        parallel=config.train.parallel if world.size > 1 else "ddp",
        world=world,
    )
    optimizer = build_optimizer(
        module,
        learning_rate=1e-2,
        weight_decay=0.0,
        heads=unwrap(module).value_heads,
        head_learning_rate=1e-2,
    )
    scheduler = build_scheduler(optimizer, schedule="constant", num_updates=SCHEDULE.num_updates, warmup_fraction=0)
    window = GradientWindow() if is_gradient else MetricWindow(has_confidence=False)
    state = TrainerState(policy=module, optimizer=optimizer, scheduler=scheduler, window=window)
    records: list[dict[str, float]] = []

    def open_round(index: int, state: TrainerState) -> Round:
        round_ = tiny_round(5, 3, index=index)
        return round_.with_policy(*round_logps(state.policy, round_, packing=PACKING, world=world))

    def save(state: TrainerState, record: dict[str, float]) -> None:
        directory = Path(output) / f"step_{state.update}"
        save_checkpoint(directory, state, tokenizer=load_tokenizer(model_dir), identity={}, world=world)

    train_online(
        state,
        open_round,
        SCHEDULE,
        config=config,
        packing=PACKING,
        world=world,
        on_record=records.append,
        on_checkpoint=save,
    )
    torch.save(records, Path(output) / f"records_{world.rank}.pt")


def worker(rank: int, port: int, arguments: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        train(*arguments, world=World(rank=rank, size=2))
    finally:
        gc.collect()  # DDP's reducer, destroyed after its group, waits for a thread that waits for Python
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parallel"), [("online_dpo", "ddp"), ("gae", "ddp"), ("gae", "fsdp")])
def test_two_workers_end_where_one_does(tmp_path: Path, method: str, parallel: str) -> None:
    model_dir = save_tiny_model(tmp_path / "model")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(str(model_dir), str(tmp_path / "one"), method, parallel, World())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, (str(model_dir), str(tmp_path / "two"), method, parallel)), nprocs=2, daemon=True)
    one, first, second = (
        torch.load(file, weights_only=True)
        for file in (tmp_path / "one/records_0.pt", tmp_path / "two/records_0.pt", tmp_path / "two/records_1.pt")
    )
    for ours, theirs, alone in zip(first, second, one, strict=True):
        for name in alone:
            if not name.startswith("perf/"):
                assert ours[name] == theirs[name], name
            # at the start of a round policy and moving reference are one: which is larger is rounding
            if not name.startswith(("perf/", "rewards/accuracies")):
                assert ours[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4), name
    last = f"step_{SCHEDULE.num_updates}"
    weights = [load_file(tmp_path / name / last / POLICY / "model.safetensors") for name in ("one", "two")]
    start = load_file(model_dir / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == start.keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-4)
    assert any((weights[0][name] - start[name]).abs().max() > 1e-3 for name in start)
    if method == "gae":  # a checkpoint of shards holds whole value heads, which a single process reads
        policies = []
        for name in ("one", "two"):
            directory = tmp_path / name / last
            policy = PolicyForward(load_policy(directory / POLICY, dtype="float32"), num_values=1)
            optimizer = build_optimizer(
                policy, learning_rate=1e-2, weight_decay=0.0, heads=policy.value_heads, head_learning_rate=1e-2
            )
            scheduler = build_scheduler(
                optimizer, schedule="constant", num_updates=SCHEDULE.num_updates, warmup_fraction=0
            )
            state = TrainerState(policy=policy, optimizer=optimizer, scheduler=scheduler, window=GradientWindow())
            load_training(directory, state)
            policies.append(policy)
        assert policies[0].value_heads.weight.any()
        torch.testing.assert_close(policies[0].value_heads.weight, policies[1].value_heads.weight, rtol=1e-2, atol=1e-3)
