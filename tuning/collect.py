"""From finished trials to the result of a sweep: answers of all policies judged in one pass, fronts, costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raylign.compare_config import DRIFT_KEYS
from raylign.cost.rows import Cost, LedgerRow, read_ledger, total, total_reused
from raylign.evaluation.safety import compare_summaries, summarise
from raylign.models.loading import model_fingerprint
from raylign.runtime.compare import BEFORE, shared_phases
from raylign.runtime.costs import LEDGER_DIR
from raylign.runtime.evaluate_job import (
    COMPLETIONS_FILE,
    evaluate_models,
    evaluation_inputs,
    load_completions,
    save_completions,
)
from raylign.runtime.phases import digest
from raylign.runtime.run_phases import Phases, actor_options
from raylign.types import Completion
from tuning.grid import Screened
from tuning.pareto import front_shares, on_front
from tuning.result import PointResult, SeedResult, SweepResult
from tuning.sweep_config import Sweep, Trial
from tuning.trial import reward_group, stopped_at, train_manifest

Answers = Mapping[str, tuple[Completion, ...]]  # by name of the trial, and "before"

SHARED = "shared"
REWARDS = "rewards"


def evaluate_seed(
    shared: Phases, sweep: Sweep, seed: int, finished: Sequence[Trial], reward: Path, reward_key: str
) -> Answers:
    """Judged answers of all policies of one seed: one pool of actors, one set of prompts, one yardstick.

    Args:
        shared: phases of the sweep.
        sweep: with the base configuration.
        seed: of prompts and sampling.
        finished: trained trials of any seed.
        reward: directory of the reward of the base, by which all points are scored.
        reward_key: of it.
    """
    base = sweep.base
    models: dict[str, str | Path] = {BEFORE: shared.model}
    models |= {trial.name: checkpoint_of(trial) for trial in finished if trial.seed == seed}
    fingerprints = {name: model_fingerprint(model) for name, model in models.items()}
    config = base.evaluate
    # a sweep that got more points is evaluated anew
    name = f"evaluate-seed{seed}-{digest(fingerprints)[:8]}"
    key = {
        "models": fingerprints,
        "evaluate": config.model_dump(exclude={"num_actors", "batch_size", *DRIFT_KEYS}),
        **evaluation_inputs(config),
        "reward": reward_key,
        "robust": base.robust.model_dump(),
        "seed": seed,
    }

    def work(directory: Path) -> dict[str, Any]:
        options = dataclasses.replace(actor_options(base), ledger=shared.ledger)
        evaluations = evaluate_models(
            models,
            config=config,
            seed=seed,
            options=options,
            make_reward_fn=shared.reward_scorer(reward),
        )
        save_completions(directory / COMPLETIONS_FILE, {name: e.completions for name, e in evaluations.items()})
        return {"judge": dataclasses.asdict(evaluations[BEFORE].judge)}

    shared.run.devices = {**shared.run.devices, name: shared.run.devices["evaluate"]}
    directory, _ = shared.run.phase(name, key, work)
    return load_completions(directory / COMPLETIONS_FILE)


def checkpoint_of(trial: Trial) -> Path:
    """HF or PEFT directory of a trained policy."""
    manifest = train_manifest(trial.directory)
    assert manifest is not None and manifest["status"] == "done"
    return Path(manifest["facts"]["checkpoint"])


def collect(
    sweep: Sweep,
    trials: Sequence[Trial],
    answers: Mapping[int, Answers],
    *,
    failed: Mapping[str, str],
    screened: tuple[Screened, ...],
    screen_s: float,
    num_concurrent: int,
) -> SweepResult:
    """The result of a sweep.

    Args:
        sweep: what was asked for.
        trials: that were started, whether finished, stopped or failed.
        answers: by seed.
        failed: what trials failed of, by name.
        screened: cheap settings.
        screen_s: their wall seconds.
        num_concurrent: trials at a time.
    """
    config, seeds = sweep.base.evaluate, tuple(sweep.sweep.seeds)
    by_point: dict[str, list[Trial]] = {}
    for trial in trials:
        by_point.setdefault(trial.point, []).append(trial)
    done = {name: [trial for trial in group if trial.name in answers[trial.seed]] for name, group in by_point.items()}
    whole = [name for name, group in done.items() if len(group) == len(seeds)]
    fronts, shares = _fronts([done[name] for name in whole], answers, sweep)
    shared_rows = read_ledger(sweep.directory / SHARED / LEDGER_DIR)
    points = []
    for name, group in by_point.items():
        finished = done[name]
        pooled = [answer for trial in finished for answer in answers[trial.seed][trial.name]]
        before = [answer for trial in finished for answer in answers[trial.seed][BEFORE]]
        own = [read_ledger(trial.directory / LEDGER_DIR) for trial in group]
        place = whole.index(name) if name in whole else None
        points.append(
            PointResult(
                name=name,
                keys=group[0].keys,
                seeds=tuple(_seed_result(trial, answers[trial.seed][trial.name]) for trial in finished),
                stopped={trial.seed: step for trial in group if (step := stopped_at(trial.directory)) is not None},
                failed={trial.seed: failed[trial.name] for trial in group if trial.name in failed},
                comparison=compare_summaries(
                    before, pooled, num_samples=config.bootstrap_samples, seed=sweep.base.run.seed
                )
                if finished
                else None,
                is_on_front=place is not None and bool(fronts[place]),
                front_share=None if place is None else float(shares[place]),
                cost=_sum(own),
                unshared_cost=_sum([*own, *([_read_by(sweep, group[0], shared_rows)] * len(group))]),
            )
        )
    best, seed, reason = choose(points, target=sweep.sweep.target)
    rewards = [read_ledger(directory) for directory in sorted((sweep.directory / REWARDS).glob(f"*/{LEDGER_DIR}"))]
    return SweepResult(
        name=sweep.base.run.name,
        space=sweep.space.name,
        axes=tuple(axis.key for axis in sweep.space.axes),
        seeds=seeds,
        points=tuple(points),
        before=summarise(
            [answer for seed in seeds for answer in answers[seed][BEFORE]],
            num_samples=config.bootstrap_samples,
            seed=sweep.base.run.seed,
        ),
        shared_cost=_sum([shared_rows, *rewards]),
        screened=screened,
        screen_s=screen_s,
        num_points=len(sweep.points) or len(points),
        num_concurrent=num_concurrent,
        best=None if best is None else best.name,
        best_seed=seed,
        best_reason=reason,
        target=sweep.sweep.target,
    )


def choose(points: Sequence[PointResult], *, target: float) -> tuple[PointResult | None, int | None, str]:
    """The point to export, one of its seeds, and why.

    Args:
        points: of the sweep; those with a seed missing are passed over.
        target: violation rate that should not be exceeded.

    Returns:
        Of the points whose violation rate is at most the target, the one with the most reward; when there is none, the
        one with the lowest violation rate. Of its seeds the one with the least cost.
    """
    whole = [point for point in points if point.front_share is not None]
    if not whole:
        return None, None, "no point has finished with all of its seeds"

    def mean(point: PointResult, name: str) -> float:
        return math.fsum(getattr(seed, name) for seed in point.seeds) / len(point.seeds)

    safe = [point for point in whole if mean(point, "violation_rate") <= target]
    if safe:
        best = max(safe, key=lambda point: mean(point, "reward"))
        reason = f"most reward of the points with a violation rate of at most {target:g}"
    else:
        best = min(whole, key=lambda point: (mean(point, "violation_rate"), -mean(point, "reward")))
        reason = f"lowest violation rate; no point is at or below sweep.target={target:g}"
    return best, min(best.seeds, key=lambda seed: seed.cost).seed, reason


def _fronts(groups: Sequence[Sequence[Trial]], answers: Mapping[int, Answers], sweep: Sweep) -> tuple[Any, Any]:
    """On the front, and how often, of points with all seeds."""
    if not groups:
        return [], []
    prompts = sorted({(answer.prompt, answer.harmful) for of in answers.values() for answer in of[BEFORE]})
    values = [_by_prompt([answers[trial.seed][trial.name] for trial in group], prompts) for group in groups]
    reward, cost = (np.stack([value[side] for value in values]) for side in (0, 1))
    harmful = np.array([is_harmful for _, is_harmful in prompts])
    front = on_front(reward.mean(1), cost[:, harmful].mean(1))
    shares = front_shares(
        reward,
        cost,
        harmful,
        num_samples=sweep.base.evaluate.bootstrap_samples,
        generator=np.random.default_rng(sweep.base.run.seed),
    )
    return front, shares


def _by_prompt(
    answers: Sequence[Sequence[Completion]], prompts: Sequence[tuple[str, bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """Reward and cost of each prompt, the answers of all seeds averaged."""
    found: dict[tuple[str, bool], list[Completion]] = {}
    for answer in (one for of_seed in answers for one in of_seed):
        found.setdefault((answer.prompt, answer.harmful), []).append(answer)
    return tuple(  # type: ignore[return-value]
        np.array([math.fsum(getattr(a, name) for a in found[prompt]) / len(found[prompt]) for prompt in prompts])
        for name in ("reward", "cost")
    )


def _seed_result(trial: Trial, answers: Sequence[Completion]) -> SeedResult:
    harmful = [answer for answer in answers if answer.harmful]
    return SeedResult(
        seed=trial.seed,
        reward=math.fsum(answer.reward for answer in answers) / len(answers),
        cost=math.fsum(answer.cost for answer in harmful) / len(harmful),
        violation_rate=sum(answer.cost > 0 for answer in harmful) / len(harmful),
        checkpoint=checkpoint_of(trial),
    )


def _read_by(sweep: Sweep, trial: Trial, shared: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Shared phases that a trial could not do without."""
    needed = shared_phases(trial.config)
    rows = [row for row in shared if row.stage in needed]
    if "reward" in needed:
        rows += read_ledger(sweep.directory / REWARDS / reward_group(trial.config) / LEDGER_DIR)
    return rows


def _sum(ledgers: Sequence[Sequence[LedgerRow]]) -> Cost:
    return sum((total(rows) + total_reused(rows) for rows in ledgers), Cost())
