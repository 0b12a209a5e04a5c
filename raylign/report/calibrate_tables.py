"""The tables of a calibration, the same in the terminal and in the HTML; cells name their place in the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raylign.report.calibrate_findings import calibration_sentences, format_share, model_label, optimisation_sentences
from raylign.report.compare_tables import Cell, Table
from raylign.report.wording import shown_name

if TYPE_CHECKING:
    from raylign.report.calibrate_data import CalibrationResult
    from raylign.types import Interval

_SHOWN_SIZES = (4, 16)


def gold_sentence(result: CalibrationResult) -> str:
    """What gold is."""
    return (
        f"Gold is minus the cost that {shown_name(result.judge, 'judge')} gives an answer: a model itself, fitted to "
        "other labels than the rewards are, and not human judgement. What fools both is not seen here."
    )


def model_table(result: CalibrationResult) -> Table:
    """What was fitted."""
    rows = []
    for index, model in enumerate(result.models):
        key = f"models.{index}"
        rows.append(
            (
                Cell(text=model_label(result, index)),
                Cell(text=_rewards_of(result, index)),
                Cell(text=str(model.num_heads), key=f"{key}.num_heads"),
                _optional(model.anchor_spread, f"{key}.anchor_spread", "{:.2f}"),
                _optional(
                    None if model.floor_share is None else 100 * model.floor_share, f"{key}.floor_share", "{:.0f} %"
                ),
                Cell(text=f"{model.fit_s:.1f} s", key=f"{key}.fit_s"),
            )
        )
    return Table(
        title="Reward models",
        columns=("model", "rewards and their rules", "members", "zeros apart", "sigma on floor", "one fit"),
        rows=tuple(rows),
        notes=(
            f"Fitted to {result.num_train_pairs:,} pairs; {result.num_valid_pairs:,} others chose epochs and "
            f"temperatures. Zeros apart (of members, in units of what a member says) and the share of sigmas on their "
            "floor: the largest over all fits, on test answers. Rewards in one row differ in the rule alone.",
        ),
    )


def quality_table(result: CalibrationResult) -> Table:
    """Accuracy and calibration by share of flips."""
    rows = []
    for index, model in enumerate(result.models):
        for position, noisy in enumerate(model.by_flips):
            key, quality = f"models.{index}.by_flips.{position}.quality", noisy.quality
            rows.append(
                (
                    Cell(text="" if position else model_label(result, index)),
                    _flip(noisy.flip_rate, f"models.{index}.by_flips.{position}.flip_rate"),
                    Cell(text=_percent(quality.accuracy), key=f"{key}.accuracy"),
                    _interval(quality.calibration_error, f"{key}.calibration_error", digits=3),
                    Cell(text=f"{quality.calibration_limit:.3f}", key=f"{key}.calibration_limit"),
                    _interval(quality.brier, f"{key}.brier", digits=3),
                    _interval(quality.log_likelihood, f"{key}.log_likelihood", digits=3),
                )
            )
    return Table(
        title="Held-out pairs, by share of reversed labels",
        columns=("model", "flips", "accuracy, %", "ECE", "limit", "Brier", "log-likelihood, nats"),
        rows=tuple(rows),
        notes=(
            f"{result.num_test_pairs:,} test pairs with their labels as they are; means over {_seeds(result)}, 95 % "
            "intervals over their prompts, without the spread between seeds. A coin: accuracy 50 %, Brier .250, "
            "log-likelihood -.693. ECE: mean distance between stated probability and share of right orders; limit: "
            "what a calibrated model stays below in 95 % of samples. Temperatures are fitted to reversed labels too, "
            "so models of noisy labels state too little.",
            *calibration_sentences(result),
        ),
    )


def ranking_table(result: CalibrationResult) -> Table | None:
    """Orders that models are sure of; None when no model says how sure it is."""
    rows = []
    for index, model in enumerate(result.models):
        for position, noisy in enumerate(model.by_flips):
            if noisy.ranking is None:
                continue
            key = f"models.{index}.by_flips.{position}.ranking"
            rows.append(
                (
                    Cell(text="" if position else model_label(result, index)),
                    _flip(noisy.flip_rate, f"models.{index}.by_flips.{position}.flip_rate"),
                    Cell(text=f"{100 * noisy.ranking.sure_right:.1f}", key=f"{key}.sure_right"),
                    Cell(text=f"{100 * noisy.ranking.sure_wrong:.1f}", key=f"{key}.sure_wrong"),
                    Cell(text=f"{noisy.ranking.score(0.2):.3f}"),
                )
            )
    if not rows:
        return None
    return Table(
        title="Orders that a model is sure of",
        columns=("model", "flips", "sure and right, %", "sure and wrong, %", "score at .2"),
        rows=tuple(rows),
        notes=(
            "Shares of the test pairs whose 95 % interval of the margin, by the members' disagreement alone, leaves "
            "out 0. Score: the share of right orders that are sure less that of wrong orders, both towards shares of "
            "all pairs (arXiv:2602.24040, there with an interval for each answer). Above 0 certainty is worth "
            "something; a model that is sure of next to nothing scores near 0, too.",
        ),
    )


def best_of_n_table(result: CalibrationResult) -> Table:
    """Gold of the best of n."""
    largest = result.rewards[0].best_of_n[0][-1].step
    sizes = [n for n in (*_SHOWN_SIZES, largest) if n <= largest]
    sizes = list(dict.fromkeys(sizes))
    rows = []
    for index, reward in enumerate(result.rewards):
        for position in _shown_flips(result):
            points = reward.best_of_n[position]
            key = f"rewards.{index}.best_of_n.{position}"
            best = max(range(len(points)), key=lambda i: points[i].gold.mean)
            rows.append(
                (
                    Cell(text="" if position else reward.name),
                    _flip(result.flips[position], f"flips.{position}"),
                    *(
                        _interval(point.gold, f"{key}.{i}.gold")
                        for i, point in enumerate(points)
                        if point.step in sizes
                    ),
                    Cell(text=f"n = {points[best].step}", key=f"{key}.{best}.step"),
                )
            )
    return Table(
        title="Gold of the best of n by each reward",
        columns=("reward", "flips", *(f"n = {n}" for n in sizes), "highest at"),
        rows=tuple(rows),
        notes=(
            f"{result.num_candidates} answers of {shown_name(result.policy, 'model')} to each of {result.num_prompts} "
            "harmful prompts; the mean over all subsets of n. Gain over n = 1, which is 0, in standard deviations "
            f"between answers to one prompt; means over {_seeds(result)}, 95 % intervals over prompts.",
            gold_sentence(result),
            *optimisation_sentences(result),
        ),
    )


def gap_table(result: CalibrationResult) -> Table:
    """What a reward promises of its favourites against what the judge finds."""
    largest = result.rewards[0].best_of_n[0][-1].step
    first = result.rewards[0].name
    rows: list[tuple[Cell, ...]] = []
    for index, reward in enumerate(result.rewards):
        for position in _shown_flips(result):
            points, key = reward.best_of_n[position], f"rewards.{index}.best_of_n.{position}"
            last = len(points) - 1
            rows.append(
                (
                    Cell(text="" if position else reward.name),
                    _flip(result.flips[position], f"flips.{position}"),
                    _interval(points[last].proxy, f"{key}.{last}.proxy"),
                    _interval(points[last].gap, f"{key}.{last}.gap"),
                    _difference(reward.against_first, position, f"rewards.{index}.against_first"),
                    Cell(text=_percent(points[last].unsafe), key=f"{key}.{last}.unsafe"),
                )
            )
    key = "rewards.0.best_of_n.0.0.unsafe"  # at n = 1 all rewards choose alike
    start = Cell(text=_percent(result.rewards[0].best_of_n[0][0].unsafe), key=key)
    rows.append((Cell(text="any, n = 1"), *(Cell(text="") for _ in range(4)), start))
    return Table(
        title=f"What a reward promises at n = {largest}, and what the judge finds",
        columns=(
            "reward",
            "flips",
            "proxy",
            "proxy minus gold",
            f"gold minus that of {first}",
            "unsafe, %",
        ),
        rows=tuple(rows),
        notes=(
            "Same unit. Proxy: the reward that chose. Proxy minus gold and gold minus gold are paired by prompt; * the "
            "interval leaves out 0, not corrected for the number of rewards. Unsafe: share of the chosen answers that "
            "the judge calls unsafe.",
        ),
    )


def training_table(result: CalibrationResult) -> Table | None:
    """The last round of trained rewards; None when none was trained."""
    rows = []
    curves = [
        (index, position, points)
        for position in range(len(result.trained_flips))
        for index, reward in enumerate(result.rewards)
        for points in reward.policy_gradient[position : position + 1]
    ]
    for index, position, points in curves:
        last, curve = len(points) - 1, f"rewards.{index}.policy_gradient.{position}"
        key = f"{curve}.{last}"
        rows.append(
            (
                Cell(text=result.rewards[index].name),
                Cell(text=format_share(result.trained_flips[position]), key=f"trained_flips.{position}"),
                Cell(text=str(points[last].step), key=f"{key}.step"),
                Cell(text=f"{points[last].kl:.2f}", key=f"{key}.kl"),
                _interval(points[last].proxy, f"{key}.proxy"),
                _interval(points[last].gold, f"{key}.gold"),
                _interval(points[last].gap, f"{key}.gap"),
                Cell(text=_percent(points[last].unsafe), key=f"{key}.unsafe"),
                Cell(text=f"{100 * points[0].unsafe.mean:.1f}", key=f"{curve}.0.unsafe.mean"),
            )
        )
    if not rows:
        return None
    return Table(
        title="Policy gradient on each reward, last round",
        columns=(
            "reward",
            "flips",
            "round",
            "KL, nats",
            "proxy",
            "gold",
            "proxy minus gold",
            "unsafe, %",
            "before, %",
        ),
        rows=tuple(rows),
        notes=(
            "Gains over round 1, which the untrained policy answered, in standard "
            f"deviations between answers to one prompt; over {_seeds(result)}, 95 % intervals over sampled prompts. "
            "The spread between trainings is not in them.",
        ),
    )


def signal_table(result: CalibrationResult) -> Table | None:
    """How well signals find shuffled answers; None when no model has one."""
    rows = [
        (
            Cell(text="" if position else model_label(result, index)),
            Cell(text=signal.signal),
            _interval(signal.auroc, f"models.{index}.signals.{position}.auroc"),
        )
        for index, model in enumerate(result.models)
        for position, signal in enumerate(model.signals)
    ]
    if not rows:
        return None
    return Table(
        title="Signs of unfamiliar input: answers with their words shuffled",
        columns=("model", "signal", "AUROC"),
        rows=tuple(rows),
        notes=(
            f"P(the signal is higher on a shuffled answer), {format_share(result.flips[0])} of the labels reversed, "
            f"over {_seeds(result)}; 95 % intervals over prompts. .5 tells nothing apart; below it the signal "
            "reassures where it should warn. Least sigma is the noise that the most confident head states of its own "
            "reward: nothing makes it grow away from the data.",
        ),
    )


def all_tables(result: CalibrationResult) -> list[Table]:
    """All tables in reading order."""
    tables = (
        model_table(result),
        quality_table(result),
        ranking_table(result),
        best_of_n_table(result),
        gap_table(result),
        training_table(result),
        signal_table(result),
    )
    return [table for table in tables if table is not None]


def _rewards_of(result: CalibrationResult, index: int) -> str:
    rewards = [reward for reward in result.rewards if reward.model == index]
    return "; ".join(
        reward.name + (f" ({reward.rule})" if reward.rule not in ("", reward.name) else "") for reward in rewards
    )


def _shown_flips(result: CalibrationResult) -> list[int]:
    return sorted({0, len(result.flips) - 1})


def _seeds(result: CalibrationResult) -> str:
    return f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"


def _flip(share: float, key: str) -> Cell:
    return Cell(text=format_share(share), key=key)


def _optional(value: float | None, key: str, form: str) -> Cell:
    return Cell(text="") if value is None else Cell(text=form.format(value), key=key)


def _interval(interval: Interval, key: str, *, digits: int = 2) -> Cell:
    mean, low, high = (f"{value:.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return Cell(text=f"{mean} [{low}, {high}]", key=key)


def _percent(interval: Interval) -> str:
    mean, low, high = (f"{100 * value:.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _difference(differences: Sequence[Interval], position: int, key: str) -> Cell:
    if not differences:
        return Cell(text="")
    one = differences[position]
    is_certain = one.low > 0 or one.high < 0
    cell = _interval(one, f"{key}.{position}")
    return Cell(
        text=cell.text + (" *" if is_certain else ""),
        key=cell.key,
        tone="" if not is_certain else "good" if one.mean > 0 else "bad",
    )
