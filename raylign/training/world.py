"""The processes that train together, seen from one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One training worker among its equals.

    Attributes:
        rank: index of this worker.
        size: number of workers; above 1 the default process group must be initialised.
        device: where this worker computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all workers, in place; every worker gets bitwise the same result."""
        if self.size > 1:
            dist.all_reduce(values)
        return values
