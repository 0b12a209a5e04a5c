"""Plain causal-LM training: packed pretraining blocks and masked fine-tuning rows in one loop.

Used to build the embedded models (`launch/build_assets.py`); alignment itself lives in `offline.py` and `online.py`.
Shapes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylign.errors import ConfigError, DataError
from raylign.types import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded token rows; padding never reaches earlier tokens under a causal mask, so there is no mask here.

    Attributes:
        input_ids: token ids, shape (B, L), int64.
        labels: targets at their own position (not shifted), IGNORE_INDEX where not scored. Shape (B, L), or (B,) for
            a classifier.
        num_tokens: tokens that are not padding; what the budget counts.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Budget and optimiser of one training stage.

    Attributes:
        num_tokens: token budget; the learning rate has decayed to zero when it is spent.
        max_seconds: optional second limit; the schedule follows whichever budget is further spent.
        learning_rate: peak of the cosine schedule.
        warmup_fraction: share of the budget spent on linear warm-up.
        weight_decay: AdamW decay of matrices; vectors are not decayed.
        max_grad_norm: gradient clipping.
        betas: AdamW moment coefficients.
        is_bf16: run the forward pass under bfloat16 autocast; weights and optimiser stay float32.
        average_decay: decay per step of the exponential moving average of the weights that is returned; 0 returns
            the last weights.
    """

    num_tokens: int
    max_seconds: float | None = None
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    is_bf16: bool = False
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse budgets that cannot be spent."""
        if self.num_tokens <= 0:
            raise ConfigError(f"num_tokens={self.num_tokens} must be > 0")
        if self.max_seconds is not None and self.max_seconds <= 0:
            raise ConfigError(f"max_seconds={self.max_seconds} must be > 0, or None for no limit")
        if not 0 <= self.average_decay < 1:
            raise ConfigError(f"average_decay={self.average_decay} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FitSummary:
    """What one training stage did.

    Attributes:
        num_steps: optimiser steps.
        num_tokens: tokens seen, padding not counted.
        duration_s: wall-clock seconds.
        final_loss: mean loss of the last tenth of the steps, nats per scored token.
    """

    num_steps: int
    num_tokens: int
    duration_s: float
    final_loss: float


LossFn = Callable[[nn.Module, Batch], Tensor]
StepCallback = Callable[[int, int, float], None]


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean next-token negative log-likelihood over the scored tokens.

    Definition: -(1/N) sum_t log p(y_t | y_<t) over positions whose label is not IGNORE_INDEX.

    Args:
        model: causal LM returning `.logits` of shape (B, L, V).
        batch: rows with labels of shape (B, L).

    Returns:
        Scalar loss in nats per token, float32.
    """
    logits_BLV = model(input_ids=batch.input_ids, use_cache=False).logits
    # Position t predicts token t + 1.
    return F.cross_entropy(
        logits_BLV[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


def learning_rate_at(progress: float, config: FitConfig) -> float:
    """Linear warm-up, then cosine decay to zero.

    Args:
        progress: share of the budget spent, in [0, 1].
        config: peak and warm-up share.

    Returns:
        Learning rate for the next step; positive even at progress 0.
    """
    if progress < config.warmup_fraction:
        return config.learning_rate * max(progress / config.warmup_fraction, 0.02)
    decayed = (progress - config.warmup_fraction) / (1.0 - config.warmup_fraction)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(decayed, 1.0)))


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFn,
    config: FitConfig,
    *,
    on_step: StepCallback | None = None,
    loss_model: nn.Module | None = None,
) -> FitSummary:
    """Train `model` in place until the budget or the batches end.

    Args:
        model: float32 model.
        batches: training batches in order; make it endless to be limited by the budget alone.
        loss_fn: loss of one batch.
        config: budget and optimiser.
        on_step: called with (step, tokens seen, loss) after each step.
        loss_model: what `loss_fn` is called with when it differs from `model` (a compiled view of the same weights).

    Returns:
        Counts, seconds and the closing loss.

    Raises:
        DataError: `batches` was empty.
    """
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, fused=True
    )
    average = _WeightAverage(model, config.average_decay) if config.average_decay else None
    model.train()
    losses: list[float] = []
    num_tokens = 0
    started = time.monotonic()
    for batch in batches:
        progress = num_tokens / config.num_tokens
        if config.max_seconds is not None:
            progress = max(progress, (time.monotonic() - started) / config.max_seconds)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, config)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.is_bf16):
            loss = loss_fn(loss_model or model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()
        num_tokens += batch.num_tokens
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(len(losses), num_tokens, losses[-1])
    if not losses:
        raise DataError("training got no batches: the documents after filtering and splitting are empty")
    if average is not None:
        average.store()
    model.eval()
    tail = losses[-max(1, len(losses) // 10) :]
    return FitSummary(
        num_steps=len(losses),
        num_tokens=num_tokens,
        duration_s=time.monotonic() - started,
        final_loss=sum(tail) / len(tail),
    )


@torch.no_grad()
def heldout_loss(model: nn.Module, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean next-token loss over all scored tokens.

    Args:
        model: causal LM.
        batches: held-out batches.

    Returns:
        (loss in nats per token, number of scored tokens).

    Raises:
        DataError: there was nothing to score.
    """
    model.eval()
    total, num_scored = 0.0, 0
    for batch in batches:
        count = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
        if count:
            total += float(causal_lm_loss(model, batch)) * count
            num_scored += count
    if not num_scored:
        raise DataError("held-out split has no scored tokens: use more documents")
    return total / num_scored, num_scored


def pack_blocks(
    rows: Sequence[Sequence[int]], *, block_size: int, batch_size: int, generator: torch.Generator | None
) -> Iterator[Batch]:
    """Concatenate rows into full blocks and yield batches of them; every token is a target.

    Rows follow each other without a mask between them: each opens with the beginning-of-text token. The tokens that
    do not fill the last block are dropped.

    Args:
        rows: token ids per document.
        block_size: tokens per block.
        batch_size: blocks per batch; the last batch may be smaller.
        generator: shuffles rows, then blocks; None keeps their order.

    Yields:
        Batches of shape (B, block_size).
    """
    order = range(len(rows)) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    flat = torch.tensor([token for index in order for token in rows[index]], dtype=torch.int64)
    num_blocks = len(flat) // block_size
    blocks = flat[: num_blocks * block_size].view(num_blocks, block_size)
    if generator is not None:
        blocks = blocks[torch.randperm(num_blocks, generator=generator)]
    for start in range(0, num_blocks, batch_size):
        block = blocks[start : start + batch_size]
        yield Batch(input_ids=block, labels=block, num_tokens=block.numel())


def bucket_indices(lengths: Sequence[int], *, max_tokens: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Groups of rows of similar length, in random order.

    Args:
        lengths: tokens per row.
        max_tokens: padded tokens per group; a longer row gets a group of its own.
        generator: shuffles ties and the order of groups.

    Yields:
        Row indices; every row is in exactly one group.
    """
    # A jitter of a few tokens keeps the neighbours of a row from being the same in every epoch.
    jitter = (torch.rand(len(lengths), generator=generator) * 8).tolist()
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index] + jitter[index]):
        longest = max(longest, lengths[index])
        if groups and longest * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = lengths[index]
    for position in torch.randperm(len(groups), generator=generator).tolist():
        yield groups[position]


def pad_rows(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Right-pad rows to the longest.

    Args:
        rows: token ids or labels per row; at least one row.
        fill: value of the padding.

    Returns:
        Shape (B, L), int64.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.int64)


def masked_batches(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, max_tokens: int, pad_id: int, generator: torch.Generator
) -> Iterator[Batch]:
    """One epoch of rows with their own labels, batched by length.

    Args:
        rows: (token ids, labels) per row, equal lengths.
        max_tokens: padded tokens per batch.
        pad_id: id of the padding; its labels are IGNORE_INDEX.
        generator: order of the epoch.

    Yields:
        Right-padded batches.
    """
    for group in bucket_indices([len(ids) for ids, _ in rows], max_tokens=max_tokens, generator=generator):
        ids = [rows[index][0] for index in group]
        yield Batch(
            input_ids=pad_rows(ids, pad_id),
            labels=pad_rows([rows[index][1] for index in group], IGNORE_INDEX),
            num_tokens=sum(map(len, ids)),
        )


def repeat_epochs(make_epoch: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    """Endless batches: a fresh epoch whenever one ends, stopping only when an epoch is empty.

    Args:
        make_epoch: builds one epoch; called again for each.

    Yields:
        Batches of every epoch in turn.
    """
    while True:
        is_empty = True
        for batch in make_epoch():
            is_empty = False
            yield batch
        if is_empty:
            return


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class _WeightAverage:
    """Exponential moving average of a model's weights, bias-corrected by a short ramp of the decay."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = decay
        self._num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self._num_updates += 1
        decay = min(self._decay, self._num_updates / (self._num_updates + 10))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1.0 - decay)

    @torch.no_grad()
    def store(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            parameter.copy_(average)
