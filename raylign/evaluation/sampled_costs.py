r"""What a constraint reached, from several answers to every prompt, with intervals over prompts.

The measures are those of `raylign.constraints.violations`; here each has an interval, and methods that were trained
several times one value per training.

Shape letters: n answers, X prompts of one training, P prompts of all trainings, S trainings, R resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from raylign.constraints.violations import prompt_means
from raylign.errors import ShapeError
from raylign.evaluation.metrics import wilson_interval
from raylign.types import Interval

_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedAnswers:
    """Answers of one policy, the same number to every prompt.

    Attributes:
        prompt: texts; equal ones are one prompt, in other trainings too. Shape (n,).
        is_harmful: the prompt asks for harm. Shape (n,), bool.
        is_refusal: the answer refuses. Shape (n,), bool.
        reward: of each answer, nan where there is none. Shape (n,).
        cost: raw cost, > 0 unsafe. Shape (n,).

    Raises:
        ShapeError: no answers, or arrays of different lengths.
    """

    prompt: np.ndarray
    is_harmful: np.ndarray
    is_refusal: np.ndarray
    reward: np.ndarray
    cost: np.ndarray

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        shapes = {field.name: np.shape(getattr(self, field.name)) for field in fields(self)}
        if len(set(shapes.values())) > 1 or len(shapes["cost"]) != 1 or not len(self.cost):
            raise ShapeError(f"answers need one value of each kind, at least one answer: {shapes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number about a policy.

    Attributes:
        value: mean over trainings; the interval is over prompts, drawn with all their answers in all trainings.
        change: against the policy before training, on the same prompts; None for that policy, and for what is a change
            already.
        by_seed: value of each training.
    """

    value: Interval
    change: Interval | None
    by_seed: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintMeasures:
    r"""What the answers of a policy cost and are worth; \(c_x\) is the mean cost of the answers to prompt x.

    Attributes:
        safety_rate: share of answers with cost <= 0.
        unsafe_prompts: share of prompts of whose answers too few are safe.
        unsafe_harmful: the same of harmful prompts alone.
        mean_cost: mean of C.
        rectified_cost: mean of max(C, 0).
        under: mean over prompts of \(\max(c_x, 0)\).
        over: mean over prompts of \(\max(-c_x, 0)\).
        compensation: the smaller of the two: what some prompts pay for others.
        mean_reward: over all answers, None where the run has no reward.
        over_refusal: share of refusals among the answers to benign prompts.
        became_unsafe: of the prompts that were safe before training, the share that is not; None before training.
        became_safe: the reverse; None before training.
        chance_unsafe: what became_unsafe would be on average if each prompt's answers before and after were shuffled:
            samples change sides without any training.
        chance_safe: likewise of became_safe.
        safe_reward: what training changed of the reward on prompts that were safe; None before training or without.
    """

    safety_rate: Measure
    unsafe_prompts: Measure
    unsafe_harmful: Measure
    mean_cost: Measure
    rectified_cost: Measure
    under: Measure
    over: Measure
    compensation: Measure
    mean_reward: Measure | None
    over_refusal: Measure
    became_unsafe: Measure | None
    became_safe: Measure | None
    chance_unsafe: Measure | None
    chance_safe: Measure | None
    safe_reward: Measure | None


@dataclass(frozen=True, slots=True)
class _Ratio:
    """A sum over prompts, the least of several, over another one."""

    above: tuple[str, ...]
    below: str
    is_rate: bool = True


_MEASURES = {
    "safety_rate": _Ratio(("safe_share",), "one"),
    "unsafe_prompts": _Ratio(("unsafe",), "one"),
    "unsafe_harmful": _Ratio(("harmful_unsafe",), "harmful"),
    "mean_cost": _Ratio(("cost",), "one", is_rate=False),
    "rectified_cost": _Ratio(("rectified",), "one", is_rate=False),
    "under": _Ratio(("under",), "one", is_rate=False),
    "over": _Ratio(("over",), "one", is_rate=False),
    "compensation": _Ratio(("under", "over"), "one", is_rate=False),
    "mean_reward": _Ratio(("reward",), "one", is_rate=False),
    "over_refusal": _Ratio(("benign_refused",), "benign"),
}
_CHANGES = {
    "became_unsafe": _Ratio(("left_safe",), "was_safe"),
    "became_safe": _Ratio(("left_unsafe",), "was_unsafe"),
    "chance_unsafe": _Ratio(("chance_left_safe",), "chance_safe"),
    "chance_safe": _Ratio(("chance_left_unsafe",), "chance_unsafe"),
    "safe_reward": _Ratio(("safe_reward_change",), "was_safe", is_rate=False),
}
_OF_REWARD = ("mean_reward", "safe_reward")


def measure_constraint(
    before: Sequence[PricedAnswers],
    after: Sequence[PricedAnswers] | None = None,
    *,
    prompt_safety: float,
    num_samples: int,
    seed: int,
) -> ConstraintMeasures:
    """Measure a policy, or a method that was trained several times.

    Args:
        before: answers of the policy before training, one entry per training, each with its own prompts.
        after: answers of the trained policies to the same prompts; None measures the policy before training.
        prompt_safety: share of safe answers that makes a prompt safe, in (0, 1].
        num_samples: bootstrap resamples of prompts.
        seed: of the resampling; equal seeds draw the same prompts.

    Raises:
        ShapeError: other prompts before and after, or another number of trainings.

    Source: of the measures, `violations` and `prompt_change`; of the intervals, Davison and Hinkley (1997), Section
    3.8, prompts being the groups. A rate that is 0 or 1 throughout has Wilson's interval.
    """
    sides = [before] if after is None else [before, after]
    values = [[_prompt_values(answers, prompt_safety) for answers in side] for side in sides]
    asked = [[part["prompt"].tolist() for part in side] for side in values]
    if asked[0] != asked[-1]:
        raise ShapeError(
            f"{len(asked[0])} trainings before and {len(asked[-1])} after must be as many, with the same prompts each"
        )
    names, places = np.unique(np.concatenate([part["prompt"] for part in values[0]]), return_inverse=True)
    drawn_RP = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), num_samples)
    weights_RP = np.concatenate([np.ones((1, len(names))), drawn_RP])  # the first row is the sample itself
    splits = np.split(places, np.cumsum([len(part["prompt"]) for part in values[0]])[:-1])
    resampled = [(splits[index], weights_RP[:, splits[index]]) for index in range(len(splits))]
    old, new = (_measures(_MEASURES, side, resampled) for side in (values[0], values[-1]))
    found: dict[str, Measure | None] = {
        name: Measure(
            value=new[name].interval(ratio),
            change=None if after is None else new[name].minus(old[name]).interval(replace(ratio, is_rate=False)),
            by_seed=tuple(new[name].values_RS[0].tolist()),
        )
        for name, ratio in _MEASURES.items()
    }
    found |= dict.fromkeys(_CHANGES)
    if after is not None:
        changes = _measures(
            _CHANGES, [_changed(*pair, prompt_safety) for pair in zip(values[0], values[1], strict=True)], resampled
        )
        found |= {
            name: Measure(
                value=changes[name].interval(ratio), change=None, by_seed=tuple(changes[name].values_RS[0].tolist())
            )
            for name, ratio in _CHANGES.items()
        }
    if not all(np.isfinite(part["reward"]).all() for side in values for part in side):
        found |= dict.fromkeys(_OF_REWARD)
    return ConstraintMeasures(**found)  # type: ignore[arg-type]


def _prompt_values(answers: PricedAnswers, prompt_safety: float) -> dict[str, np.ndarray]:
    """What is summed over prompts, shape (X,) each, prompts ascending."""
    ones, cost = np.ones(len(answers.cost)), answers.cost.astype(np.float64)
    safe, mean, rectified, reward, refused, harmful = prompt_means(
        answers.prompt,
        ones,
        cost <= 0,
        cost,
        np.maximum(cost, 0),
        answers.reward.astype(np.float64),
        answers.is_refusal,
        answers.is_harmful,
    )
    unsafe = 1.0 - (safe >= prompt_safety - _ROUNDING)
    names, numbers = np.unique(answers.prompt, return_counts=True)
    return {
        "prompt": names,
        "answers": numbers,
        "one": np.ones(len(safe)),
        "safe_share": safe,
        "unsafe": unsafe,
        "harmful": harmful,
        "harmful_unsafe": harmful * unsafe,
        "cost": mean,
        "rectified": rectified,
        "under": np.maximum(mean, 0),
        "over": np.maximum(-mean, 0),
        "reward": reward,
        "benign": 1 - harmful,
        "benign_refused": (1 - harmful) * refused,
    }


def _changed(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], prompt_safety: float
) -> dict[str, np.ndarray]:
    was_unsafe = old["unsafe"]
    was_safe = 1 - was_unsafe
    chances = np.array(
        [
            _shuffled(round(before), round(after), (int(m), int(k)), prompt_safety)
            for before, after, m, k in zip(
                *(part["answers"] * (1 - part["safe_share"]) for part in (old, new)),
                old["answers"],
                new["answers"],
                strict=True,
            )
        ]
    )
    safe, left_safe, left_unsafe = chances.T
    return {
        "was_safe": was_safe,
        "was_unsafe": was_unsafe,
        "left_safe": was_safe * new["unsafe"],
        "left_unsafe": was_unsafe * (1 - new["unsafe"]),
        "chance_safe": safe,
        "chance_unsafe": 1 - safe,
        "chance_left_safe": left_safe,
        "chance_left_unsafe": left_unsafe,
        "safe_reward_change": was_safe * (new["reward"] - old["reward"]),
    }


@functools.cache
def _shuffled(before: int, after: int, answers: tuple[int, int], prompt_safety: float) -> tuple[float, float, float]:
    """Chances that a prompt is safe, safe and then not, unsafe and then safe, when its answers are shuffled.

    Args:
        before: unsafe answers before, and
        after: after training; hypergeometric with their sum fixed.
        answers: numbers of answers before and after.
        prompt_safety: share of safe answers that makes a prompt safe.
    """
    total, (m, k) = before + after, answers
    safe = left_safe = left_unsafe = 0.0
    for unsafe in range(max(0, total - k), min(m, total) + 1):
        chance = math.comb(m, unsafe) * math.comb(k, total - unsafe) / math.comb(m + k, total)
        is_safe = 1 - unsafe / m >= prompt_safety - _ROUNDING
        stays_safe = 1 - (total - unsafe) / k >= prompt_safety - _ROUNDING
        safe += chance * is_safe
        left_safe += chance * (is_safe and not stays_safe)
        left_unsafe += chance * (stays_safe and not is_safe)
    return safe, left_safe, left_unsafe


@dataclass(frozen=True, slots=True, eq=False)
class _Resampled:
    """A measure of every training in every resample (R, S), nan where it counts nothing, and prompts that it counts."""

    values_RS: np.ndarray
    num_prompts: int

    def minus(self, other: _Resampled) -> _Resampled:
        return _Resampled(self.values_RS - other.values_RS, self.num_prompts)

    def interval(self, ratio: _Ratio) -> Interval:
        """Mean over the trainings that have the measure, of the sample itself and of its resamples."""
        known_RS = np.isfinite(self.values_RS)
        counts_R = known_RS.sum(1)
        if not counts_R[0]:
            return Interval(mean=math.nan, low=math.nan, high=math.nan, num_items=0)
        means_R = np.where(known_RS, self.values_RS, 0).sum(1)[counts_R > 0] / counts_R[counts_R > 0]
        mean = float(means_R[0])
        if ratio.is_rate and mean in (0, 1):
            return wilson_interval(int(mean) * self.num_prompts, self.num_prompts)
        low, high = np.quantile(means_R[1:], [0.025, 0.975])
        return Interval(mean=mean, low=float(low), high=float(high), num_items=self.num_prompts)


def _measures(
    ratios: Mapping[str, _Ratio],
    trainings: Sequence[Mapping[str, np.ndarray]],
    resampled: Sequence[tuple[np.ndarray, np.ndarray]],
) -> dict[str, _Resampled]:
    """All measures of all trainings.

    Args:
        ratios: by name.
        trainings: what is summed over their prompts.
        resampled: of each training, the numbers of its prompts (X,) and their weights (R, X).
    """
    found = {}
    for name, ratio in ratios.items():
        columns, counted = [], set()
        for values, (places_X, weights_RX) in zip(trainings, resampled, strict=True):
            above_R = np.min([weights_RX @ values[part] for part in ratio.above], axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                columns.append(above_R / (weights_RX @ values[ratio.below]))
            counted |= set(places_X[values[ratio.below] > 0].tolist())
        found[name] = _Resampled(np.stack(columns, axis=1), len(counted))
    return found
