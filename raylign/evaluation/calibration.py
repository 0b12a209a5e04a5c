"""What trials of a reward model say together: quality under label noise, curves of its maximum, signs of strangeness.

Shape letters: B test pairs, P prompts, N candidates of a prompt, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylign.evaluation.best_of_n import kl_bound, selection_weights
from raylign.evaluation.metrics import Floats, bootstrap_mean
from raylign.evaluation.uncertainty import (
    MarginQuality,
    ReliabilityCurve,
    margin_quality,
    reliability_curve,
    shift_auroc,
)
from raylign.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOutcome:
    """What one fit of one reward says; small enough to travel.

    Attributes:
        num_heads: members.
        margin_mean: (B,) of the test pairs, reward units.
        margin_variance: (B,) likewise.
        preference_prob: (B,) at the temperature fitted to the validation pairs.
        temperature: that temperature, reward units.
        proxy: (P, N) rewards of the candidates by the rule, reward units.
        familiar: signal name -> values on answers, higher the stranger.
        shuffled: likewise on the same answers with their words shuffled.
        floor_share: of the standard deviations on test answers, None without them.
        anchor_spread: of the members on test answers, None with one.
        seconds: of the fit.
    """

    num_heads: int
    margin_mean: Floats
    margin_variance: Floats
    preference_prob: Floats
    temperature: float
    proxy: Floats
    familiar: Mapping[str, Floats]
    shuffled: Mapping[str, Floats]
    floor_share: float | None
    anchor_spread: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """One round of one training.

    Attributes:
        kl: mean log-probability ratio of policy and reference over the responses, nats.
        proxy: (P,) mean reward of each prompt's responses, reward units.
        gold: (P,) mean gold of each prompt's responses.
    """

    kl: float
    proxy: Floats
    gold: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyQuality:
    """A reward model fitted to labels of which a share was reversed, judged on test pairs as they are.

    Attributes:
        flip_rate: share of training and validation pairs that were reversed.
        quality: means over seeds, intervals over test pairs.
        curve: of the preference probability, first seed.
    """

    flip_rate: float
    quality: MarginQuality
    curve: ReliabilityCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisedPoint:
    """How far a reward was driven, and what it and the judge say of the answers there.

    Attributes:
        label: "n=4" or "round 2".
        kl: from the reference, nats: the bound log n - (n - 1)/n, or the estimate over the round's responses.
        proxy: the reward that chose or was trained on, standard deviations of the policy's answers from their mean.
        gold: minus the judge's cost, likewise.
    """

    label: str
    kl: float
    proxy: Interval
    gold: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfamiliar:
    """How well a signal tells answers with shuffled words from the answers themselves.

    Attributes:
        signal: "disagreement" or "least sigma".
        familiar: values on the answers, first seed.
        shuffled: values on the shuffled ones.
        auroc: P(signal of a shuffled answer is higher), mean over seeds.
    """

    signal: str
    familiar: tuple[float, ...]
    shuffled: tuple[float, ...]
    auroc: Interval


def noisy_quality(flip_rate: float, outcomes: Sequence[TrialOutcome], *, num_samples: int, seed: int) -> NoisyQuality:
    """Quality of one reward at one share of flips.

    Args:
        flip_rate: that share.
        outcomes: S trials on the same test pairs.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    qualities = [
        margin_quality(
            outcome.margin_mean,
            outcome.margin_variance,
            temperature=outcome.temperature,
            num_samples=num_samples,
            generator=np.random.default_rng(seed),
        )
        for outcome in outcomes
    ]
    names = ("accuracy", "calibration_error", "brier", "log_likelihood")
    means = {name: mean_interval([getattr(quality, name) for quality in qualities]) for name in names}
    return NoisyQuality(
        flip_rate=flip_rate,
        quality=MarginQuality(
            **means, calibration_limit=float(np.mean([quality.calibration_limit for quality in qualities]))
        ),
        curve=reliability_curve(outcomes[0].preference_prob, num_bins=10),
    )


def mean_interval(intervals: Sequence[Interval]) -> Interval:
    """Mean of estimates on the same items, and of their ends: as wide as one of them, which one seed would have.

    Args:
        intervals: at least one.
    """
    low, mean, high = (float(np.mean([getattr(one, name) for one in intervals])) for name in ("low", "mean", "high"))
    return Interval(mean=mean, low=low, high=high, num_items=intervals[0].num_items)


def best_of_n_points(
    proxies_SPN: Sequence[Floats], gold_PN: Floats, *, num_samples: int, seed: int
) -> tuple[OptimisedPoint, ...]:
    """Proxy and gold of the best of n, n doubling from 1 to N, averaged over seeds, with intervals over prompts.

    Args:
        proxies_SPN: rewards that choose, by each of S trials.
        gold_PN: what judges.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    num_candidates = gold_PN.shape[1]
    gold_PN = _standardised(gold_PN)
    proxies = [_standardised(proxy) for proxy in proxies_SPN]
    sizes = [2**power for power in range(num_candidates.bit_length()) if 2**power <= num_candidates]
    points = []
    for n in sizes:
        weights = [selection_weights(proxy, n) for proxy in proxies]
        proxy_P = np.mean([(w * proxy).sum(1) for w, proxy in zip(weights, proxies, strict=True)], axis=0)
        gold_P = np.mean([(w * gold_PN).sum(1) for w in weights], axis=0)
        proxy_mean, gold_mean = (
            bootstrap_mean(values, num_samples=num_samples, generator=np.random.default_rng(seed))
            for values in (proxy_P, gold_P)
        )
        points.append(OptimisedPoint(label=f"n={n}", kl=kl_bound(n), proxy=proxy_mean, gold=gold_mean))
    return tuple(points)


def round_points(
    trainings: Sequence[Sequence[RoundOutcome]], *, num_samples: int, seed: int
) -> tuple[OptimisedPoint, ...]:
    """Proxy and gold over the rounds of trainings that differ in their seed, with intervals over all their prompts.

    Units are standard deviations of prompt means in the first round, which the untrained policy answered.

    Args:
        trainings: S trainings of as many rounds; none gives no point.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    points = []
    for index, rounds in enumerate(zip(*trainings, strict=True)):
        ends = {
            name: bootstrap_mean(
                np.concatenate(
                    [
                        _in_units(getattr(own, name), getattr(training[0], name))
                        for own, training in zip(rounds, trainings, strict=True)
                    ]
                ),
                num_samples=num_samples,
                generator=np.random.default_rng(seed),
            )
            for name in ("proxy", "gold")
        }
        kl = float(np.mean([own.kl for own in rounds]))
        points.append(OptimisedPoint(label=f"round {index + 1}", kl=kl, **ends))
    return tuple(points)


def unfamiliar(outcomes: Sequence[TrialOutcome]) -> tuple[Unfamiliar, ...]:
    """How well each signal of a reward finds shuffled answers, averaged over its seeds."""
    return tuple(
        Unfamiliar(
            signal=name,
            familiar=tuple(outcomes[0].familiar[name].tolist()),
            shuffled=tuple(outcomes[0].shuffled[name].tolist()),
            auroc=mean_interval([shift_auroc(one.familiar[name], one.shuffled[name]) for one in outcomes]),
        )
        for name in outcomes[0].familiar
    )


def _standardised(values_PN: Floats) -> Floats:
    return _in_units(values_PN, values_PN)


def _in_units(values: Floats, of: Floats) -> Floats:
    """Distance from the mean of `of` in its standard deviations; 0 where it has none."""
    spread = of.std()
    moved: Floats = (values - of.mean()) / (spread if spread > 0 else 1.0)
    return moved
