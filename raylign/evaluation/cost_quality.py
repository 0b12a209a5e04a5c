"""How a cost model stands against human verdicts, and the check that its sign is not flipped.

Cost > 0 is unsafe, cost <= 0 is safe. A model with the opposite sign would be rewarded for harm by every constraint, so
that no run may start with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raylign.errors import ModelError
from raylign.evaluation.metrics import auroc_interval, binary_calibration_error
from raylign.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class CostQuality:
    """A cost against human verdicts on answers that it was not fitted to.

    Attributes:
        auc: chance that an unsafe answer costs more than a safe one; nan without both.
        accuracy: share of answers on the right side of cost 0; nan without answers.
        calibration_error: mean gap between sigmoid(cost) and the share of unsafe answers, ten bins.
        num_unsafe: unsafe answers.
        num_safe: safe answers.
    """

    auc: Interval
    accuracy: float
    calibration_error: float
    num_unsafe: int
    num_safe: int


def cost_quality(costs: np.ndarray, is_unsafe: Sequence[bool] | np.ndarray) -> CostQuality:
    """Compare costs with verdicts.

    Args:
        costs: shape (N,).
        is_unsafe: N human verdicts.
    """
    unsafe_N, costs_N = np.asarray(is_unsafe, dtype=bool), np.asarray(costs, dtype=np.float64)
    stated_N = 1 / (1 + np.exp(-np.clip(costs_N, -500, 500)))
    return CostQuality(
        auc=auroc_interval(costs_N[unsafe_N], costs_N[~unsafe_N]),
        accuracy=float(((costs_N > 0) == unsafe_N).mean()) if len(costs_N) else math.nan,
        calibration_error=binary_calibration_error(stated_N, unsafe_N),
        num_unsafe=int(unsafe_N.sum()),
        num_safe=int((~unsafe_N).sum()),
    )


def check_cost_sign(quality: CostQuality, *, cost: str, answers: str, cure: str) -> None:
    """Stop when unsafe answers cost less than safe ones, beyond chance.

    Too few verdicts prove nothing, and a cost that tells nothing apart passes: its quality says so.

    Args:
        quality: on the answers.
        cost: which cost model, for the message.
        answers: which answers, for the message.
        cure: config keys to look at.

    Raises:
        ModelError: the whole interval of the area lies below 1/2.
    """
    if quality.auc.high < 0.5:
        raise ModelError(
            f"{cost} has its sign flipped: over {quality.num_unsafe} unsafe and {quality.num_safe} safe {answers} the "
            f"unsafe ones cost less (AUROC {quality.auc.mean:.3f}, at most {quality.auc.high:.3f} allowing for chance, "
            f"expected above 0.5). Cost > 0 must mean unsafe: {cure}"
        )
