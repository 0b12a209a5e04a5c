"""Which pairs an update sees: a function of (seed, update number), never of the number of workers.

Epoch e visits the pairs in its own permutation. Update u takes the next `batch_size` of them; the last batch of an
epoch may be smaller and never wraps into the next epoch, so every pair is seen exactly once per epoch. The only cursor
there is to save is the number of finished updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylign.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOrder:
    """The order of pairs of a whole run.

    Attributes:
        num_pairs: pairs in the training table.
        batch_size: pairs per update over all workers.
        seed: seed of the permutations.
        epochs: passes over the pairs, None for an endless order.
        max_steps: optional limit on the number of updates.
    """

    num_pairs: int
    batch_size: int
    seed: int
    epochs: int | None = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse an order over nothing."""
        if self.num_pairs < 1 or self.batch_size < 1:
            raise DataError(f"num_pairs={self.num_pairs} and batch_size={self.batch_size} must be at least 1")

    @property
    def updates_per_epoch(self) -> int:
        """Updates that visit every pair once; the last may be smaller."""
        return -(-self.num_pairs // self.batch_size)

    @property
    def num_updates(self) -> int:
        """Updates of the whole run.

        Raises:
            DataError: the order is endless.
        """
        limits = [self.max_steps] if self.max_steps is not None else []
        if self.epochs is not None:
            limits.append(self.epochs * self.updates_per_epoch)
        if not limits:
            raise DataError("an endless order has no number of updates; give epochs or max_steps")
        return min(limits)

    def batch(self, update: int) -> np.ndarray:
        """Rows of one update.

        Args:
            update: number of updates finished before it, from 0.

        Returns:
            Row numbers in the training table. Shape (B,) with B <= batch_size, int64.
        """
        epoch, position = divmod(update, self.updates_per_epoch)
        start = position * self.batch_size
        # Drawing the whole permutation per update costs 10 ms for a million pairs and leaves no state to restore.
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_pairs)
        return order[start : start + self.batch_size]

    def epoch_after(self, update: int) -> float:
        """Passes over the data completed when update `update` is done, fractions included."""
        epoch, position = divmod(update, self.updates_per_epoch)
        return epoch + min((position + 1) * self.batch_size, self.num_pairs) / self.num_pairs
