"""How one worker cuts its share of a batch into forwards, and how it runs a forward that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from raylign.data.packing import MicroBatch, pack_pairs, pair_tokens, plan_micro_batches
from raylign.training.world import World
from raylign.types import Layout, PackedBatch, PairScores, TokenizedPair


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What a micro-batch looks like.

    Attributes:
        layout: of the rows, see `PackedBatch`.
        pad_token_id: fills unused columns.
        batch_tokens: token budget of one micro-batch.
    """

    layout: Layout
    pad_token_id: int
    batch_tokens: int

    def plan(self, pairs: Sequence[TokenizedPair], world: World) -> list[MicroBatch]:
        """This worker's micro-batches of a batch that all workers know; every worker gets as many."""
        tokens = [pair_tokens(pair, self.layout) for pair in pairs]
        return plan_micro_batches(tokens, batch_tokens=self.batch_tokens, num_workers=world.size)[world.rank]

    def pack(self, pairs: Sequence[TokenizedPair], micro: MicroBatch, world: World) -> PackedBatch:
        """One micro-batch on this worker's device; `pair_index` holds positions in `pairs`."""
        chosen = [pairs[index] for index in micro.indices]
        packed = pack_pairs(chosen, layout=self.layout, pad_token_id=self.pad_token_id, pair_index=micro.indices)
        return packed.to(world.device)


def encode(
    policy: nn.Module, pairs: Sequence[TokenizedPair], *, layers: tuple[int, ...] | None, packing: Packing, world: World
) -> Iterator[tuple[MicroBatch, PairScores]]:
    """Forward this worker's share of the pairs without gradient, dropout, or use of the random generators.

    Every worker runs the same number of forwards, fillers included (`weight` 0), because a sharded model's forward is
    a collective.

    Args:
        policy: what training calls, wrapped or not.
        pairs: the whole batch, the same on every worker.
        layers: states to keep, None for none.
        packing: how micro-batches are cut.
        world: this worker.

    Yields:
        Each micro-batch and its scores.
    """
    try:
        with _evaluating(policy), torch.no_grad():
            for micro in packing.plan(pairs, world):
                yield micro, policy(packing.pack(pairs, micro, world), layers=layers)
    finally:
        # FSDP2 keeps its root whole until a backward, which does not come here; a checkpoint needs the shards.
        if isinstance(policy, FSDPModule):
            policy.reshard()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
