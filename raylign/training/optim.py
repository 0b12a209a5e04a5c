"""The optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    heads: nn.Module | None = None,
    head_learning_rate: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases) are never decayed.

    Args:
        model: the module to train; frozen parameters are left out.
        learning_rate: peak step.
        weight_decay: decoupled decay of matrices.
        heads: new part of `model`, which has a step of its own and no decay.
        head_learning_rate: that step.

    Returns:
        Optimizer with the moments of Adam at (0.9, 0.999), the field's default for preference tuning.
    """
    own = [] if heads is None else list(heads.parameters())
    is_head = {id(parameter) for parameter in own}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in is_head]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": own, "weight_decay": 0.0, "lr": head_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Literal["cosine", "linear", "constant"],
    num_updates: int,
    warmup_fraction: float,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then the schedule; step it once per update.

    Args:
        optimizer: whose peak learning rate is scaled.
        schedule: shape after the warm-up; cosine and linear end at zero after the last update.
        num_updates: updates of the whole run.
        warmup_fraction: share of them that warm up, rounded up.
    """
    num_warmup = math.ceil(warmup_fraction * num_updates)

    def scale(update: int) -> float:
        return learning_rate_scale(update, schedule=schedule, num_updates=num_updates, num_warmup=num_warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def learning_rate_scale(
    update: int, *, schedule: Literal["cosine", "linear", "constant"], num_updates: int, num_warmup: int
) -> float:
    """Share of the peak learning rate that update `update` (from 0) uses.

    Definition: (u + 1) / num_warmup while warming up; then with x the share of the remaining updates that is done,
    (1 + cos(pi x)) / 2, 1 - x, or 1. The first update already moves the weights and the last one still does.
    """
    if update < num_warmup:
        return (update + 1) / num_warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (update - num_warmup) / max(1, num_updates - num_warmup))
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that the optimiser moves."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
