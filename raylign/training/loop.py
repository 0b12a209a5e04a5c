"""The off-policy training loop of one worker, without Ray: updates, metric records, checkpoints at fixed updates."""

from __future__ import annotations

from collections.abc import Callable

from raylign.config import ConfidenceSection, TrainSection
from raylign.training.micro_batches import Packing
from raylign.training.offline import offline_update
from raylign.training.order import DataOrder
from raylign.training.state import TrainerState
from raylign.training.table import PairTable, with_batch_level
from raylign.training.world import World

RecordCallback = Callable[[dict[str, float]], None]
CheckpointCallback = Callable[[TrainerState, dict[str, float]], None]


def train_offline(
    state: TrainerState,
    table: PairTable,
    order: DataOrder,
    *,
    settings: TrainSection,
    confidence: ConfidenceSection,
    packing: Packing,
    seed: int,
    world: World | None = None,
    on_record: RecordCallback = lambda record: None,
    on_checkpoint: CheckpointCallback = lambda state, record: None,
) -> dict[str, float]:
    """Run the updates that `state` has not finished yet.

    Args:
        state: changed in place; `state.update` says where to start.
        table: training pairs, the same on every worker.
        order: which pairs each update sees.
        settings: objective, optimiser constants, and how often to record and to checkpoint.
        confidence: level and floor of a gamma that comes from the data.
        packing: how micro-batches are cut.
        seed: of the run.
        world: this worker.
        on_record: gets the metrics of every `log_every` updates and of the last one.
        on_checkpoint: called after every `checkpoint_every` updates and after the last one, on every worker, with the
            newest record.

    Returns:
        The last record; empty when there was nothing left to do.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    record: dict[str, float] = {}
    num_updates = order.num_updates
    state.window.restart_clock()
    while state.update < num_updates:
        batch = table.batch(order.batch(state.update))
        if state.live is None and confidence.level == "batch":
            batch = with_batch_level(batch, floor=confidence.floor)
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
        )
        state.window.add(summary)
        epoch = order.epoch_after(state.update)
        state.update += 1
        is_last = state.update == num_updates
        if is_last or state.update % settings.log_every == 0:
            record = state.window.record(step=state.update, epoch=epoch)
            on_record(record)
        if is_last or state.update % settings.checkpoint_every == 0:
            on_checkpoint(state, record)
            state.window.restart_clock()
    return record
