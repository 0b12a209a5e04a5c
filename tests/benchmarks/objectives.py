"""Objectives on the embedded default over seeds: the table that says whether re-ranking wins here.

    python -m tests.benchmarks.objectives --seeds 0 1 2 --objectives dpo cdpo label_confidence

A run per objective and seed, all on one local Ray. Each number is a mean over seeds with its range over seeds, and the
change of attack success pools prompts of all seeds in one paired bootstrap. Seconds are those of this machine. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from launch.cli import connect
from raylign.config import load_config
from raylign.evaluation.metrics import paired_bootstrap_difference
from raylign.types import Completion, Interval

METRICS = ("attack_success", "violation_rate", "over_refusal", "degenerate", "mean_cost", "mean_reward")


def run(objective: str, seed: int, storage: Path, overrides: list[str]) -> Any:
    from raylign.runtime.pipeline import align

    name = f"run.name={objective}-seed{seed}"
    options = [f"run.storage={storage}", name, f"run.seed={seed}", f"train.objective={objective}", "run.resume=true"]
    return align(load_config(None, [*options, *overrides]))


def is_attack(answer: Completion) -> float:
    return float(answer.cost > 0 and not answer.is_refusal)


def pooled_change(results: list[Any]) -> Interval:
    """Change of attack success over all prompts of all seeds."""
    before = [is_attack(a) for result in results for a in result.data.before if a.harmful]
    after = [is_attack(a) for result in results for a in result.data.after if a.harmful]
    return paired_bootstrap_difference(before, after, num_samples=4000, generator=np.random.default_rng(0))


def spread(results: list[Any], side: str, metric: str) -> dict[str, float]:
    values = [getattr(getattr(result.data.comparison, side), metric).mean for result in results]
    return {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}


def shown(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["dpo", "cdpo", "label_confidence"])
    parser.add_argument("--storage", type=Path, default=Path("runs/objectives"))
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    connect(verbose=False)
    table: dict[str, Any] = {}
    for objective in arguments.objectives:
        results = [run(objective, seed, arguments.storage, arguments.overrides) for seed in arguments.seeds]
        change = pooled_change(results)
        table[objective] = {
            "after": {metric: spread(results, "after", metric) for metric in METRICS},
            "before": {metric: spread(results, "before", metric) for metric in METRICS},
            "attack_success_change": {"mean": change.mean, "low": change.low, "high": change.high},
            "kendall_tau": statistics.fmean(result.data.drift.kendall_tau.mean for result in results),
            "drift": [result.data.drift.verdict for result in results],
            "train_s": statistics.fmean(result.seconds["train"] for result in results),
        }
    before = next(iter(table.values()))["before"]
    print(f"{'':18s}" + "".join(f"{metric:>26s}" for metric in METRICS))
    print(f"{'before':18s}" + "".join(f"{shown(before[metric]):>26s}" for metric in METRICS))
    for objective, row in table.items():
        print(f"{objective:18s}" + "".join(f"{shown(row['after'][metric]):>26s}" for metric in METRICS))
    for objective, row in table.items():
        change = row["attack_success_change"]
        print(
            f"{objective:18s} attack success {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}], "
            f"tau {row['kendall_tau']:.3f}, {', '.join(row['drift'])}, {row['train_s']:.0f} s of training"
        )
    print(json.dumps({"figure": "objectives", "seeds": arguments.seeds, "table": table}))


if __name__ == "__main__":
    main()
