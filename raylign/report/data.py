"""What a report says, as plain values: the one input of the HTML report, `report.json` and the model card.

A value that was not measured is a `NotMeasured` with its reason, never a guess and never a blank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylign.types import Completion, Interval

if TYPE_CHECKING:
    from raylign.cost.rows import Cost
    from raylign.evaluation.drift import DriftReport
    from raylign.evaluation.judges import SignCheck
    from raylign.evaluation.refusal import RefusalValidation
    from raylign.evaluation.safety import SafetyComparison
    from raylign.report.constraint_data import ConstraintReport
    from raylign.report.token_section import TokenExample


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """Stands where a measurement would; prints as "not measured: <reason>"."""

    reason: str

    def __str__(self) -> str:
        return f"not measured: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPoint:
    """The linear probe of one layer on held-out pairs.

    Attributes:
        layer: transformer layer, from 1.
        pair_accuracy: share of pairs with r(chosen) > r(rejected).
        calibration_error: expected calibration error of its preference probability.
    """

    layer: int
    pair_accuracy: float
    calibration_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardQuality:
    """The reward, judged on pairs it never saw.

    Attributes:
        kind: `reward.kind`.
        test_accuracy: share of test pairs ordered as their label says.
        out_of_fold_accuracy: likewise on training pairs, each scored by a head that did not see its prompt; None when
            there is one fold, whose head saw them all.
        test_ece: expected calibration error of the label confidence on test pairs.
        test_brier: mean squared error of the label confidence on test pairs; 0.25 is a coin.
        test_disagreement: mean posterior standard deviation of the margins of test pairs, reward units; 0 with one
            member.
        num_train_pairs: pairs the heads were fitted on.
        num_test_pairs: pairs of the test numbers.
        layers: probe of every layer alone, by layer.
    """

    kind: str
    test_accuracy: Interval
    out_of_fold_accuracy: float | None
    test_ece: float
    test_brier: float
    test_disagreement: float
    num_train_pairs: int
    num_test_pairs: int
    layers: tuple[LayerPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceFacts:
    """Label confidence of the training pairs.

    Attributes:
        num_pairs: pairs.
        num_flips: pairs below one half, whose stored order the loss turns round.
        mean: mean confidence.
        histogram: pairs per bin, K of them.
        edges: K + 1 bin edges from 0 to 1.
    """

    num_pairs: int
    num_flips: int
    mean: float
    histogram: tuple[int, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFacts:
    """What the run cost, from its ledger; sessions that were killed and resumed are all in it.

    Attributes:
        stages: cost by phase of the run, in order.
        phases: the same cost by what was done, for example "policy_update" inside "train".
        total: of the run.
        reused: what artefacts that were found ready had cost when they were made; not in the total.
        num_killed: entries that a killed process left open, counted up to their last sign of life.
        money: price of the total's device-seconds.
        currency: of the money.
    """

    stages: Mapping[str, Cost]
    phases: Mapping[str, Cost]
    total: Cost
    reused: Cost
    num_killed: int
    money: float | NotMeasured
    currency: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the report of one run shows.

    Attributes:
        run_name: `run.name`.
        base_model: the model before training, as configured.
        dataset: the preference data, as configured.
        objective: loss over pairs.
        is_adapter: the result is a PEFT adapter, not a full model.
        comparison: safety, over-refusal and degenerate answers before and after.
        before: judged answers of the reference.
        after: judged answers of the trained policy to the same prompts, in the same order.
        judge_name: the judge, as configured.
        judge: how it ranks human-labelled answers.
        refusal_detector: the detector against human labels it was not written on.
        drift: check of the hypothesis behind re-ranking.
        reward: quality of the reward.
        confidence: label confidence of the training pairs.
        training: records of `metrics.jsonl`, in order.
        data_counts: rows by what became of them, for example {"read": 7000, "train": 5400}.
        quarantine: unusable rows by reason.
        seconds: wall seconds by phase, in order.
        cost: what the run cost.
        config_yaml: the resolved configuration.
        versions: installed packages that results depend on.
        git_commit: commit of the working directory, None outside a repository.
        license_note: what the weights and data allow.
        warnings: what readers must know before they believe the numbers.
        constraint: what the safety constraint did.
        token_examples: held-out responses with the reward of every token; none where the reward is one of responses.
        sampling: how the judged answers were sampled, one sentence.
    """

    run_name: str
    base_model: str
    dataset: str
    objective: str
    is_adapter: bool
    comparison: SafetyComparison
    before: Sequence[Completion]
    after: Sequence[Completion]
    judge_name: str
    judge: SignCheck
    refusal_detector: RefusalValidation
    drift: DriftReport | NotMeasured
    reward: RewardQuality | NotMeasured
    confidence: ConfidenceFacts | NotMeasured
    training: Sequence[Mapping[str, float]]
    data_counts: Mapping[str, int]
    quarantine: Mapping[str, int]
    seconds: Mapping[str, float]
    cost: CostFacts | NotMeasured
    config_yaml: str
    versions: Mapping[str, str]
    git_commit: str | None
    license_note: str
    warnings: tuple[str, ...] = ()
    constraint: ConstraintReport | NotMeasured = NotMeasured(reason="no constraint, and no response has a cost")
    token_examples: Sequence[TokenExample] = ()
    sampling: str = ""


def report_json(data: ReportData) -> dict[str, Any]:
    """The content of `report.json`: the same numbers as the HTML, without the answers' texts.

    Values that are nan or infinite become null; `NotMeasured` becomes {"not_measured": reason}.
    """
    texts = {"before", "after", "token_examples"}
    content = {
        field.name: to_plain(getattr(data, field.name)) for field in dataclasses.fields(data) if field.name not in texts
    }
    content["num_completions"] = {"before": len(data.before), "after": len(data.after)}
    return content


def to_plain(value: Any) -> Any:
    """JSON-like copy of dataclasses, mappings and sequences; a float that is not finite becomes None."""
    if isinstance(value, NotMeasured):
        return {"not_measured": value.reason}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
