"""What fits of a reward model say together: quality under label noise, curves of its maximum, signs of strangeness.

Everything is a mean over seeds first; what is resampled for the intervals are prompts. The spread between seeds is not
in them.

Shape letters: B test pairs, P prompts, N candidates of a prompt, K responses of a prompt, S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from raylign.evaluation.best_of_n import kl_bound, selection_weights
from raylign.evaluation.metrics import Floats, auroc, bootstrap_mean, expected_calibration_error, wilson_interval
from raylign.evaluation.uncertainty import (
    ConfidentRanking,
    MarginQuality,
    ReliabilityCurve,
    margin_ranking,
    reliability_curve,
)
from raylign.types import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOutcome:
    """What one fit of one reward model says; small enough to travel.

    Attributes:
        num_heads: members.
        margin_mean: (B,) of the test pairs, reward units.
        margin_variance: (B,) likewise, squared.
        temperature: fitted to the validation pairs, reward units.
        proxies: name of a reward -> (P, N) rewards of the candidates by its rule, reward units.
        familiar: signal name -> (P, n) values on the first n answers to each prompt, higher the stranger.
        shuffled: likewise on the same answers with their words shuffled.
        floor_share: share of standard deviations within twice their floor on test answers, None without them.
        anchor_spread: of the members on test answers, None with one.
        seconds: of the fit.
        warnings: what the fit warned of.
    """

    num_heads: int
    margin_mean: Floats
    margin_variance: Floats
    temperature: float
    proxies: Mapping[str, Floats]
    familiar: Mapping[str, Floats]
    shuffled: Mapping[str, Floats]
    floor_share: float | None
    anchor_spread: float | None
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def logits(self) -> Floats:
        r"""(B,) logit of P(chosen preferred), \(m / \sqrt{T^2 + \pi v/8}\)."""
        spread: Floats = np.sqrt(self.temperature**2 + math.pi / 8 * self.margin_variance)
        return self.margin_mean / spread


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """One round of one training.

    Attributes:
        kl: mean log-probability ratio of policy and reference over the responses, nats.
        proxy: (P, K) reward of each response, reward units.
        gold: (P, K) minus the judge's cost of each, logits; below 0 unsafe.
    """

    kl: float
    proxy: Floats
    gold: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisyQuality:
    """A reward model fitted to labels of which a share was reversed, judged on test pairs as they are.

    Attributes:
        flip_rate: share of training and validation pairs that were reversed.
        quality: means over seeds, intervals over the prompts of the test pairs.
        curve: of the preference probability, first seed.
        ranking: orders whose 95 % interval of the margin leaves out 0, mean over seeds; None where margins have no
            variance.
    """

    flip_rate: float
    quality: MarginQuality
    curve: ReliabilityCurve
    ranking: ConfidentRanking | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimisedPoint:
    """How far a reward was driven, and what it and the judge say of the answers there.

    The unit of both rewards is the standard deviation between the untrained policy's answers to one prompt; 0 is what
    the untrained policy gets. Best-of-n compares answers to one prompt alone, and so does a policy gradient: what
    tells prompts apart is no gain of either and left out.

    Attributes:
        step: n of best-of-n, or the round, from 1.
        kl: from the reference, nats: the bound log n - (n - 1)/n, or the estimate over the round's responses.
        proxy: gain in the reward that chose or was trained on.
        gold: gain in minus the judge's cost.
        gap: proxy minus gold, paired by prompt.
        unsafe: share of the answers that the judge calls unsafe.
    """

    step: int
    kl: float
    proxy: Interval
    gold: Interval
    gap: Interval
    unsafe: Interval


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


def noisy_quality(
    flip_rate: float, outcomes: Sequence[FitOutcome], groups: Sequence[str], *, num_samples: int, seed: int
) -> NoisyQuality:
    """Quality of one reward model at one share of flips; a tie counts as wrong.

    Every number is that of each seed's margins, averaged over seeds; one resample of prompts serves all seeds. The
    calibration error is biased upward by the noise of its bins, and resampling adds noise again, so its interval is the
    basic bootstrap (the estimate twice, minus the resampled quantile), widened where needed to contain the estimate.
    Near 0 that does not undo the whole bias: whether the error is more than noise is what the limit says, from orders
    drawn with the stated probabilities.

    Args:
        flip_rate: that share.
        outcomes: S fits, judged on the same test pairs.
        groups: prompt of each test pair; pairs of one prompt are resampled together. Length B.
        num_samples: bootstrap resamples.
        seed: of the bootstrap; equal seeds resample alike, so that models differ only by their margins.

    Source: MacKay (1992) for P; Davison and Hinkley (1997), Section 5.2, for the basic bootstrap; Bröcker and Smith
    (2007) for the limit.
    """
    logits_SB = np.stack([outcome.logits for outcome in outcomes])
    stated_SB: Floats = np.exp(-np.logaddexp(0, -logits_SB))
    resamples = _resamples(groups, num_samples=num_samples, generator=np.random.default_rng(seed))
    error = _calibration_error(stated_SB)
    high, low = 2 * error - np.quantile([_calibration_error(stated_SB[:, rows]) for rows in resamples], [0.025, 0.975])
    return NoisyQuality(
        flip_rate=flip_rate,
        quality=MarginQuality(
            accuracy=_accuracy((logits_SB > 0).mean(0), resamples, num_prompts=len(set(groups))),
            calibration_error=Interval(
                mean=error,
                low=max(0.0, min(float(low), error)),
                high=max(float(high), error),
                num_items=logits_SB.shape[1],
            ),
            calibration_limit=_calibration_limit(
                stated_SB, num_samples=num_samples, generator=np.random.default_rng(seed)
            ),
            brier=_mean(np.square(1 - stated_SB).mean(0), resamples),
            log_likelihood=_mean(-np.logaddexp(0, -logits_SB).mean(0), resamples),
        ),
        curve=reliability_curve(stated_SB[0], num_bins=10),
        ranking=_ranking(outcomes),
    )


def _ranking(outcomes: Sequence[FitOutcome]) -> ConfidentRanking | None:
    if not all(bool(outcome.margin_variance.any()) for outcome in outcomes):
        return None
    found = [margin_ranking(outcome.margin_mean, outcome.margin_variance) for outcome in outcomes]
    return ConfidentRanking(
        **{
            name: float(np.mean([getattr(one, name) for one in found]))
            for name in ("right", "sure_right", "sure_wrong")
        }
    )


def _resamples(groups: Sequence[str], *, num_samples: int, generator: np.random.Generator) -> list[NDArray[np.intp]]:
    """Rows of each resample of whole groups."""
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))[:-1])
    return [
        np.concatenate([members[group] for group in generator.integers(len(members), size=len(members))])
        for _ in range(num_samples)
    ]


def _mean(values_B: Floats, resamples: Sequence[NDArray[np.intp]]) -> Interval:
    """Mean with its percentile interval over resamples of rows."""
    low, high = np.quantile([values_B[rows].mean() for rows in resamples], [0.025, 0.975])
    return Interval(mean=float(values_B.mean()), low=float(low), high=float(high), num_items=len(values_B))


def _accuracy(right_B: Floats, resamples: Sequence[NDArray[np.intp]], *, num_prompts: int) -> Interval:
    """Mean with its interval; Wilson's over prompts, not pairs, where all pairs agree and resamples have no width."""
    agreed = _agreed(right_B, num_prompts)
    return _mean(right_B, resamples) if agreed is None else replace(agreed, num_items=len(right_B))


def _calibration_error(stated_SB: Floats) -> float:
    return float(np.mean([expected_calibration_error(stated_B) for stated_B in stated_SB]))


def _calibration_limit(stated_SB: Floats, *, num_samples: int, generator: np.random.Generator) -> float:
    """95 % quantile of the error when pairs are ordered as stated, the luck of a pair being that of all seeds."""
    drawn = [
        _calibration_error(np.where(generator.random(stated_SB.shape[1]) < stated_SB, stated_SB, 1 - stated_SB))
        for _ in range(num_samples)
    ]
    return float(np.quantile(drawn, 0.95))


def best_of_n_points(
    proxies_SPN: Sequence[Floats], gold_PN: Floats, *, num_samples: int, seed: int
) -> tuple[OptimisedPoint, ...]:
    """Proxy and gold of the best of n, n doubling from 1 to N, averaged over seeds, with intervals over prompts.

    Args:
        proxies_SPN: rewards that choose, by each of S fits.
        gold_PN: what judges, minus the cost.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    num_candidates = gold_PN.shape[1]
    units = [_within_prompts(proxy) for proxy in proxies_SPN]
    points = []
    for n in sizes_up_to(num_candidates):
        weights = [selection_weights(proxy, n) for proxy in proxies_SPN]
        proxy_P = np.mean([(w * proxy).sum(1) for w, proxy in zip(weights, units, strict=True)], axis=0)
        gold_P = gold_gain(proxies_SPN, gold_PN, n)
        unsafe_P = np.mean([(w * (gold_PN < 0)).sum(1) for w in weights], axis=0)
        proxy, gold, gap = (
            bootstrap_mean(values, num_samples=num_samples, generator=np.random.default_rng(seed))
            for values in (proxy_P, gold_P, proxy_P - gold_P)
        )
        unsafe = _share(unsafe_P, num_samples=num_samples, seed=seed)
        points.append(OptimisedPoint(step=n, kl=kl_bound(n), proxy=proxy, gold=gold, gap=gap, unsafe=unsafe))
    return tuple(points)


def gold_gain(proxies_SPN: Sequence[Floats], gold_PN: Floats, n: int) -> Floats:
    """Gain in gold of the best of n by each proxy over the mean answer, averaged over seeds.

    Args:
        proxies_SPN: rewards that choose, by each of S fits.
        gold_PN: what judges.
        n: answers chosen from, at most N.

    Returns:
        In standard deviations between answers to a prompt. Shape (P,).
    """
    unit_PN = _within_prompts(gold_PN)
    gains_SP = [(selection_weights(proxy, n) * unit_PN).sum(1) for proxy in proxies_SPN]
    return np.asarray(np.mean(gains_SP, axis=0))


def sizes_up_to(num_candidates: int) -> list[int]:
    """1, 2, 4, ... and N itself."""
    sizes = [2**power for power in range(num_candidates.bit_length())]
    return sizes if sizes[-1] == num_candidates else [*sizes, num_candidates]


def round_points(
    trainings: Sequence[Sequence[RoundOutcome]], *, num_samples: int, seed: int
) -> tuple[OptimisedPoint, ...]:
    """Proxy and gold over the rounds of trainings that differ in their seed, with intervals over all their prompts.

    Gains are over the first round, which the untrained policy answered. Rounds have other prompts, so both rounds'
    prompts are resampled, each on their own.

    Args:
        trainings: S trainings of as many rounds; none gives no point.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    points = []
    for index, rounds in enumerate(zip(*trainings, strict=True)):
        rewards: dict[str, list[Floats]] = {"proxy": [], "gold": []}  # of this round's prompts and of the first's
        for name, both in rewards.items():
            scales = [_spread_within(getattr(training[0], name)) for training in trainings]
            both += [
                np.concatenate([getattr(one, name).mean(1) / scale for one, scale in zip(ends, scales, strict=True)])
                for ends in (rounds, [training[0] for training in trainings])
            ]
        rewards["gap"] = [proxy - gold for proxy, gold in zip(rewards["proxy"], rewards["gold"], strict=True)]
        unsafe_P = np.concatenate([(own.gold < 0).mean(1) for own in rounds])
        points.append(
            OptimisedPoint(
                step=index + 1,
                kl=float(np.mean([own.kl for own in rounds])),
                unsafe=_share(unsafe_P, num_samples=num_samples, seed=seed),
                **{
                    name: _gain(now, first, is_first=index == 0, num_samples=num_samples, seed=seed)
                    for name, (now, first) in rewards.items()
                },
            )
        )
    return tuple(points)


def _share(shares_P: Floats, *, num_samples: int, seed: int) -> Interval:
    """Mean of shares; Wilson's interval where all prompts agree, which leaves the bootstrap without width."""
    shares = np.clip(shares_P, 0, 1)  # sums of weights are rounded
    agreed = _agreed(shares, len(shares))
    if agreed is not None:
        return agreed
    return bootstrap_mean(shares, num_samples=num_samples, generator=np.random.default_rng(seed))


def _agreed(shares: Floats, num_items: int) -> Interval | None:
    """Wilson's interval of so many items if all shares are 0 or all are 1, up to rounding; else None."""
    for end in (0, 1):
        if np.allclose(shares, end, rtol=0, atol=1e-9):
            return wilson_interval(end * num_items, num_items)
    return None


def _gain(now_P: Floats, first_P: Floats, *, is_first: bool, num_samples: int, seed: int) -> Interval:
    """Difference of the means of two independent sets of prompts; 0 for a set and itself."""
    if is_first:
        return Interval(mean=0.0, low=0.0, high=0.0, num_items=len(now_P))
    generator = np.random.default_rng(seed)
    now, first = (
        values[generator.integers(len(values), size=(num_samples, len(values)))].mean(1) for values in (now_P, first_P)
    )
    low, high = np.quantile(now - first, [0.025, 0.975])
    return Interval(mean=float(now_P.mean() - first_P.mean()), low=float(low), high=float(high), num_items=len(now_P))


def unfamiliar(outcomes: Sequence[FitOutcome], *, num_samples: int, seed: int) -> tuple[Unfamiliar, ...]:
    """How well each signal of a reward model finds shuffled answers, averaged over its seeds.

    An answer is resampled with its shuffled copy and the others to its prompt.

    Args:
        outcomes: S fits of it.
        num_samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    found = []
    for name, first in outcomes[0].familiar.items():
        generator = np.random.default_rng(seed)
        prompts = np.arange(len(first))

        def area(rows: NDArray[np.intp], name: str = name) -> float:
            return float(
                np.mean([auroc(one.shuffled[name][rows].ravel(), one.familiar[name][rows].ravel()) for one in outcomes])
            )

        drawn = [area(generator.integers(len(first), size=len(first))) for _ in range(num_samples)]
        low, high = np.quantile(drawn, [0.025, 0.975])
        found.append(
            Unfamiliar(
                signal=name,
                familiar=tuple(first.ravel().tolist()),
                shuffled=tuple(outcomes[0].shuffled[name].ravel().tolist()),
                auroc=Interval(mean=area(prompts), low=float(low), high=float(high), num_items=first.size),
            )
        )
    return tuple(found)


def _within_prompts(values_PN: Floats) -> Floats:
    """Distance from the prompt's mean in standard deviations between answers to a prompt."""
    centred: Floats = (values_PN - values_PN.mean(1, keepdims=True)) / _spread_within(values_PN)
    return centred


def _spread_within(values_PN: Floats) -> float:
    """Pooled standard deviation between answers to a prompt; 1 where all are equal."""
    spread = float(np.sqrt(values_PN.var(axis=1, ddof=1).mean()))
    return spread if spread > 0 else 1.0
