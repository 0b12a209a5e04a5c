"""Random rounds whose responses have costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_rounds import tiny_round

from raylign.training.rounds import Round


def with_costs(round_: Round, costs: np.ndarray) -> Round:
    """The round with a cost (n,) of every response."""
    scored = (replace(item, cost=float(cost)) for item, cost in zip(round_.scored, costs, strict=True))
    return replace(round_, scored=tuple(scored))


def costly_round(num_prompts: int, num_samples: int, *, index: int = 0, shift: float = 0.0) -> Round:
    """Random costs around `shift`, the first response of every prompt exactly at 0."""
    round_ = tiny_round(num_prompts, num_samples, index=index)
    costs = np.random.default_rng([7, index]).normal(shift, 1.0, len(round_.scored))
    costs[::num_samples] = 0.0
    return with_costs(round_, costs)
