"""The off-policy training loop of one worker, without Ray: updates, metric records, checkpoints at fixed updates."""

from __future__ import annotations

from collections.abc import Callable

from raylign.config import TrainSection
from raylign.training.metrics import MetricWindow
from raylign.training.micro_batches import Packing
from raylign.training.offline import offline_update
from raylign.training.order import DataOrder
from raylign.training.state import TrainerState
from raylign.training.table import PairTable
from raylign.training.update_costs import UpdateCosts
from raylign.training.world import World

RecordCallback = Callable[[dict[str, float]], None]
CheckpointCallback = Callable[[TrainerState, dict[str, float]], None]


def train_offline(
    state: TrainerState,
    table: PairTable,
    order: DataOrder,
    *,
    settings: TrainSection,
    packing: Packing,
    seed: int,
    world: World | None = None,
    on_record: RecordCallback = lambda record: None,
    on_checkpoint: CheckpointCallback = lambda state, record: None,
    costs: UpdateCosts | None = None,
) -> dict[str, float]:
    """Run the updates that `state` has not finished yet.

    Args:
        state: changed in place; `state.update` says where to start.
        table: training pairs, the same on every worker.
        order: which pairs each update sees.
        settings: objective, optimiser constants, and how often to record and to checkpoint.
        packing: how micro-batches are cut.
        seed: of the run.
        world: this worker.
        on_record: gets the metrics of every `log_every` updates and of the last one.
        on_checkpoint: called after every `checkpoint_every` updates and after the last one, on every worker, with the
            record of its own update: means since the last record that `on_record` got.
        costs: what the updates cost is recorded here, checkpoints and records left out.

    Returns:
        The record of the last update; empty when there was nothing left to do.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    record: dict[str, float] = {}
    num_updates = order.num_updates
    state.window.restart_clock()
    with costs or UpdateCosts() as costs:
        while state.update < num_updates:
            costs.begin()
            batch = table.batch(order.batch(state.update))
            is_last = state.update + 1 == num_updates
            is_logged = is_last or (state.update + 1) % settings.log_every == 0
            summary = offline_update(
                state.policy,
                state.optimizer,
                state.scheduler,
                batch,
                update=state.update,
                settings=settings,
                packing=packing,
                seed=seed,
                world=world,
                live=state.live,
                variational=state.variational,
                is_logged=is_logged,
                costs=costs,
            )
            costs.count(batch.tokens)
            assert isinstance(state.window, MetricWindow)
            state.window.add(summary)
            epoch = order.epoch_after(state.update)
            state.update += 1
            is_checkpoint = is_last or state.update % settings.checkpoint_every == 0
            if is_logged or is_checkpoint:
                costs.end()
                record = state.window.record(step=state.update, epoch=epoch)
            if is_logged:
                on_record(record)
                state.window.clear()
            if is_checkpoint:
                on_checkpoint(state, record)
                state.window.restart_clock()
    return record
