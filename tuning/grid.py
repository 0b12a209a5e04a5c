"""The cheap axes of a sweep, judged on cached states before anything is trained: reward heads, members, confidence.

One task reads the states once. Ensembles that differ in their size alone are one fit of the largest: the first members
of a larger ensemble are the members of a smaller one. So are their replicates, which are further members of the same
pass. A confidence setting costs one pass over margins.

Shape letters: N pairs, M members.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from raylign.config import RunConfig
from raylign.evaluation.metrics import brier, expected_calibration_error
from raylign.rewards.confidence import count_flips, fit_temperature, pair_confidence
from raylign.rewards.fit import fit_hybrid, member_weights
from raylign.rewards.hybrid import HybridReward, standardize
from raylign.rewards.posterior import RewardHead
from raylign.runtime.pair_states import PairStates
from raylign.runtime.reward_job import Held, head_fitter
from tuning.search_space import PointKeys
from tuning.sweep_config import reads_confidence

Pairs = tuple[torch.Tensor, torch.Tensor]  # chosen and rejected states, each (N, L, D)
ScreenMetric = Literal["brier", "ece", "accuracy"]

_FLOOR = "confidence.floor"
_NOT_OF_A_FIT = {"num_heads", "standardize", "folds", "max_pairs"}  # of an ensemble


@dataclass(frozen=True, kw_only=True)
class ScreenData:
    """States of the pairs that heads are fitted to, chosen by and judged on; arrays, which tasks share without a copy.

    Attributes:
        train: chosen and rejected states, each (N, L, D).
        groups: prompt of each training pair.
        valid: likewise, of validation pairs.
        test: likewise, of test pairs.
    """

    train: tuple[np.ndarray, np.ndarray]
    groups: Sequence[str]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    @staticmethod
    def of(states: PairStates) -> ScreenData:
        """The splits of cached states."""
        (*train, groups), (*valid, _), (*test, _) = (states.part(split) for split in ("train", "valid", "test"))
        return ScreenData(
            train=(train[0].numpy(), train[1].numpy()),
            groups=groups,
            valid=(valid[0].numpy(), valid[1].numpy()),
            test=(test[0].numpy(), test[1].numpy()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well one fit orders pairs, and how well it knows.

    Attributes:
        accuracy: share of pairs in stored order.
        ece: expected calibration error of the label confidence before its floor; where the method reads none, of the
            probability of the stored order at a temperature fitted to validation pairs.
        brier: Brier score of the same.
        flips: share of pairs whose stored order the label confidence, floor included, or that probability reverses.
    """

    accuracy: float
    ece: float
    brier: float
    flips: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """One cheap setting.

    Attributes:
        keys: its swept keys.
        num_heads: members of its reward.
        valid: on validation pairs, by replicate; what settings are chosen by.
        test: on test pairs, by replicate; what is reported.
    """

    keys: PointKeys
    num_heads: int
    valid: tuple[Quality, ...]
    test: tuple[Quality, ...]

    @staticmethod
    def from_plain(content: Mapping[str, Any]) -> Screened:
        """The inverse of `dataclasses.asdict`."""
        sides = {side: tuple(Quality(**quality) for quality in content[side]) for side in ("valid", "test")}
        return Screened(keys=content["keys"], num_heads=content["num_heads"], **sides)


def screen(data: ScreenData, settings: Sequence[tuple[PointKeys, RunConfig]], replicates: int) -> list[Screened]:
    """Judge all settings.

    Args:
        data: cached states.
        settings: cheap keys and a configuration that has them; the seed is that of the first replicate.
        replicates: independent fits of every reward.

    Returns:
        In the order of the settings.
    """
    torch.set_num_threads(1)
    train, valid, test = (
        (torch.from_numpy(chosen.copy()), torch.from_numpy(rejected.copy()))  # arrays of the object store are read-only
        for chosen, rejected in (data.train, data.valid, data.test)
    )
    found: dict[int, Screened] = {}
    families: dict[str, list[int]] = {}
    for index, (_, config) in enumerate(settings):
        families.setdefault(_family(config), []).append(index)
    for members in families.values():
        configs = [settings[index][1] for index in members]
        for size_key, heads in _fit_family(train, data.groups, valid, configs, replicates).items():
            sides = {side: [Held.of(head, *part) for head in heads] for side, part in (("v", valid), ("t", test))}
            for index in members:
                keys, config = settings[index]
                if _size_key(config) == size_key:
                    found[index] = _judge(keys, config, heads[0].num_heads, sides["v"], sides["t"])
    return [found[index] for index in range(len(settings))]


def _family(config: RunConfig) -> str:
    """Settings with the same text are fitted together."""
    if config.reward.kind == "ensemble" and config.reward.head_data != "shards":
        return repr(sorted(config.reward.model_dump(exclude=_NOT_OF_A_FIT).items()))
    return repr((config.reward, config.brme))


def _size_key(config: RunConfig) -> tuple[int, bool]:
    return config.reward.num_heads, config.reward.standardize


def _fit_family(
    train: Pairs, groups: Sequence[str], valid: Pairs, configs: Sequence[RunConfig], replicates: int
) -> dict[tuple[int, bool], list[RewardHead]]:
    """Heads of every size, one per replicate."""
    config = configs[0]
    if config.reward.kind == "ensemble" and config.reward.head_data != "shards":
        return fit_sizes(train, valid, config, {_size_key(config) for config in configs}, replicates)
    heads: list[RewardHead] = []
    for replicate in range(replicates):
        run = config.run.model_copy(update={"seed": config.run.seed + replicate})
        fit = head_fitter(train, groups, valid, config.model_copy(update={"run": run}))
        heads.append(fit(torch.arange(len(train[0]))))
    return {_size_key(config): heads}


def fit_sizes(
    train: Pairs, valid: Pairs, config: RunConfig, sizes: Iterable[tuple[int, bool]], replicates: int
) -> dict[tuple[int, bool], list[RewardHead]]:
    """Ensembles of several sizes and their replicates from one pass over the pairs.

    Replicate r of size M is members r x largest to r x largest + M of one large ensemble, standardised as that small
    ensemble would be. Its members have starts and bootstrap weights of their own and share the order of pairs.

    Args:
        train: pairs to fit to.
        valid: pairs that choose epochs and standardise.
        config: an ensemble; its size does not matter.
        sizes: members, and whether they are standardised.
        replicates: of every size.

    Returns:
        By size, one head per replicate; the first is the one that a run with this seed fits, up to rounding.
    """
    sizes, reward, seed = list(sizes), config.reward, config.run.seed
    largest = max(size for size, _ in sizes)
    num_heads = largest * replicates
    whole = fit_hybrid(
        *train,
        valid_chosen=valid[0],
        valid_rejected=valid[1],
        epochs=reward.epochs,
        batch_size=reward.batch_size,
        learning_rate=reward.learning_rate,
        weight_decay=reward.weight_decay,
        ridge=reward.ridge,
        bce_weight=reward.bce_weight,
        margin_target=reward.margin_target,
        train_probes=reward.train_probes,
        seed=seed,
        num_heads=num_heads,
        weights=member_weights(len(train[0]), num_heads, head_data=reward.head_data, seed=seed),
    ).head
    found: dict[tuple[int, bool], list[RewardHead]] = {}
    for size, is_standardized in sizes:
        for replicate in range(replicates):
            head: HybridReward = whole.select(range(replicate * largest, replicate * largest + size))
            if is_standardized:
                standardize(head, torch.cat(valid))
            found.setdefault((size, is_standardized), []).append(head)
    return found


def _judge(keys: PointKeys, config: RunConfig, num_heads: int, valid: Sequence[Held], test: Sequence[Held]) -> Screened:
    qualities: dict[str, list[Quality]] = {"valid": [], "test": []}
    for of_valid, of_test in zip(valid, test, strict=True):
        fixed = config.confidence.temperature
        temperature = fit_temperature(of_valid.margin) if fixed == "fitted" else fixed
        center = of_valid.mean_reward if config.confidence.center == "ema" else 0.0
        for name, held in (("valid", of_valid), ("test", of_test)):
            qualities[name].append(quality(held, config, center=center, temperature=temperature))
    return Screened(keys=keys, num_heads=num_heads, valid=tuple(qualities["valid"]), test=tuple(qualities["test"]))


def quality(held: Held, config: RunConfig, *, center: float, temperature: float) -> Quality:
    """Of pairs whose stored order is taken for right.

    Args:
        held: beliefs about both answers of the pairs.
        config: section confidence, where the method reads it.
        center: mean reward that is subtracted.
        temperature: reward units.
    """
    if not reads_confidence(config):
        return _quality(held, belief=held.margin.preference_prob(temperature), flips=None)

    def gamma(floor: float) -> torch.Tensor:
        return pair_confidence(
            held.chosen.mean,
            held.rejected.mean,
            held.margin.variance,
            alpha=config.confidence.alpha,
            floor=floor,
            center=center,
            level="pair",
            squash=config.confidence.squash,
            temperature=temperature,
        ).label_confidence

    # calibration is of the belief, not of what the floor allows
    return _quality(held, belief=gamma(0.0), flips=count_flips(gamma(config.confidence.floor)))


def _quality(held: Held, *, belief: torch.Tensor, flips: torch.Tensor | None) -> Quality:
    return Quality(
        accuracy=held.accuracy,
        ece=expected_calibration_error(belief.numpy()),
        brier=brier(belief.numpy()),
        flips=float(count_flips(belief) if flips is None else flips) / len(belief),
    )


def survivors(rows: Sequence[Screened], *, keep: int, metric: ScreenMetric) -> list[PointKeys]:
    """The settings that are worth a training.

    Settings that differ in their floor alone hold the same belief; they are kept or dropped together, because on
    pairs whose stored order counts as right, any floor looks good.

    Args:
        rows: judged settings.
        keep: beliefs to keep.
        metric: mean over replicates on validation pairs; higher is better for accuracy, lower for the others.

    Returns:
        In the order of the rows.
    """
    sign = -1.0 if metric == "accuracy" else 1.0
    scores: dict[str, float] = {}
    for row in rows:
        scores.setdefault(_belief(row.keys), sign * float(np.mean([getattr(q, metric) for q in row.valid])))
    kept = set(sorted(scores, key=lambda belief: scores[belief])[:keep])
    return [row.keys for row in rows if _belief(row.keys) in kept]


def _belief(keys: PointKeys) -> str:
    return repr(sorted((key, value) for key, value in keys.items() if key != _FLOOR))


def timed_screen(
    data: ScreenData, settings: Sequence[tuple[PointKeys, RunConfig]], replicates: int
) -> tuple[list[dict[str, Any]], float]:
    """`screen` as plain values, for a Ray task and a manifest, and its seconds."""
    start = time.monotonic()
    rows = [dataclasses.asdict(row) for row in screen(data, settings, replicates)]
    return rows, time.monotonic() - start
