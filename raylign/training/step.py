"""What every optimiser step shares: seeded dropout, gradients communicated once, clipping, and the check for nan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylign.errors import TrainingError
from raylign.training.world import World


@contextmanager
def seeded(seed: int, update: int, world: World) -> Iterator[None]:
    """Dropout as a function of (seed, update, rank): nothing to save, nothing to restore, no global seed touched."""
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # One stream per (run, update, worker); the odd factors keep neighbouring triples apart.
        torch.manual_seed((seed * 1_000_003 + update) * 65_537 + world.rank)
        yield


@contextmanager
def gradient_sync(policy: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Communicate gradients with the last micro-batch only, where whole gradients are kept anyway.

    Shards are reduced with every micro-batch: without it FSDP2 would hold the whole gradient in float32 on each worker.
    """
    with policy.no_sync() if isinstance(policy, DistributedDataParallel) and not is_last else nullcontext():
        yield


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a joint norm of at most `max_norm`, and return the norm before."""
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
    # FSDP2 returns a DTensor that holds this worker's part of the norm.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def check_finite(
    loss: torch.Tensor, grad_norm: float, update: int, *, learning_rate: float, items: str = "pairs"
) -> None:
    """Stop before a step that would spoil the weights.

    Args:
        loss: of each item of the batch, any shape.
        grad_norm: of the whole gradient.
        update: number of updates finished before this one.
        learning_rate: peak step, named in the cure.
        items: what the losses are of, for the message.

    Raises:
        TrainingError: a loss or the norm is not finite.
    """
    num_bad = int((~loss.isfinite()).sum())
    if num_bad:
        problem = f"the loss of {num_bad} of {loss.numel()} {items} is not finite"
    elif not torch.isfinite(torch.tensor(grad_norm)):
        problem = f"the gradient norm is {grad_norm}"
    else:
        return
    raise TrainingError(
        f"update {update + 1}: {problem}; lower train.learning_rate (now {learning_rate:g}), lengthen "
        "train.warmup_fraction, or set policy.dtype=float32"
    )
