"""What a calibration found, as plain values: the one input of its tables, its HTML and its JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raylign.evaluation.calibration import NoisyQuality, OptimisedPoint, Unfamiliar
from raylign.report.data import to_plain
from raylign.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedModel:
    """One reward model; rewards that differ in their rule over its members share it.

    Attributes:
        rewards: names of these rewards.
        kind: `reward.kind`.
        loss: `brme.loss`, None for other kinds.
        num_heads: members.
        by_flips: one per share of flips, ascending.
        signals: of unfamiliar input, fitted at the smallest share of flips; none with one member.
        floor_share: share of standard deviations within twice their floor on test answers, the largest of all fits;
            None without sigma.
        anchor_spread: how far members' zeros lie apart in units of what they say, the largest of all fits; above
            `member_facts.ANCHOR_LIMIT` a minimum is mostly that of the lowest zero. None with one member.
        fit_s: wall seconds of one fit, mean over seeds and flips.
        warnings: what its fits warned of.
    """

    rewards: tuple[str, ...]
    kind: str
    loss: str | None
    num_heads: int
    by_flips: tuple[NoisyQuality, ...]
    signals: tuple[Unfamiliar, ...]
    floor_share: float | None
    anchor_spread: float | None
    fit_s: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedReward:
    """One reward: a model and a rule over its members.

    Attributes:
        name: of the configuration.
        model: position of its model.
        rule: for example "brme, w_nominal=0.2"; "" with one member.
        w_nominal: of a BRME mixture, None for other rules.
        best_of_n: curve for each share of flips, ascending; n doubles from 1.
        against_first: gold at the largest n minus that of the first reward, paired by prompt, for each share of flips;
            empty for the first reward.
        policy_gradient: a curve over rounds for each of `trained_flips`; empty when it was not trained.
    """

    name: str
    model: int
    rule: str
    w_nominal: float | None
    best_of_n: tuple[tuple[OptimisedPoint, ...], ...]
    against_first: tuple[Interval, ...]
    policy_gradient: tuple[tuple[OptimisedPoint, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """All of it.

    Attributes:
        name: of the run.
        judge: `evaluate.judge`, whose cost is gold.
        policy: `policy.model`, whose answers are chosen among.
        data: `data.path`, the pairs.
        models: reward models in the order of the configuration.
        rewards: likewise.
        flips: shares of reversed pairs, ascending.
        trained_flips: those at which rewards were fitted that a policy gradient maximised, ascending.
        seeds: of flips and fits.
        num_train_pairs: pairs fitted to.
        num_valid_pairs: pairs that chose epochs and temperatures.
        num_test_pairs: pairs judged on.
        num_prompts: harmful prompts of best-of-n.
        num_candidates: answers to each.
    """

    name: str
    judge: str
    policy: str
    data: str
    models: tuple[CalibratedModel, ...]
    rewards: tuple[CalibratedReward, ...]
    flips: tuple[float, ...]
    trained_flips: tuple[float, ...]
    seeds: tuple[int, ...]
    num_train_pairs: int
    num_valid_pairs: int
    num_test_pairs: int
    num_prompts: int
    num_candidates: int


def calibration_json(result: CalibrationResult) -> dict[str, Any]:
    """The content of `calibration.json`; values that are nan or infinite become null."""
    content: dict[str, Any] = to_plain(result)
    for model in content["models"]:
        for noisy in model["by_flips"]:
            noisy["curve"] = {name: to_plain(values.tolist()) for name, values in noisy["curve"].items()}
    return content
