"""What a metric record of the policy-gradient trainer says; sums are kept, as in `raylign.training.metrics`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from raylign.training.gradient import GradientSummary


@dataclass
class GradientWindow:
    """Sums since the last record.

    Attributes:
        sums: by name.
        num_tokens_seen: response tokens of the whole run.
    """

    sums: dict[str, float] = field(default_factory=dict)
    num_tokens_seen: int = 0
    _started: float = field(default_factory=time.monotonic)

    def add(self, summary: GradientSummary) -> None:
        """Count one update."""
        now = time.monotonic()
        totals = {**summary.sums, "responses": summary.num_responses, "updates": 1, "seconds": now - self._started}
        totals |= {"grad_norm": summary.grad_norm, "learning_rate": summary.learning_rate}
        self._started = now
        self.num_tokens_seen += int(summary.sums["tokens"])
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in totals.items()}

    def record(self, *, step: int, epoch: float) -> dict[str, float]:
        """The record of the window as it stands.

        Args:
            step: updates finished.
            epoch: rounds finished, with fractions.

        Returns:
            Floats by metric name. Losses, `actor/clip_fraction` and `actor/policy_change` (k3 estimate of the KL from
            the policy of the round's start, nats per token) are means over response tokens; `grad_norm` and
            `learning_rate` over updates; `num_tokens` counts since the start of the run.
        """
        sums = self.sums
        tokens, seconds = sums["tokens"], max(sums["seconds"], 1e-9)
        return {
            "step": step,
            "epoch": epoch,
            "loss": (sums["policy_loss"] + sums["value_loss"]) / tokens,
            "actor/policy_loss": sums["policy_loss"] / tokens,
            "critic/value_loss": sums["value_loss"] / tokens,
            "actor/clip_fraction": sums["is_clipped"] / tokens,
            "actor/policy_change": sums["policy_change"] / tokens,
            "response_length/mean": tokens / sums["responses"],
            "grad_norm": sums["grad_norm"] / sums["updates"],
            "learning_rate": sums["learning_rate"] / sums["updates"],
            "num_tokens": self.num_tokens_seen,
            "perf/response_tokens_per_second": tokens / seconds,
        }

    def clear(self) -> None:
        """Start the next window."""
        self.sums = {}

    def restart_clock(self) -> None:
        """Leave out of the rates what happened since the last update, for example sampling."""
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"sums": dict(self.sums), "num_tokens_seen": self.num_tokens_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.sums = dict(state["sums"])
        self.num_tokens_seen = state["num_tokens_seen"]
