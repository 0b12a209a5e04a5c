r"""Is it still right to re-rank old candidates? Their order may move, the distribution they come from may not.

Re-ranking replaces sampling on the hypothesis that training changes which candidate the policy likes best long before
it changes what the policy says. Both halves are measured on the same candidates: the order by Kendall's tau, the
distribution by a histogram divergence held against what chance alone gives.

Shape letters: P prompts, K candidates, S fresh samples per prompt, M = P * K pooled candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from raylign.errors import DataError, ShapeError
from raylign.evaluation.metrics import Floats, bootstrap_mean
from raylign.types import Interval

Verdict = Literal["hypothesis holds", "order unchanged", "candidates are stale"]

ADVICE: dict[Verdict, str] = {
    "hypothesis holds": "The order of the candidates moved and their distribution did not: go on re-ranking them.",
    "order unchanged": "Neither the order of the candidates nor their distribution moved: re-ranking changes nothing.",
    "candidates are stale": "The policy left the distribution of its candidates: sample anew before training on.",
}

_CANDIDATES_PER_BIN = 10
_MAX_BINS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """What training did to the candidates of held-out prompts.

    Attributes:
        kendall_tau: mean over prompts of tau-b between the candidates' order at step 0 and now, bootstrapped over
            prompts.
        rank_drift: 1 - tau, with the matching interval; 0 when no order changed.
        top1_change_rate: share of prompts whose likeliest candidate is another one now.
        js_divergence: Jensen-Shannon divergence of the pooled histograms at step 0 and now, nats, at most log 2.
        js_null_limit: 95 % quantile of that divergence between random halves of the step-0 sample.
        num_bins: bins of the histograms.
        kl: Monte-Carlo KL(policy now || reference) in nats per response, from fresh samples, bootstrapped over prompts;
            None without any.
        num_prompts: P.
        num_candidates: K.
        verdict: "hypothesis holds", "order unchanged" or "candidates are stale".
        advice: the verdict's reason and consequence in one sentence.
    """

    kendall_tau: Interval
    rank_drift: Interval
    top1_change_rate: float
    js_divergence: float
    js_null_limit: float
    num_bins: int
    kl: Interval | None
    num_prompts: int
    num_candidates: int
    verdict: Verdict
    advice: str

    @property
    def is_stale(self) -> bool:
        """Whether a new round of sampling is recommended."""
        return self.verdict == "candidates are stale"


def measure_drift(
    reference_mean_logps: ArrayLike,
    policy_mean_logps: ArrayLike,
    *,
    num_samples: int,
    generator: np.random.Generator,
    fresh_policy_logps: ArrayLike | None = None,
    fresh_reference_logps: ArrayLike | None = None,
) -> DriftReport:
    """Rank drift, distribution drift and a verdict from log-probabilities of stored candidates.

    "candidates are stale" when the divergence exceeds what random halves of the step-0 sample reach in 95 % of the
    splits; else "hypothesis holds" when the interval of the rank drift excludes 0; else "order unchanged". The null
    compares halves, so it is wide: a shift that it misses is small against the spread between candidates.

    Args:
        reference_mean_logps: length-mean log-probabilities at step 0, nats per token. Shape (P, K), K at least 2.
        policy_mean_logps: of the same candidates now. Shape (P, K).
        num_samples: bootstrap resamples and null splits.
        generator: source of both.
        fresh_policy_logps: summed log-probabilities of answers sampled from the policy now, S per prompt. Shape
            (P, S).
        fresh_reference_logps: of the same answers under the reference. Shape (P, S).

    Returns:
        The report.

    Raises:
        ShapeError: inputs disagree in shape or number of prompts, or fewer than 2 candidates a prompt.
        DataError: no prompt, a value that is not finite, or one of the two fresh arrays alone.

    Source: check of the assumption of arXiv:2503.10093, reconstructed; see docs/math.md.
    """
    before_PK, now_PK = np.asarray(reference_mean_logps, np.float64), np.asarray(policy_mean_logps, np.float64)
    if before_PK.ndim != 2 or before_PK.shape != now_PK.shape or before_PK.shape[1] < 2:
        raise ShapeError(f"log-probabilities {before_PK.shape} and {now_PK.shape} must be (P, K) and K at least 2")
    if before_PK.size == 0 or not (np.isfinite(before_PK).all() and np.isfinite(now_PK).all()):
        raise DataError("drift needs finite log-probabilities of at least one prompt; drop empty candidates first")
    if (fresh_policy_logps is None) != (fresh_reference_logps is None):
        raise DataError("fresh samples need their log-probabilities under both the policy and the reference")

    tau = bootstrap_mean(kendall_tau(before_PK, now_PK), num_samples=num_samples, generator=generator)
    rank_drift = Interval(mean=1 - tau.mean, low=1 - tau.high, high=1 - tau.low, num_items=tau.num_items)
    num_bins = min(_MAX_BINS, max(2, before_PK.size // _CANDIDATES_PER_BIN))
    edges = _quantile_edges(before_PK.ravel(), num_bins)
    divergence = _js_divergence(_histogram(before_PK.ravel(), edges), _histogram(now_PK.ravel(), edges))
    null_limit = _null_limit(before_PK.ravel(), edges, num_samples, generator)
    if divergence > null_limit:
        verdict: Verdict = "candidates are stale"
    elif rank_drift.low > 0:
        verdict = "hypothesis holds"
    else:
        verdict = "order unchanged"
    kl = None
    if fresh_policy_logps is not None and fresh_reference_logps is not None:
        policy_PS, reference_PS = np.asarray(fresh_policy_logps), np.asarray(fresh_reference_logps)
        if policy_PS.ndim != 2 or policy_PS.shape != reference_PS.shape or len(policy_PS) != len(before_PK):
            raise ShapeError(
                f"fresh log-probabilities {policy_PS.shape} and {reference_PS.shape} must be (P, S) "
                f"with P={len(before_PK)}"
            )
        # samples of one prompt share its difficulty, so the prompt is what the bootstrap draws
        log_ratio_P = (policy_PS.astype(np.float64) - reference_PS).mean(axis=1)
        kl = bootstrap_mean(log_ratio_P, num_samples=num_samples, generator=generator)
    return DriftReport(
        kendall_tau=tau,
        rank_drift=rank_drift,
        top1_change_rate=_top1_change_rate(before_PK, now_PK),
        js_divergence=divergence,
        js_null_limit=null_limit,
        num_bins=num_bins,
        kl=kl,
        num_prompts=before_PK.shape[0],
        num_candidates=before_PK.shape[1],
        verdict=verdict,
        advice=ADVICE[verdict],
    )


def kendall_tau(first_PK: Floats, second_PK: Floats) -> Floats:
    r"""Kendall's tau-b of each row.

    Definition: \(\sum_{i<j} \mathrm{sgn}(a_i - a_j) \mathrm{sgn}(b_i - b_j) / \sqrt{n_a n_b}\), \(n_a\) and \(n_b\) the
    pairs not tied in a and in b. Identical candidates, which share their log-probability, so do not count as change.

    Args:
        first_PK: shape (P, K).
        second_PK: shape (P, K).

    Returns:
        Tau in [-1, 1]; 1 for a row tied throughout in both, 0 for one tied throughout in one. Shape (P,).

    Source: Kendall (1945), "The treatment of ties in ranking problems".
    """
    first, second = np.triu_indices(first_PK.shape[1], k=1)
    sign_a = np.sign(first_PK[:, first] - first_PK[:, second])
    sign_b = np.sign(second_PK[:, first] - second_PK[:, second])
    untied_a, untied_b = np.abs(sign_a).sum(1), np.abs(sign_b).sum(1)
    concordance = (sign_a * sign_b).sum(1) / np.sqrt(np.maximum(untied_a * untied_b, 1))
    result: Floats = np.where(untied_a + untied_b == 0, 1.0, concordance)
    return result


def _top1_change_rate(before_PK: Floats, now_PK: Floats) -> float:
    """Share of rows where the old best is not among the best now; a tie with an identical candidate is no change."""
    kept = np.take_along_axis(now_PK, before_PK.argmax(axis=1)[:, None], axis=1)[:, 0]
    return float((kept < now_PK.max(axis=1)).mean())


def _quantile_edges(sample_M: Floats, num_bins: int) -> Floats:
    """Inner edges of bins that hold equal shares of the sample; the outer bins are open, so no value falls outside."""
    edges: Floats = np.quantile(sample_M, np.arange(1, num_bins) / num_bins).astype(np.float64)
    return edges


def _histogram(sample_M: Floats, edges: Floats) -> Floats:
    """Share of the sample in each bin."""
    counts = np.bincount(np.searchsorted(edges, sample_M, side="right"), minlength=len(edges) + 1)
    return counts / len(sample_M)


def _js_divergence(first: Floats, second: Floats) -> float:
    r"""Jensen-Shannon divergence of two histograms in nats: mean KL to their midpoint (Lin, 1991)."""
    middle = (first + second) / 2

    def kl_to_middle(histogram: Floats) -> float:
        filled = histogram > 0
        return float((histogram[filled] * np.log(histogram[filled] / middle[filled])).sum())

    return max(0.0, (kl_to_middle(first) + kl_to_middle(second)) / 2)


def _null_limit(sample_M: Floats, edges: Floats, num_splits: int, generator: np.random.Generator) -> float:
    """95 % quantile of the divergence between random halves of one sample."""
    half = len(sample_M) // 2
    divergences = []
    for _ in range(num_splits):
        shuffled_M = generator.permutation(sample_M)
        divergences.append(_js_divergence(_histogram(shuffled_M[:half], edges), _histogram(shuffled_M[half:], edges)))
    return float(np.quantile(divergences, 0.95))
