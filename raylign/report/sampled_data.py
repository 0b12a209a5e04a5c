"""What several answers to every evaluation prompt say of policies, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raylign.evaluation.sampled_costs import ConstraintMeasures


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMeasures:
    """The same answers of one policy under two prices.

    Attributes:
        by_model: costs of the run's cost model, which a constraint trains against.
        by_judge: costs of the evaluation's judge, which no training saw.
    """

    by_model: ConstraintMeasures
    by_judge: ConstraintMeasures


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSettings:
    """How answers were sampled, and those of the policy before training.

    Attributes:
        num_answers: to each prompt.
        temperature: of the sampling.
        prompt_safety: share of safe answers that makes a prompt safe.
        before: the policy before training.
    """

    num_answers: int
    temperature: float
    prompt_safety: float
    before: SampledMeasures


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRun:
    """One run.

    Attributes:
        settings: of the sampling, with the policy before training.
        after: the trained policy.
    """

    settings: SampledSettings
    after: SampledMeasures
