"""The trainer's own log-probabilities (and values) of given responses, computed in shares by all workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from raylign.training.micro_batches import Packing, encode
from raylign.training.online_pairs import couple_responses
from raylign.training.parallel import unwrap
from raylign.training.rounds import Round
from raylign.training.world import World
from raylign.types import TokenizedPair


def pair_token_logps(
    policy: nn.Module, pairs: Sequence[TokenizedPair], *, packing: Packing, world: World
) -> tuple[np.ndarray, np.ndarray | None]:
    """Log-probability of every response token of some pairs, without gradient or dropout.

    Args:
        policy: `PolicyForward`, plain or wrapped; a collective when it is sharded.
        pairs: the same on every worker.
        packing: how micro-batches are cut.
        world: this worker.

    Returns:
        (T,) float32 log-probabilities in nats: chosen then rejected tokens of the first pair, then of the next; and
        (T, H) float32 values, None without value heads. Bitwise the same on every worker.
    """
    value_heads = unwrap(policy).value_heads
    num_values = 0 if value_heads is None else value_heads.out_features
    chosen = np.array([len(pair.chosen_ids) for pair in pairs])
    rejected = np.array([len(pair.rejected_ids) for pair in pairs])
    starts = np.concatenate([[0], np.cumsum(chosen + rejected)])
    found = torch.zeros(1 + num_values, int(starts[-1]), dtype=torch.float64, device=world.device)
    for micro, scores in encode(policy, pairs, layers=None, packing=packing, world=world):
        if not micro.weight:
            continue
        first = [np.arange(starts[i], starts[i] + chosen[i]) for i in micro.indices]
        second = [np.arange(starts[i] + chosen[i], starts[i + 1]) for i in micro.indices]
        columns = torch.from_numpy(np.concatenate(first + second)).to(world.device)
        assert scores.token_logps is not None
        found[0, columns] = scores.token_logps.double()
        if scores.token_values is not None:
            found[1:, columns] = scores.token_values.double().T
    result = world.sum(found).float().cpu().numpy()
    return result[0], result[1:].T.copy() if num_values else None


def round_logps(
    policy: nn.Module, round_: Round, *, packing: Packing, world: World
) -> tuple[np.ndarray, np.ndarray | None]:
    """`pair_token_logps` of all responses of a round, in the order of its tokens: (N,) and (N, H) or None."""
    couples = couple_responses(round_)
    logps, values = pair_token_logps(policy, couples.tokens, packing=packing, world=world)
    order = np.concatenate(
        [
            np.arange(round_.offsets[position], round_.offsets[position + 1])
            for couple in couples.positions
            for position in couple
        ]
    )
    logps_N = np.zeros(round_.offsets[-1], np.float32)
    logps_N[order] = logps
    if values is None:
        return logps_N, None
    values_NH = np.zeros((round_.offsets[-1], values.shape[1]), np.float32)
    values_NH[order] = values
    return logps_N, values_NH
