"""The section of a configuration that constrains the cost of responses. No torch, no ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raylign.config_sections import Section


class ConstraintSection(Section):
    """A safety constraint on the cost of responses, sampled (policy_gradient) or stored (offline label_confidence)."""

    kind: Literal["none", "rectified", "split", "expected", "rectified_mean", "fixed_penalty"] = Field(
        "none",
        description="what the multiplier weighs: max(cost, 0) of every response (RePO, arXiv:2410.19933), the cost of "
        "unsafe ones, the mean cost (PPO-Lagrangian, arXiv:2310.12773), its positive part; or a fixed penalty; "
        "offline rectified or expected",
    )
    multiplier: Annotated[float, Field(ge=0)] | Literal["dual"] = Field(
        1.0,
        description="multiplier of the first round; of all with fixed_penalty; offline of the run, or 'dual': the one "
        "at which the costs of stored responses meet the constraint",
    )
    labels: Literal["confidence", "sampled", "hard"] = Field(
        "confidence",
        description="what a stored pair tells the loss of reward minus multiplier times cost (offline): its label "
        "confidence, a draw from it (C-DPO, arXiv:2403.02475), or which answer has more",
    )
    multiplier_space: Literal["log", "linear"] = Field(
        "log", description="the multiplier moves in proportion to itself and stays above 0, or by plain steps"
    )
    multiplier_learning_rate: float = Field(0.1, gt=0, description="step of the multiplier, once per round")
    multiplier_max: float = Field(
        20.0, gt=0, description="cap of the multiplier; unless set, 5 for expected and rectified_mean"
    )
    multiplier_window: int = Field(
        128, ge=1, description="newest costs that move the multiplier; those of the last round always count"
    )
    multiplier_delay: int = Field(0, ge=0, description="rounds before the multiplier first moves")
    threshold: float = Field(0.0, description="mean cost that is allowed (expected, rectified_mean)")
    tolerance: float = Field(
        0.0,
        ge=0,
        description="mean of max(cost, 0) that is allowed; at 0 the multiplier never falls (rectified, split)",
    )
    split_normalise: Literal["one_plus_multiplier", "none"] = Field(
        "one_plus_multiplier", description="divisor of unsafe responses, which bounds their penalty (split)"
    )
    split_reduction: Literal["global", "per_part"] = Field(
        "global", description="one mean over the batch, or the mean of the safe plus that of the unsafe part (split)"
    )
    prompt_safety: float = Field(
        0.95, gt=0, le=1, description="share of safe responses that makes a prompt safe, for constraint/* metrics"
    )
    cvar_level: float = Field(
        0.05, gt=0, le=1, description="share of the costliest responses in constraint/cvar, a metric"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_cap(cls, values: Any) -> Any:
        """A cap that suits what the multiplier weighs, unless it was given."""
        if isinstance(values, Mapping) and values.get("kind") in ("expected", "rectified_mean"):
            return {"multiplier_max": 5.0, **values}
        return values
