"""What a calibration found, as the page and the terminal show it."""

from __future__ import annotations

from dataclasses import dataclass

from raylign.evaluation.calibration import NoisyQuality, OptimisedPoint, Unfamiliar


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedReward:
    """One reward model.

    Attributes:
        name: of the configuration.
        kind: `reward.kind`.
        num_heads: members.
        rule: `robust.rule` with its knob, for example "brme, w_nominal=0.2".
        by_flips: one per share of flips, in the order of the configuration.
        best_of_n: curve for each share of flips, likewise; n doubles from 1.
        policy_gradient: a curve over rounds, empty when it was not trained.
        signals: of unfamiliar input; none with one member.
        floor_share: share of standard deviations within twice their floor on test answers, None without sigma.
        anchor_spread: how far members' zeros lie apart in units of what they say; above `member_facts.ANCHOR_LIMIT` a
            minimum is mostly that of the lowest zero. None with one member.
        fit_s: wall seconds of one fit, mean over seeds and flips.
    """

    name: str
    kind: str
    num_heads: int
    rule: str
    by_flips: tuple[NoisyQuality, ...]
    best_of_n: tuple[tuple[OptimisedPoint, ...], ...]
    policy_gradient: tuple[OptimisedPoint, ...]
    signals: tuple[Unfamiliar, ...]
    floor_share: float | None
    anchor_spread: float | None
    fit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """All of it.

    Attributes:
        name: of the run.
        rewards: in the order of the configuration.
        flips: shares of reversed pairs.
        seeds: of flips and fits.
        num_train_pairs: pairs fitted to.
        num_valid_pairs: pairs that chose epochs and temperatures.
        num_test_pairs: pairs judged on.
        num_prompts: harmful prompts of best-of-n.
        num_candidates: answers to each.
    """

    name: str
    rewards: tuple[CalibratedReward, ...]
    flips: tuple[float, ...]
    seeds: tuple[int, ...]
    num_train_pairs: int
    num_valid_pairs: int
    num_test_pairs: int
    num_prompts: int
    num_candidates: int
