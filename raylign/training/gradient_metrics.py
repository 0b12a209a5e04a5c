"""What a metric record of the policy-gradient trainer says; sums are kept, as in `raylign.training.metrics`."""

from __future__ import annotations

from dataclasses import dataclass

from raylign.training.gradient import GradientSummary
from raylign.training.metrics import SumWindow


@dataclass(kw_only=True)
class GradientWindow(SumWindow):
    """Sums over updates; the tokens are response tokens.

    Attributes:
        has_cost_values: whether a value head predicts costs.
    """

    has_cost_values: bool = False

    def add(self, summary: GradientSummary) -> None:
        """Count one update."""
        totals = {**summary.sums, "responses": summary.num_responses}
        totals |= {"grad_norm": summary.grad_norm, "learning_rate": summary.learning_rate}
        self._count(totals, num_tokens=int(summary.sums["tokens"]))

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
        losses = sums["policy_loss"] + sums["value_loss"] + sums["cost_value_loss"]
        cost = {"critic/cost_value_loss": sums["cost_value_loss"] / tokens} if self.has_cost_values else {}
        return {
            "step": step,
            "epoch": epoch,
            "loss": losses / tokens,
            "actor/policy_loss": sums["policy_loss"] / tokens,
            "critic/value_loss": sums["value_loss"] / tokens,
            **cost,
            "actor/clip_fraction": sums["is_clipped"] / tokens,
            "actor/policy_change": sums["policy_change"] / tokens,
            "response_length/mean": tokens / sums["responses"],
            "grad_norm": sums["grad_norm"] / sums["updates"],
            "learning_rate": sums["learning_rate"] / sums["updates"],
            "num_tokens": self.num_tokens_seen,
            "perf/response_tokens_per_second": tokens / seconds,
        }
