"""Two workers train what one worker trains: DDP and FSDP2 on CPU with gloo, with fixed and with live confidence.

Real here: two processes, torch.distributed, the model, the checkpoint. Ray is not involved.
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
from tiny_run import HIDDEN, NUM_LAYERS, save_tiny_model, tiny_table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from raylign.config import RunConfig, load_config
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, load_tokenizer
from raylign.models.token_forward import HEADS_FILE, TokenForm
from raylign.models.variational_policy import VariationalPolicy
from raylign.rewards.hybrid import HybridReward
from raylign.training.live_confidence import LiveConfidence
from raylign.training.loop import train_offline
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.order import DataOrder
from raylign.training.parallel import distribute
from raylign.training.state import (
    POLICY,
    TOKEN_HEADS,
    TrainerState,
    check_checkpoint,
    load_training,
    restore_adapter,
    save_checkpoint,
)
from raylign.training.step import gradient_sync
from raylign.training.table import PairTable
from raylign.training.variational import Variational
from raylign.training.world import World

# Token budget of about two pairs: workers accumulate, and get fillers when the last batch has one pair.
PACKING = Packing(layout="shared", pad_token_id=0, batch_tokens=40)
NUM_PAIRS = 13


def make_config(values: dict[str, Any]) -> RunConfig:
    train = {"batch_size": 4, "epochs": 2, "learning_rate": 5e-3, "log_every": 1, "checkpoint_every": 3}
    return load_config(values={**values, "train": train | values.get("train", {})})


def train(
    model_dir: str, output: str, values: dict[str, Any], world: World, start: str | None = None
) -> list[dict[str, float]]:
    """Train on this worker; the first one writes `output`/step_N and returns the metric records."""
    config = make_config(values)
    is_lora = config.policy.adapter == "lora"
    origin = model_dir if start is None or is_lora else Path(start) / POLICY
    model = load_policy(origin, dtype="float32", adapter=config.policy.adapter, seed=0)
    if start is not None:
        check_checkpoint(Path(start), {})
        if is_lora:
            restore_adapter(Path(start), model)
    is_variational = config.train.objective in ("ava_p", "ava_d")
    forward = PolicyForward(model)
    if is_variational:
        forward = VariationalPolicy(model, form=TokenForm(q_from="logits", sigma_floor=0.01), seed=0)
    policy = distribute(forward, parallel=config.train.parallel, world=world)
    optimizer = build_optimizer(policy, learning_rate=config.train.learning_rate, weight_decay=0.1)
    table = PairTable(tiny_table(NUM_PAIRS))
    order = DataOrder(num_pairs=NUM_PAIRS, batch_size=4, seed=0, epochs=2)
    state = TrainerState(
        policy=policy,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, schedule="linear", num_updates=order.num_updates, warmup_fraction=0.1),
        window=MetricWindow(has_confidence=True),
        live=make_live(config, world) if config.confidence.source == "live" else None,
        variational=Variational(config.train.objective, config.ava, world=world) if is_variational else None,
    )
    if start is not None:
        load_training(Path(start), state)
    records: list[dict[str, float]] = []
    train_offline(
        state,
        table,
        order,
        settings=config.train,
        packing=PACKING,
        seed=0,
        world=world,
        on_record=records.append,
        on_checkpoint=lambda state, _: save_checkpoint(
            Path(output) / f"step_{state.update}",
            state,
            tokenizer=load_tokenizer(model_dir),
            identity={},
            world=world,
        ),
    )
    return records


def make_live(config: RunConfig, world: World) -> LiveConfidence:
    heads = [HybridReward(NUM_LAYERS, HIDDEN, generators=[torch.Generator().manual_seed(k)]) for k in range(2)]
    anchors = tiny_table(0, num_valid=5, seed=4)
    return LiveConfidence(
        heads,
        layers=(1, 2),
        settings=config.confidence,
        reward=config.reward,
        packing=PACKING,
        world=world,
        anchors=PairTable(anchors),
    )


def _worker(rank: int, port: int, arguments: tuple[Any, ...], output: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        records = train(*arguments, world=World(rank=rank, size=2))
        torch.save(records, Path(output) / f"records_{rank}.pt")
    finally:
        gc.collect()  # DDP's reducer, destroyed after its group, waits for a thread that waits for Python
        dist.destroy_process_group()


def train_on_two(model_dir: Path, output: Path, values: dict[str, Any], start: Path | None = None) -> list[Any]:
    output.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(model_dir), str(output), values)
    start_name = None if start is None else str(start)
    mp.spawn(_start_from, args=(port, arguments, str(output), start_name), nprocs=2, daemon=True)
    return [torch.load(output / f"records_{rank}.pt", weights_only=True) for rank in (0, 1)]


def _start_from(rank: int, port: int, arguments: tuple[Any, ...], output: str, start: str | None) -> None:
    import functools

    global train
    train = functools.partial(train, start=start)
    _worker(rank, port, arguments, output)


def weights(output: Path, step: int = 8) -> dict[str, torch.Tensor]:
    """Of the policy, and of its heads of tokens where it has them."""
    checkpoint = output / f"step_{step}"
    found = load_file(next((checkpoint / POLICY).glob("*.safetensors")))
    heads = checkpoint / TOKEN_HEADS / HEADS_FILE
    return found | (load_file(heads) if heads.exists() else {})


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


FSDP = {"train": {"parallel": "fsdp"}}
LIVE_BATCH = {"confidence": {"source": "live", "level": "batch", "track": "anchor", "track_batch_size": 2}}
LIVE_PAIR = {"confidence": {"source": "live", "track": "stored_order"}}
AVA_P, AVA_D = {"train": {"objective": "ava_p"}}, {"train": {"objective": "ava_d", "parallel": "fsdp"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="ddp"),
        pytest.param(FSDP, id="fsdp"),
        pytest.param(FSDP | {"policy": {"adapter": "lora"}}, id="fsdp-lora"),
        pytest.param(LIVE_BATCH, id="ddp-live-batch-anchor"),
        pytest.param(LIVE_BATCH | FSDP, id="fsdp-live-batch-anchor"),
        pytest.param(LIVE_PAIR | FSDP, id="fsdp-live-pair-stored-order"),
        pytest.param(AVA_P, id="ddp-ava_p"),
        pytest.param(AVA_D, id="fsdp-ava_d"),
    ],
)
def test_two_workers_train_what_one_trains(model_dir: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    alone = values | {"train": {k: v for k, v in values.get("train", {}).items() if k != "parallel"}}
    one = train(str(model_dir), str(tmp_path / "one"), alone, World())
    two, second_rank = train_on_two(model_dir, tmp_path / "two", values)

    assert [r["step"] for r in two] == list(range(1, 9))
    for mine, theirs, others in zip(one, two, second_rank, strict=True):
        for name, value in mine.items():
            if not name.startswith("perf/"):
                assert theirs[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (mine["step"], name)
                assert others[name] == theirs[name]
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "objective"), [("full", "label_confidence"), ("lora", "label_confidence"), ("lora", "ava_p")]
)
def test_a_sharded_run_resumes_bitwise_and_one_worker_can_take_over(
    model_dir: Path, tmp_path: Path, adapter: str, objective: str
) -> None:
    values = {"policy": {"adapter": adapter}, "train": {"parallel": "fsdp", "objective": objective}}
    train_on_two(model_dir, tmp_path / "whole", values)
    train_on_two(model_dir, tmp_path / "resumed", values, start=tmp_path / "whole" / "step_3")
    train(
        str(model_dir),
        str(tmp_path / "alone"),
        {"policy": {"adapter": adapter}, "train": {"objective": objective}},
        World(),
        str(tmp_path / "whole/step_3"),
    )

    whole = weights(tmp_path / "whole")
    for name, value in weights(tmp_path / "resumed").items():
        assert torch.equal(value, whole[name]), name
    for name, value in weights(tmp_path / "alone").items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=2e-5)


def test_shards_are_reduced_with_every_micro_batch():
    """Otherwise FSDP2 keeps the whole gradient in float32 on every worker, and sharding saves nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = fully_shard(torch.nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))
        for is_last in (False, True):
            with gradient_sync(layer, is_last=is_last):
                layer(torch.ones(1, 3)).sum().backward()
            assert all(isinstance(weight.grad, DTensor) for weight in layer.parameters())
        assert layer.weight.grad.full_tensor().tolist() == [[2.0] * 3] * 2
    finally:
        dist.destroy_process_group()
