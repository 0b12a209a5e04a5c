"""What runs inside one Ray Train worker: build the state, resume it, train, report checkpoints.

Everything that computes lives in `raylign.training`; this file connects it to Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train

from raylign.config import RunConfig
from raylign.config_effects import AVA
from raylign.cost.ledger import Ledger
from raylign.errors import RaylignError, ResourceError, TrainingError
from raylign.runtime.reporter import Reporter

if TYPE_CHECKING:
    from raylign.models.forward import PolicyForward
    from raylign.training.live_confidence import LiveConfidence
    from raylign.training.micro_batches import Packing
    from raylign.training.state import TrainerState
    from raylign.training.table import PairTable
    from raylign.training.update_costs import UpdateCosts
    from raylign.training.world import World

PAIRS = "pairs"  # the entry of a checkpoint's identity that only workers can tell


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTask:
    """What the driver tells every worker.

    Attributes:
        config: of the run.
        pairs: directory of parquet files with ranked pairs, or what a subclass says.
        model: directory of the policy before training.
        identity: what checkpoints belong to, see `run_identity`.
        base: what an adapter calls that model, see `base_model_name`.
        reward: directory of the reward phase, None unless confidence.source=live.
        metrics: file that the first worker appends records to.
        ledger: what updates cost is recorded here, None not at all.
        devices: what is held while the workers train, by kind ("cpu", "gpu").
    """

    config: RunConfig
    pairs: str
    model: str
    base: str | None
    identity: dict[str, Any]
    reward: str | None
    metrics: str
    ledger: Ledger | None = None
    devices: Mapping[str, float] = field(default_factory=dict)


def train_worker(loop_config: Mapping[str, Any]) -> TrainingError | None:
    """Train function of Ray Train.

    Args:
        loop_config: {"task": WorkerTask}.

    Returns:
        The error that ended training on all workers at the same update, where a restart would only repeat it; None
        when training is done.

    Raises:
        RaylignError: any other error; Ray restarts the workers up to train.max_failures times.
    """
    return final_error(lambda: _train(loop_config["task"]))


def final_error(work: Callable[[], None]) -> TrainingError | None:
    """Do the work of a train function; name the worker in its errors, and return the one that a restart would repeat.

    Args:
        work: raises a `TrainingError` on all workers or on none.

    Raises:
        RaylignError: any other error.
    """
    import torch

    context = ray.train.get_context()
    worker = f"training worker {context.get_world_rank()} of {context.get_world_size()}"
    try:
        work()
    except RaylignError as error:
        error.args = (f"{worker}: {error}",)
        if isinstance(error, TrainingError):
            return error
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{worker} ran out of device memory ({str(error).splitlines()[0]}); lower train.batch_tokens, set "
            "policy.gradient_checkpointing=true, or under a new run.name policy.adapter=lora or train.parallel=fsdp"
        ) from error
    return None


def start_worker(config: RunConfig) -> World:
    """Settle the threads of this process, and say which worker it is."""
    import torch
    from transformers.utils import logging as transformers_logging

    # Ray grants CPUs, torch would use all of the machine's.
    torch.set_num_threads(max(1, int(config.resources.cpus_per_worker)))
    transformers_logging.disable_progress_bar()
    return _world(config)


def _train(task: WorkerTask) -> None:
    from raylign.training.loop import train_offline
    from raylign.training.order import DataOrder
    from raylign.training.state import check_checkpoint, load_training
    from raylign.training.table import PairTable, read_split

    config = task.config
    world = start_worker(config)
    table = PairTable(read_split(task.pairs, "train"))
    order = DataOrder(
        num_pairs=len(table),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
    )
    identity = task.identity | {PAIRS: table.fingerprint}
    reporter = Reporter(task, world, identity)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state, packing = build_state(task, table, order, world)
    else:
        with checkpoint.as_directory() as path:
            directory = Path(path)
            check_checkpoint(directory, identity)
            state, packing = build_state(task, table, order, world, checkpoint=directory)
            load_training(directory, state)
    reporter.start(state.update)
    train_offline(
        state,
        table,
        order,
        settings=config.train,
        packing=packing,
        seed=config.run.seed,
        world=world,
        on_record=reporter.record,
        on_checkpoint=reporter.checkpoint,
        costs=update_costs(task, state, packing, world),
    )


def update_costs(task: WorkerTask, state: TrainerState, packing: Packing, world: World) -> UpdateCosts:
    """Where this worker records what its updates cost; nowhere unless it is the first.

    Args:
        task: with the ledger.
        state: with the policy.
        packing: whose layout decides how often a prompt is computed.
        world: this worker.
    """
    from raylign.cost.flops import Work, backward_factor
    from raylign.cost.shapes import forward_flops
    from raylign.training.parallel import unwrap
    from raylign.training.update_costs import UpdateCosts

    if world.rank != 0 or task.ledger is None:
        return UpdateCosts()
    forward, policy = forward_flops(unwrap(state.policy).model), task.config.policy
    factor = backward_factor(is_adapter=policy.adapter == "lora", has_checkpointing=policy.gradient_checkpointing)

    def flops(work: Work) -> int:
        return (1 + factor) * forward(work)

    return UpdateCosts(task.ledger, devices=task.devices, flops=flops, is_shared=packing.layout == "shared")


def build_state(
    task: WorkerTask, table: PairTable, order: Any, world: World, *, checkpoint: Path | None = None
) -> tuple[TrainerState, Packing]:
    """Policy, optimizer, schedule and confidence of one worker, before or (weights only) after a checkpoint.

    Args:
        task: from the driver.
        table: training pairs.
        order: of the run, for the length of the schedule.
        world: this worker.
        checkpoint: whole checkpoint directory whose weights are loaded instead of the initial ones.

    Raises:
        ModelError: the model directory cannot be used.
        DataError: the pairs lack what the objective needs.
    """
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.training.metrics import MetricWindow
    from raylign.training.micro_batches import Packing
    from raylign.training.optim import build_optimizer, build_scheduler
    from raylign.training.parallel import distribute, unwrap
    from raylign.training.state import TrainerState
    from raylign.training.variational import Variational

    train = task.config.train
    policy = load_policy_forward(task, world, checkpoint=checkpoint)
    tokenizer = load_tokenizer(task.model, trust_remote_code=task.config.policy.trust_remote_code)
    packing = Packing(
        layout=resolve_layout(train.layout, policy.causal_lm.config),
        pad_token_id=tokenizer.pad_token_id,
        batch_tokens=train.batch_tokens,
    )
    live = build_live_confidence(task, table, packing, world, num_layers=policy.num_layers)
    module = distribute(policy, parallel=train.parallel, world=world)
    optimizer = build_optimizer(
        module,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        heads=getattr(unwrap(module), "token_heads", None),
        head_learning_rate=task.config.ava.head_learning_rate,
    )
    scheduler = build_scheduler(
        optimizer, schedule=train.schedule, num_updates=order.num_updates, warmup_fraction=train.warmup_fraction
    )
    state = TrainerState(
        policy=module,
        optimizer=optimizer,
        scheduler=scheduler,
        window=MetricWindow(has_confidence=train.objective == "label_confidence"),
        live=live,
    )
    if train.objective == "ava_p" or train.objective == "ava_d":
        state.variational = Variational(train.objective, task.config.ava, world=world)
    return state, packing


def load_policy_forward(
    task: WorkerTask, world: World, *, checkpoint: Path | None = None, num_values: int = 0
) -> PolicyForward:
    """The policy on the CPU: float32 weights under mixed precision, or a LoRA adapter over weights of compute type.

    For offline ava_p and ava_d it states rewards of tokens as well.
    """
    from raylign.models.forward import PolicyForward
    from raylign.models.loading import load_policy, resolve_dtype
    from raylign.models.numerics import compute_type, policy_numerics
    from raylign.models.token_forward import TokenForm
    from raylign.models.variational_policy import VariationalPolicy
    from raylign.training.state import POLICY, restore_adapter

    policy = task.config.policy
    compute = compute_type(policy.dtype, world.device)
    numerics = policy_numerics(policy, compute, parallel=task.config.train.parallel)
    is_lora = policy.adapter == "lora"
    model = load_policy(
        checkpoint / POLICY if checkpoint is not None and not is_lora else task.model,
        dtype=numerics.weights,
        adapter=policy.adapter,
        lora_rank=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        lora_dropout=policy.lora_dropout,
        seed=task.config.run.seed,
        trust_remote_code=policy.trust_remote_code,
        gradient_checkpointing=policy.gradient_checkpointing,
    )
    if checkpoint is not None and is_lora:
        restore_adapter(checkpoint, model)
    autocast = resolve_dtype(numerics.autocast) if numerics.autocast else None
    train, ava = task.config.train, task.config.ava
    if train.method == "offline" and train.objective in AVA:
        form = TokenForm(q_from=ava.q_from, logit_scale=ava.logit_scale, sigma_floor=ava.sigma_floor)
        return VariationalPolicy(model, form=form, seed=task.config.run.seed, autocast_dtype=autocast)
    return PolicyForward(model, autocast_dtype=autocast, num_values=num_values)


def build_live_confidence(
    task: WorkerTask, table: PairTable, packing: Packing, world: World, *, num_layers: int
) -> LiveConfidence | None:
    """Heads and anchors of confidence.source=live; None when gamma comes from the data or is not read.

    Raises:
        DataError: the pairs lack a gamma, their folds are not those of the heads, or the heads read other layers.
    """
    from raylign.errors import DataError
    from raylign.models.forward import resolve_layers
    from raylign.runtime.fitted_reward import FittedReward
    from raylign.training.live_confidence import LiveConfidence
    from raylign.training.table import PairTable, anchor_pairs, read_split

    config = task.config
    if config.train.objective != "label_confidence":
        return None
    if config.confidence.source == "fixed":
        if not table.has_label_confidence:
            raise DataError("the pairs have no label_confidence for every row; run the rank phase first")
        return None
    assert task.reward is not None
    reward = FittedReward.load(Path(task.reward))
    if table.max_fold >= len(reward.heads):
        raise DataError(f"a pair has fold {table.max_fold}, there are {len(reward.heads)} heads; rerun the rank phase")
    layers = reward.layers or resolve_layers(config.features.layers, num_layers)
    if len(layers) != reward.heads[0].num_layers or max(layers) > num_layers:
        raise DataError(
            f"the reward heads read {reward.heads[0].num_layers} layers, {list(layers)} of the policy's {num_layers} "
            "are given to them; set features.layers to what the features phase used, or fit the reward again"
        )
    anchors = anchor_pairs(read_split(task.pairs, "valid")) if config.confidence.track == "anchor" else None
    return LiveConfidence(
        reward.heads,
        layers=layers,
        settings=config.confidence,
        reward=config.reward,
        packing=packing,
        seed=config.run.seed,
        world=world,
        temperature=reward.temperature,
        anchors=PairTable(anchors) if anchors is not None and anchors.num_rows else None,
    )


def _world(config: RunConfig) -> World:
    import torch
    from ray.train.torch import get_device

    from raylign.training.world import World

    context = ray.train.get_context()
    device = get_device() if config.resources.gpus_per_worker else torch.device("cpu")
    return World(rank=context.get_world_rank(), size=context.get_world_size(), device=device)
