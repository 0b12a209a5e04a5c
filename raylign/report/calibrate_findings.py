"""What a reader of a calibration must not miss, in sentences with their cure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raylign.report.wording import format_number
from raylign.rewards.member_facts import ANCHOR_LIMIT, FLOOR_FACTOR

if TYPE_CHECKING:
    from raylign.report.calibrate_data import CalibratedModel, CalibrationResult

FLOOR_LIMIT = 0.5
FEWEST_PROMPTS = 20
_COLLAPSING = ("mse_reparam", "margin_mse")  # losses whose optimum is sigma = 0 whatever the noise


def format_share(share: float) -> str:
    """A share of flips, for example "2.5 %"."""
    return f"{100 * share:g} %"


def model_label(result: CalibrationResult, index: int) -> str:
    """A name that tells the model from the others: its kind, with its first reward where several share the kind."""
    kind, short = result.models[index].kind, short_label(result, index)
    return kind if short == kind else f"{kind} ({short})"


def short_label(result: CalibrationResult, index: int) -> str:
    """The same for a legend: the kind, or the model's first reward where several share the kind."""
    model = result.models[index]
    is_alone = sum(other.kind == model.kind for other in result.models) == 1
    return model.kind if is_alone else model.rewards[0]


def warnings_of(result: CalibrationResult) -> tuple[str, ...]:
    """What makes numbers of this calibration mean less than they seem to."""
    found = []
    for index, model in enumerate(result.models):
        found += [f"{model_label(result, index)}: {sentence}" for sentence in _of_model(result, model)]
    if all(model.by_flips[0].quality.accuracy.low <= 0.5 for model in result.models):
        found.append(
            "No reward model orders test pairs better than a coin: choosing by any of them is noise. Look at the data "
            "(`raylign data inspect`), give more pairs, or a larger policy."
        )
    if result.num_prompts < FEWEST_PROMPTS:
        found.append(
            f"Best-of-n has {result.num_prompts} prompts: below {FEWEST_PROMPTS} bootstrap intervals over prompts are "
            "too narrow. Raise calibrate.num_prompts before believing a difference."
        )
    return tuple(found)


def _of_model(result: CalibrationResult, model: CalibratedModel) -> Iterator[str]:
    if model.floor_share is not None and model.floor_share > FLOOR_LIMIT:
        cause = (
            f"Its loss, brme.loss={model.loss}, is least at sigma 0 whatever the noise; take gaussian_nll, beta_nll or "
            "mse_reparam_kl."
            if model.loss in _COLLAPSING
            else "Lower brme.sigma_floor if the rewards are small, otherwise train for fewer epochs."
        )
        yield (
            f"sigma lies within {FLOOR_FACTOR:g} times its floor on {format_number(model.floor_share, 'share')} of the "
            f"test answers (variance collapse): which head is the most confident is rounding. {cause}"
        )
    uses_members = [
        result.rewards[i].name
        for i in range(len(result.rewards))
        if result.rewards[i].name in model.rewards and result.rewards[i].rule not in ("", "mean")
    ]
    if model.anchor_spread is not None and model.anchor_spread > ANCHOR_LIMIT and uses_members:
        yield (
            f"the zeros of its members lie {model.anchor_spread:.2f} apart in units of what a member says between "
            f"answers (limit {ANCHOR_LIMIT:g}): they have no common zero, and {', '.join(uses_members)} mostly "
            f"{'takes' if len(uses_members) == 1 else 'take'} the member with the lowest one. Keep "
            "reward.standardize=true (ensemble) or a loss that reads targets (brme)."
        )
    accuracy = model.by_flips[0].quality.accuracy
    if accuracy.low <= 0.5:
        yield (
            f"orders {format_number(accuracy.mean, 'share')} of the test pairs as labelled, which a coin may do as "
            "well; what is said of it below is of noise."
        )
    for warning in model.warnings:
        yield f"while fitting: {warning}"


def calibration_sentences(result: CalibrationResult) -> tuple[str, ...]:
    """Which calibration errors are more than the noise of their bins, and which are not."""
    within: list[str] = []
    beyond: list[str] = []
    for index, model in enumerate(result.models):
        for noisy in model.by_flips:
            quality = noisy.quality
            is_noise = quality.calibration_error.mean <= quality.calibration_limit
            (within if is_noise else beyond).append(
                f"{model_label(result, index)} at {format_share(noisy.flip_rate)} flips"
            )
    sentences = []
    if within:
        sentences.append(
            f"Calibration error below its noise limit: {', '.join(within)}. A calibrated model shows as much on "
            f"{result.num_test_pairs} pairs by chance; these numbers are no sign of miscalibration, and no proof of "
            "calibration."
        )
    if beyond:
        shown = "all others" if within and len(beyond) > len(within) else ", ".join(beyond) if within else "all"
        sentences.append(
            f"Calibration error above its noise limit: {shown}. Stated probabilities are off there by more than chance."
        )
    return tuple(sentences)


def optimisation_sentences(result: CalibrationResult) -> tuple[str, ...]:
    """Where the maximum of a reward is not worth what the reward promises."""
    sentences = []
    for position in sorted({0, len(result.flips) - 1}):
        flip = f"With {format_share(result.flips[position])} of the labels reversed"
        ends = {reward.name: reward.best_of_n[position] for reward in result.rewards}
        n = next(iter(ends.values()))[-1].step
        no_gain = [name for name, points in ends.items() if points[-1].gold.low <= 0]
        fallen = [
            f"{name} (at n = {best.step})"
            for name, points in ends.items()
            if (best := max(points, key=lambda point: point.gold.mean)).step < n
        ]
        if no_gain:
            sentences.append(f"{flip}, the judge sees no gain beyond noise in the best of {n} by {', '.join(no_gain)}.")
        if fallen:
            sentences.append(
                f"{flip}, gold is highest before n = {n} for {', '.join(fallen)}; the interval at {n} says whether the "
                "fall is more than noise."
            )
    return tuple(sentences)
