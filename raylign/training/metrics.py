"""What a metric record says: means over the updates since the last record, under the names TRL uses.

Sums are kept, not means, so that a record is the same whatever the sizes of the updates in it, and so that a
checkpoint in the middle of a window continues it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from raylign.training.offline import UpdateSummary
from raylign.training.variational import AVA_COLUMNS, AVA_FACTS, TRUNK_NORM


@dataclass(kw_only=True)
class SumWindow:
    """Sums since the last record, and what a checkpoint keeps of them.

    Attributes:
        sums: by name.
        num_tokens_seen: tokens of the whole run.
    """

    sums: dict[str, float] = field(default_factory=dict)
    num_tokens_seen: int = 0
    _started: float = field(default_factory=time.monotonic)

    def clear(self) -> None:
        """Start the next window."""
        self.sums = {}

    def restart_clock(self) -> None:
        """Leave out of the rates what happened since the last update, for example sampling or writing a checkpoint."""
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"sums": dict(self.sums), "num_tokens_seen": self.num_tokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.sums = dict(state["sums"])
        self.num_tokens_seen = state["num_tokens_seen"]

    def _count(self, totals: dict[str, float], *, num_tokens: int) -> None:
        """Add the totals of one update and the seconds since the one before."""
        now = time.monotonic()
        totals = {**totals, "updates": 1, "seconds": now - self._started}
        self._started = now
        self.num_tokens_seen += num_tokens
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in totals.items()}


@dataclass(kw_only=True)
class MetricWindow(SumWindow):
    """Sums over pairs; the tokens are real tokens.

    Attributes:
        has_confidence: whether the objective reads a label confidence.
    """

    has_confidence: bool

    def add(self, summary: UpdateSummary) -> None:
        """Count one update."""
        columns = summary.columns
        totals = {name: float(values.sum()) for name, values in columns.items()}
        totals["accuracies"] = float((columns["chosen_rewards"] > columns["rejected_rewards"]).sum())
        totals["flips"] = float((columns["confidence"] < 0.5).sum())
        totals |= {"pairs": len(columns["loss"]), "tokens": summary.num_tokens, "slots": summary.num_slots}
        totals |= {"grad_norm": summary.grad_norm, "learning_rate": summary.learning_rate}
        self._count(totals | summary.facts, num_tokens=summary.num_tokens)

    def record(self, *, step: int, epoch: float) -> dict[str, float]:
        """The record of the window as it stands.

        Args:
            step: updates finished.
            epoch: passes over the data finished, with fractions.

        Returns:
            Floats by metric name. Means are over pairs, except `grad_norm` and `learning_rate`, which are over
            updates; `confidence/flips` is the share of pairs below one half; `num_tokens` counts since the start of
            the run. Of `ava/*`, the smallest sigma and the scale of TD errors are means over updates as well, and norms
            in the trunk are those of the last update. Only the `perf/*` rates depend on the machine.
        """
        sums, pairs = self.sums, self.sums["pairs"]
        values: dict[str, float] = {
            "step": step,
            "epoch": epoch,
            "loss": sums["loss"] / pairs,
            "rewards/chosen": sums["chosen_rewards"] / pairs,
            "rewards/rejected": sums["rejected_rewards"] / pairs,
            "rewards/margins": (sums["chosen_rewards"] - sums["rejected_rewards"]) / pairs,
            "rewards/accuracies": sums["accuracies"] / pairs,
            "logps/chosen": sums["chosen_logps"] / pairs,
            "logps/rejected": sums["rejected_logps"] / pairs,
            "grad_norm": sums["grad_norm"] / sums["updates"],
            "learning_rate": sums["learning_rate"] / sums["updates"],
            "num_tokens": self.num_tokens_seen,
            "perf/padding_frac": 1.0 - sums["tokens"] / sums["slots"],
            "perf/tokens_per_second": sums["tokens"] / max(sums["seconds"], 1e-9),
            "perf/pairs_per_second": pairs / max(sums["seconds"], 1e-9),
        }
        if self.has_confidence:
            values["confidence/mean"] = sums["confidence"] / pairs
            values["confidence/flips"] = sums["flips"] / pairs
        over = dict.fromkeys(AVA_COLUMNS, pairs) | dict.fromkeys(AVA_FACTS, sums["updates"])
        values |= {name: sums[name] / count for name, count in over.items() if name in sums}
        values |= {name: norm for name, norm in sums.items() if name.startswith(TRUNK_NORM)}
        return values
