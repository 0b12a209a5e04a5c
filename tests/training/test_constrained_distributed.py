"""Two workers do what one does under a constraint: the same multiplier to the bit, weights up to rounding.

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
from constrained_rounds import costly_round
from safetensors.torch import load_file
from tiny_run import save_tiny_model

from raylign.config import load_config
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.training.constrained import start_multiplier
from raylign.training.gradient_metrics import GradientWindow
from raylign.training.micro_batches import Packing
from raylign.training.online_loop import train_online
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.parallel import distribute, unwrap
from raylign.training.response_logps import round_logps
from raylign.training.rounds import Round, RoundSchedule
from raylign.training.state import POLICY, TrainerState, save_checkpoint
from raylign.training.world import World

SCHEDULE = RoundSchedule(num_prompts=8, prompts_per_round=5, num_rounds=3, batch_size=3, round_epochs=1, seed=0)
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=48)
METHODS: dict[str, dict[str, Any]] = {
    "critics": {"constraint": {"kind": "rectified"}, "policy_gradient": {"advantage": "gae"}},
    "parts": {"constraint": {"kind": "split", "split_reduction": "per_part"}},
}
# the second round is safe: no worker has an unsafe response, and all join every collective
SHIFTS = (0.5, -9.0, 0.5)


def train(model_dir: str, output: str, method: str, parallel: str, world: World) -> None:
    train = {"method": "policy_gradient", "parallel": parallel, "log_every": 1, "learning_rate": 1e-2}
    config = load_config(values={**METHODS[method], "train": train})
    is_gae = config.policy_gradient.advantage == "gae"
    module = distribute(
        PolicyForward(load_policy(model_dir, dtype="float32"), num_values=2 * is_gae),
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
    state = TrainerState(
        policy=module,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, schedule="constant", num_updates=SCHEDULE.num_updates, warmup_fraction=0),
        window=GradientWindow(has_cost_values=is_gae),
        multiplier=start_multiplier(config.constraint),
    )
    records: list[dict[str, float]] = []

    def open_round(index: int, state: TrainerState) -> Round:
        round_ = costly_round(5, 3, index=index, shift=SHIFTS[index])
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
    assert state.multiplier is not None
    told = {"records": records, "multiplier": state.multiplier.state_dict()}
    torch.save(told, Path(output) / f"told_{world.rank}.pt")


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
@pytest.mark.parametrize(("method", "parallel"), [("critics", "ddp"), ("critics", "fsdp"), ("parts", "ddp")])
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
        torch.load(tmp_path / file, weights_only=True) for file in ("one/told_0.pt", "two/told_0.pt", "two/told_1.pt")
    )
    assert first["multiplier"] == second["multiplier"] == one["multiplier"]
    told = [r["constraint/multiplier"] for r in one["records"] if "constraint/multiplier" in r]
    assert told[0] > 1.0
    assert len(set(told)) > 1
    rates = [r["constraint/safety_rate"] for r in one["records"] if "constraint/multiplier" in r]
    assert rates[1] == 1 > rates[0]
    for ours, theirs, alone in zip(first["records"], second["records"], one["records"], strict=True):
        for name in alone:
            if not name.startswith("perf/"):
                assert ours[name] == theirs[name], name
                assert ours[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4), name
    last = f"step_{SCHEDULE.num_updates}"
    weights = [load_file(tmp_path / name / last / POLICY / "model.safetensors") for name in ("one", "two")]
    start = load_file(model_dir / "model.safetensors")
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=2e-4)
    assert any((weights[0][name] - start[name]).abs().max() > 1e-3 for name in start)
