"""The reward phase: cached states to fitted heads, scored out of fold and judged on held-out prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raylign.config import TEXT_REWARDS, ConfidenceSection, RunConfig
from raylign.errors import ConfigError, DataError
from raylign.evaluation.layers import layer_curve
from raylign.evaluation.metrics import bootstrap_mean, brier, expected_calibration_error
from raylign.rewards.confidence import count_flips, fit_temperature, pair_confidence
from raylign.rewards.cross_fit import checked_folds, cross_fit
from raylign.rewards.fit import FitOptions, fit_hybrid, member_weights, predict
from raylign.rewards.fit_gaussian import fit_gaussian, standardize_targets
from raylign.rewards.gaussian import GaussianHeads, share_at_floor
from raylign.rewards.hybrid import HybridReward
from raylign.rewards.laplace import fit_laplace
from raylign.rewards.member_facts import ANCHOR_LIMIT, anchor_spread
from raylign.rewards.posterior import MarginPosterior, RewardHead, RewardPosterior, margin_posterior
from raylign.runtime.fitted_reward import FittedReward, RewardFacts, resolve_temperature
from raylign.runtime.pair_states import Pairs, read_states, reversed_splits

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


def fit_reward(
    features: ray.data.Dataset, *, config: RunConfig, layers: tuple[int, ...] | None = None, flips: float = 0.0
) -> FittedReward:
    """Fit the reward on the training split and judge it on the test split.

    Args:
        features: with states and splits.
        config: sections reward, brme and confidence (what the calibration metrics are of), and the seed.
        layers: transformer layers of the states, remembered for confidence.source=live; None when unknown.
        flips: share of the training and validation labels that are reversed first, to see what noise does.

    Returns:
        Heads and metrics: `out_of_fold_accuracy`, `test_accuracy` (mean, low, high), `test_ece`, `test_brier` and
        `test_flips` of the label confidence, `test_ece_temperature` of the preference probability, `test_disagreement`,
        the per-layer `layers` curve, `warnings`, and counts.

    Raises:
        ConfigError: a kind that reads texts.
        DataError: a split without pairs, or another number of layers than the states have.
    """
    settings, seed = config.reward, config.run.seed
    if settings.kind in TEXT_REWARDS:
        raise ConfigError(
            f"reward.kind={settings.kind} reads texts, not hidden states; run it with `raylign align`, or take one of "
            "hybrid, ensemble, brme and laplace here"
        )
    states = read_states(features, max_pairs=settings.max_pairs)
    if layers is not None and len(layers) != states.chosen.shape[1]:
        raise DataError(f"the states have {states.chosen.shape[1]} layers, layers={list(layers)} names {len(layers)}")
    chosen, rejected, groups = states.part("train")
    valid = states.part("valid")[:2]
    *test, test_groups = states.part("test")
    if flips:
        (chosen, rejected), valid = reversed_splits((chosen, rejected), valid, share=flips, seed=seed)
    fit = cross_fit(
        chosen,
        rejected,
        groups,
        num_folds=settings.folds,
        seed=seed,
        fit=head_fitter((chosen, rejected), groups, (valid[0], valid[1]), config),
    )
    facts = reward_facts(
        Held(fit.chosen, fit.rejected),
        fit.fold,
        valid=Held.of(fit.full, valid[0], valid[1]),
        test=Held.of(fit.full, test[0], test[1]),
        test_groups=test_groups,
        is_out_of_fold=settings.folds > 1,
        config=config,
    )
    curve = layer_curve(chosen, rejected, test_chosen=test[0], test_rejected=test[1], ridge=settings.ridge)
    facts.metrics["layers"] = [asdict(record) for record in curve]
    facts.metrics["warnings"] = member_warnings(fit.full, predict(fit.full, torch.cat([test[0], test[1]])))
    for warning in facts.metrics["warnings"]:
        logger.warning("reward.kind=%s: %s", settings.kind, warning)
    return FittedReward(
        **{field.name: getattr(facts, field.name) for field in fields(facts)},
        heads=fit.heads,
        full=fit.full,
        layers=layers,
    )


def reward_facts(
    train: Held,
    fold: torch.Tensor,
    *,
    valid: Held,
    test: Held,
    test_groups: Sequence[str],
    is_out_of_fold: bool,
    config: RunConfig,
) -> RewardFacts:
    """Calibrate a reward on the training and validation pairs, and judge it on the test pairs.

    Args:
        train: beliefs about the training pairs.
        fold: of each training pair. Shape (N,), int64.
        valid: beliefs about the validation pairs by what was fitted to all training pairs.
        test: likewise about the test pairs.
        test_groups: prompt of each test pair.
        is_out_of_fold: what believes about training pairs was not fitted to them.
        config: sections reward and confidence, and the seed.
    """
    # In-sample rewards would calibrate to certainty.
    temperature = fit_temperature((train if is_out_of_fold else valid).margin)
    full_center = valid.mean_reward
    facts = RewardFacts(
        kind=config.reward.kind,
        centers=tuple(
            Held(train.chosen[rows], train.rejected[rows]).mean_reward if bool(rows.any()) else full_center
            for rows in (fold == k for k in range(config.reward.folds))
        ),
        full_center=full_center,
        temperature=temperature,
        fold_seed=config.run.seed,
        metrics={},
    )
    facts.metrics.update(
        {
            "num_train_pairs": len(train.chosen),
            "num_valid_pairs": len(valid.chosen),
            "num_test_pairs": len(test.chosen),
            "out_of_fold_accuracy": train.accuracy if is_out_of_fold else None,
            "temperature": temperature,
            **held_out_metrics(test, facts, config.confidence, groups=test_groups, seed=config.run.seed),
        }
    )
    return facts


@dataclass(frozen=True, slots=True)
class Held:
    """Beliefs about both answers of N pairs.

    Attributes:
        chosen: of N answers.
        rejected: likewise.
    """

    chosen: RewardPosterior
    rejected: RewardPosterior

    @staticmethod
    def of(head: RewardHead, chosen: torch.Tensor, rejected: torch.Tensor) -> Held:
        """What a head believes of N pairs of states, each (N, L, D)."""
        return Held(predict(head, chosen), predict(head, rejected))

    @property
    def margin(self) -> MarginPosterior:
        """Of the N pairs."""
        return margin_posterior(self.chosen, self.rejected)

    @property
    def mean_reward(self) -> float:
        """Over all 2N answers."""
        return float(torch.stack([self.chosen.mean, self.rejected.mean]).mean())

    @property
    def accuracy(self) -> float:
        """Share of pairs with a margin above 0."""
        return float((self.chosen.mean > self.rejected.mean).double().mean())


def head_fitter(
    train: Pairs, groups: Sequence[str], valid: Pairs, config: RunConfig
) -> Callable[[torch.Tensor], RewardHead]:
    """What fits one head of `reward.kind` on the pairs at given positions; call it for all pairs first.

    Args:
        train: states of all training pairs.
        groups: prompt key of each.
        valid: states of the pairs that choose epochs and calibrate.
        config: sections reward and brme, and the seed.
    """
    settings, seed = config.reward, config.run.seed
    chosen, rejected = train
    prior_precision = settings.prior_precision

    def probes(rows: torch.Tensor, *, num_heads: int = 1, weights: torch.Tensor | None = None) -> HybridReward:
        return fit_hybrid(
            chosen[rows],
            rejected[rows],
            valid_chosen=valid[0],
            valid_rejected=valid[1],
            seed=seed,
            num_heads=num_heads,
            weights=weights,
            is_standardized=settings.standardize,
            **_fit_options(config),
        ).head

    def gaussian(rows: torch.Tensor, weights: torch.Tensor) -> RewardHead:
        """BRME: rewards of a first stage, which did not see the pair where there are folds, are the targets."""
        fold = checked_folds([groups[row] for row in rows.tolist()], settings.folds, seed + 1)
        left_out = torch.nn.functional.one_hot(fold, settings.folds).float()
        # all folds in one pass: a member of the first stage is a fold's head, blind to that fold
        first = probes(rows, num_heads=settings.folds, weights=1 - left_out if settings.folds > 1 else None)
        targets = [(predict(first, side[rows]).head_rewards * left_out).sum(1) for side in train]
        units = standardize_targets(targets[0], targets[1])
        of_valid = Held.of(first, *valid)
        return fit_gaussian(
            chosen[rows],
            rejected[rows],
            chosen_target=units(targets[0]),
            rejected_target=units(targets[1]),
            valid_chosen=valid[0],
            valid_rejected=valid[1],
            valid_chosen_target=units(of_valid.chosen.mean),
            valid_rejected_target=units(of_valid.rejected.mean),
            weights=weights,
            generator=torch.Generator().manual_seed(seed),
            **config.brme.model_dump(),
        ).heads

    def laplace(rows: torch.Tensor) -> RewardHead:
        nonlocal prior_precision
        fit = fit_laplace(
            chosen[rows],
            rejected[rows],
            valid_chosen=valid[0],
            valid_rejected=valid[1],
            prior_precision=prior_precision,
            num_draws=settings.num_heads,
            generator=torch.Generator().manual_seed(seed),
        )
        prior_precision = fit.prior_precision  # the one of all pairs serves the folds
        return fit.head

    def fit(rows: torch.Tensor) -> RewardHead:
        if settings.kind == "hybrid":
            return probes(rows)
        if settings.kind == "laplace":
            return laplace(rows)
        weights = member_weights(len(rows), settings.num_heads, head_data=settings.head_data, seed=seed)
        if settings.kind == "brme":
            return gaussian(rows, torch.ones(len(rows), settings.num_heads) if weights is None else weights)
        return probes(rows, num_heads=settings.num_heads, weights=weights)

    return fit


def member_warnings(head: RewardHead, belief: RewardPosterior) -> list[str]:
    """What makes a rule over members mean less than it seems to, each with its cure.

    Args:
        head: fitted.
        belief: of the head about answers that it was not fitted to.
    """
    found = []
    if isinstance(head, GaussianHeads) and belief.head_scales is not None:
        share = float(share_at_floor(belief.head_scales, head.sigma_floor).mean())
        if share > 0.5:
            found.append(
                f"sigma lies on its floor for {share:.0%} of the test answers (variance collapse), so that which head "
                "is the most confident is rounding; use brme.loss=gaussian_nll, beta_nll or mse_reparam_kl"
            )
    found += anchor_warnings(belief.head_rewards)
    return found


def anchor_warnings(head_rewards: torch.Tensor) -> list[str]:
    """That a minimum over members is not one, where they have no common zero.

    Args:
        head_rewards: of held-out answers by each member. Shape (n, M).
    """
    spread = anchor_spread(head_rewards)
    if spread <= ANCHOR_LIMIT:
        return []
    return [
        f"the zeros of the members lie {spread:.2f} apart in units of what a member says (limit {ANCHOR_LIMIT:g}), so "
        "that a minimum over members is mostly that of the lowest zero; use robust.rule=mean, or "
        "reward.standardize=true where the kind reads it"
    ]


def held_out_metrics(
    held: Held, fitted: RewardFacts, confidence: ConfidenceSection, *, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    """Accuracy and calibration of the full head on pairs it never saw."""
    margin = held.margin
    belief = pair_confidence(
        held.chosen.mean,
        held.rejected.mean,
        margin.variance,
        alpha=confidence.alpha,
        floor=0.0,  # calibration is of the belief, not of what the floor allows
        center=fitted.full_center if confidence.center == "ema" else 0.0,
        level="pair",
        squash=confidence.squash,
        temperature=resolve_temperature(confidence, fitted),
    )
    gamma = belief.label_confidence
    calibrated = margin.preference_prob(fitted.temperature)
    correct = (margin.mean > 0).double().numpy()
    accuracy = bootstrap_mean(correct, num_samples=1000, generator=np.random.default_rng(seed), groups=groups)
    return {
        "test_accuracy": {"mean": accuracy.mean, "low": accuracy.low, "high": accuracy.high},
        "test_ece": expected_calibration_error(gamma.numpy()),
        "test_brier": brier(gamma.numpy()),
        "test_ece_temperature": expected_calibration_error(calibrated.numpy()),
        "test_flips": int(count_flips(gamma)),
        "test_mean_chosen_reward": float(held.chosen.mean.mean()),
        "test_mean_rejected_reward": float(held.rejected.mean.mean()),
        "test_disagreement": float(margin.variance.sqrt().mean()),
    }


def _fit_options(config: RunConfig) -> FitOptions:
    settings = config.reward
    return {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "ridge": settings.ridge,
        "bce_weight": settings.bce_weight,
        "margin_target": settings.margin_target,
        "train_probes": settings.train_probes,
    }
