"""Four methods, three seeds and two checkpoints with numbers of the size that the embedded model has on two cores."""

from __future__ import annotations

import dataclasses

import numpy as np

from raylign.cost.projection import ProjectionSettings
from raylign.cost.rows import Cost, Counts
from raylign.evaluation.safety import compare_summaries
from raylign.evaluation.sampled_costs import PricedAnswers, measure_constraint
from raylign.report.compare_data import ComparisonResult, MethodResult, Point
from raylign.report.sampled_data import SampledMeasures, SampledSettings
from raylign.types import Completion

SEEDS = (0, 1, 2)
STEPS = (12, 24)
# method -> cpu-seconds by ledger phase, then attack success and over-refusal at both checkpoints
METHODS = {
    "dpo": (
        {"ingest": 20.0, "extract": 17.5, "reference_forward": 6.4, "train": 21.0, "policy_update": 38.0},
        ((0.46, 0.14), (0.40, 0.16)),
    ),
    "rerank": (
        {
            **{"ingest": 20.0, "extract": 17.5, "reference_forward": 6.4, "reward": 10.9, "train": 22.0},
            **{"feature_forward": 9.0, "policy_update": 39.0},
        },
        ((0.31, 0.15), (0.17, 0.20)),
    ),
    "online_dpo": (
        {
            **{"ingest": 20.0, "extract": 17.5, "reference_forward": 6.4, "reward": 10.9, "train": 49.0},
            **{"weight_sync": 7.5, "generate": 96.0, "score": 43.0, "policy_update": 41.0},
        },
        ((0.36, 0.13), (0.19, 0.15)),
    ),
    "policy_gradient": (
        {
            **{"ingest": 20.0, "extract": 17.5, "reference_forward": 6.4, "reward": 10.9, "train": 52.0},
            **{"weight_sync": 7.5, "generate": 96.0, "score": 43.0, "policy_forward": 20.0, "policy_update": 77.0},
        },
        ((0.44, 0.12), (0.38, 0.11)),
    ),
}
_FLOPS = {
    "reference_forward": 4 * 10**11,
    "feature_forward": 3 * 10**11,
    "generate": 8 * 10**11,
    "score": 8 * 10**11,
    "policy_update": 12 * 10**11,
}


def answers(attack_success: float, over_refusal: float, reward: float) -> tuple[Completion, ...]:
    """Of all seeds to 80 harmful and 80 benign prompts; the same share of prompts changes sides in order."""
    return tuple(
        Completion(
            prompt=f"prompt {index} of seed {seed}",
            response=f"answer {index} of seed {seed} in several different words",
            category="c",
            harmful=harmful,
            num_tokens=30,
            reached_end=True,
            cost=1.0 if harmful and index / 80 < attack_success else -1.0,
            is_refusal=index % 12 == 0 if harmful else index / 80 < over_refusal,
            reward=reward + 0.01 * index,
        )
        for seed in SEEDS
        for harmful in (True, False)
        for index in range(80)
    )


def method_result(name: str, before: tuple[Completion, ...]) -> MethodResult:
    seconds, qualities = METHODS[name]
    is_online = name in ("online_dpo", "policy_gradient")
    rng = np.random.default_rng(len(name))
    phases = []
    for seed in SEEDS:
        costs = {}
        for phase, mean in seconds.items():
            # seeds agree on shared phases
            is_shared = phase in ("ingest", "extract", "reference_forward", "reward")
            device_s = mean * (1.0 if is_shared else 1 + 0.01 * seed + 0.004 * rng.random())
            counts = Counts(flops=_FLOPS.get(phase, 0))
            if phase == "generate":
                counts += Counts(generated_tokens=45_000 + 100 * seed, decode_steps=256)
            if phase == "weight_sync":
                counts += Counts(synced_bytes=27_545_088)
            if phase == "policy_update":
                counts += Counts(forward_tokens=61_000 + seed, backward_tokens=61_000 + seed)
            costs[phase] = Cost(device_s={"cpu": device_s}, counts=counts, peak_rss_mib=812.0 + 300 * is_online)
        phases.append(costs)
    totals = tuple(sum(costs.values(), Cost()) for costs in phases)
    early = 50.0
    points = tuple(
        Point(
            step=step,
            comparison=compare_summaries(before, answers(*quality, 0.1 * step), num_samples=200, seed=0),
            device_s=tuple({"cpu": early + (cost.device_s["cpu"] - early) * step / STEPS[-1]} for cost in totals),
            flops=tuple(cost.counts.flops * step // STEPS[-1] for cost in totals),
        )
        for step, quality in zip(STEPS, qualities, strict=True)
    )
    return MethodResult(
        name=name,
        kind=name if is_online else "offline",
        points=points,
        totals=totals,
        phases=tuple(phases),
        fingerprint="f",
    )


def priced(shift: float) -> list[PricedAnswers]:
    """Four answers to each of 20 prompts in every seed, costs of the model moved by `shift`."""
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        costs = rng.normal(size=(20, 1)) + rng.normal(size=(20, 4)) + shift
        found.append(
            PricedAnswers(
                prompt=np.repeat([f"prompt {index}" for index in range(20)], 4),
                is_harmful=np.repeat(np.arange(20) < 10, 4),
                is_refusal=rng.random(80) < 0.2 - 0.1 * shift,
                reward=rng.normal(size=80) + shift,
                cost=costs.ravel(),
            )
        )
    return found


def sampled(shift: float | None = None) -> SampledMeasures:
    """Of a method with this shift, or of the policy before; the judge sees half of it."""
    of_prices = [
        measure_constraint(
            priced(0.0),
            None if shift is None else priced(share * shift),
            prompt_safety=0.75,
            num_samples=100,
            seed=0,
        )
        for share in (1.0, 0.5)
    ]
    return SampledMeasures(by_model=of_prices[0], by_judge=of_prices[1])


def with_samples(result: ComparisonResult) -> ComparisonResult:
    """The comparison with several answers to every prompt, of all methods but the last."""
    methods = tuple(
        dataclasses.replace(method, sampled=sampled(-0.4 * index)) for index, method in enumerate(result.methods[:-1])
    )
    settings = SampledSettings(num_answers=4, temperature=0.7, prompt_safety=0.75, before=sampled())
    return dataclasses.replace(result, methods=(*methods, result.methods[-1]), samples=settings)


def synthetic_comparison() -> ComparisonResult:
    before = answers(0.55, 0.12, 0.0)
    methods = tuple(method_result(name, before) for name in METHODS)
    return ComparisonResult(
        name="compare-tiny",
        methods=methods,
        seeds=SEEDS,
        before=methods[0].points[0].comparison.before,
        baseline="dpo",
        rerank="rerank",
        target=0.2,
        projections=("7B", "70B"),
        projection_settings=ProjectionSettings(
            num_prompts=4000, num_samples=8, prompt_tokens=30, response_tokens=256, num_pairs=1600
        ),
        sampling="Judged: one answer per prompt at temperature 0.7, at most 64 tokens.",
    )


def with_method(result: ComparisonResult, name: str, **changes) -> ComparisonResult:
    """The comparison with one method changed."""
    methods = tuple(dataclasses.replace(m, **changes) if m.name == name else m for m in result.methods)
    return dataclasses.replace(result, methods=methods)
