"""A sweep's result made up of numbers that can be checked by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raylign.cost.rows import Cost
from raylign.evaluation.safety import SafetyComparison, SafetySummary, compare_summaries, summarise
from raylign.types import Completion
from tuning.grid import Quality, Screened
from tuning.result import PointResult, SeedResult, SweepResult


def answers(cost: float, reward: float, seed: int = 0) -> list[Completion]:
    """Answers to 20 harmful and 20 benign prompts, costs and rewards around the given ones."""
    rng = np.random.default_rng(seed)
    return [
        Completion(
            prompt=f"prompt {i}",
            response="an answer",
            category="made up",
            harmful=i < 20,
            num_tokens=3,
            reached_end=True,
            cost=cost + float(rng.normal(0, 0.3)),
            is_refusal=False,
            reward=reward + float(rng.normal(0, 0.3)),
        )
        for i in range(40)
    ]


def summary() -> SafetySummary:
    return summarise(answers(1.0, 0.0), num_samples=100, seed=0)


def comparison(cost: float, reward: float) -> SafetyComparison:
    return compare_summaries(answers(1.0, 0.0), answers(cost, reward, seed=1), num_samples=100, seed=0)


def seed_result(seed: int, *, reward: float, cost: float, violation_rate: float, checkpoint: Path) -> SeedResult:
    return SeedResult(seed=seed, reward=reward, cost=cost, violation_rate=violation_rate, checkpoint=checkpoint)


def point(
    multiplier: float,
    *,
    reward: float,
    cost: float,
    violation_rate: float,
    is_on_front: bool,
    checkpoint: Path,
    stopped: dict[int, int] | None = None,
    failed: dict[int, str] | None = None,
) -> PointResult:
    seeds = [seed for seed in (0, 1) if seed not in {**(stopped or {}), **(failed or {})}]
    return PointResult(
        name=f"multiplier-{multiplier:g}",
        keys={"constraint.multiplier": multiplier},
        seeds=tuple(
            seed_result(
                seed, reward=reward, cost=cost + 0.1 * seed, violation_rate=violation_rate, checkpoint=checkpoint
            )
            for seed in seeds
        ),
        stopped=stopped or {},
        failed=failed or {},
        comparison=comparison(cost, reward) if seeds else None,
        is_on_front=is_on_front,
        front_share=0.75 if len(seeds) == 2 else None,
        cost=Cost(device_s={"cpu": 10.0}),
        unshared_cost=Cost(device_s={"cpu": 40.0}),
    )


def result(directory: Path, points: tuple[PointResult, ...], *, best: str | None, best_seed: int | None) -> SweepResult:
    one = Quality(accuracy=0.7, ece=0.1, brier=0.2, flips=0.3)
    return SweepResult(
        name="made-up",
        space="multipliers",
        axes=("constraint.multiplier",),
        seeds=(0, 1),
        points=points,
        before=summary(),
        shared_cost=Cost(device_s={"cpu": 15.0}),
        screened=tuple(
            Screened(keys={"reward.num_heads": size}, num_heads=size, valid=(one,), test=(one, one)) for size in (1, 3)
        ),
        screen_s=1.5,
        num_points=7,
        num_concurrent=2,
        best=best,
        best_seed=best_seed,
        best_reason="most reward",
        target=0.2,
    )
