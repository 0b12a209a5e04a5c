"""Held-out accuracy and calibration of any reward kind on any pairs, by the phases of a run up to ranking.

    python -m tests.benchmarks.reward_quality --kinds hybrid lora_ensemble warm --output runs/quality
    python -m tests.benchmarks.reward_quality --kinds external --cost-classifier my/judge --label unsafe
    python -m tests.benchmarks.reward_quality --kinds warm --set data.path=pairs.jsonl.gz data.test_fraction=0.25

Ingest and features are done once per data set and seed. Fine-tuned rewards are fitted with reward.folds=1: the numbers
are of test pairs, which no fit sees, and the temperature is of validation pairs, so that folds would only cost time.
Intervals are over the prompts of the test pairs; the calibration error stands beside the one that noise alone gives.
Finished fits are kept: the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray

from raylign.config import TEXT_REWARDS, load_config
from raylign.evaluation.calibration import FitOutcome, NoisyQuality, noisy_quality
from raylign.models.loading import resolve_model
from raylign.runtime.run_phases import open_phases


def outcome(
    kind: str, seed: int, storage: Path, external: dict[str, Any], overrides: list[str]
) -> tuple[FitOutcome, list[str]]:
    """Margins of the test pairs by one kind with one seed, and the prompts of these pairs."""
    values: dict[str, Any] = {
        "run": {"name": f"{kind}-seed{seed}", "storage": str(storage), "seed": seed, "resume": True},
        "reward": {"kind": kind} | ({"folds": 1} if kind in TEXT_REWARDS and kind != "external" else {}),
        "confidence": {"squash": "none"},
    }
    if kind == "external":
        values["reward_model"] = external
    config = load_config(overrides=overrides, values=values)
    phases = open_phases(config, resolve_model(config.policy.model))
    ingest, facts = phases.ingest()
    features, digest = phases.features(ingest, facts["fingerprint"])
    reward, _ = phases.reward(features, digest)
    ranked, _ = phases.rank(features, reward, f"{kind}-{seed}")
    columns = ["row_id", "prompt_key", "margin_mean", "margin_variance"]
    table = pq.read_table(ranked, columns=columns, filters=[("split", "=", "test")]).sort_by("row_id")
    found = json.loads((reward / "reward.json").read_text(encoding="utf-8"))
    of_pairs = FitOutcome(
        num_heads=config.reward.num_heads,
        margin_mean=table["margin_mean"].to_numpy().astype(np.float64),
        margin_variance=table["margin_variance"].to_numpy().astype(np.float64),
        temperature=found["temperature"],
        proxies={},
        familiar={},
        shuffled={},
        floor_share=None,
        anchor_spread=None,
        warnings=tuple(found["metrics"]["warnings"]),
        seconds=0.0,
    )
    return of_pairs, table["prompt_key"].to_pylist()


def row(kind: str, noisy: NoisyQuality, num_pairs: int) -> str:
    """One line of the table."""
    quality = noisy.quality
    shown = [
        f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        for interval in (quality.accuracy, quality.calibration_error, quality.brier)
    ]
    return f"| `{kind}` | {num_pairs} | {shown[0]} | {shown[1]} ({quality.calibration_limit:.3f}) | {shown[2]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["hybrid", "ensemble", "brme", "laplace"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/reward-quality"))
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", help="section.key=value of every run")
    parser.add_argument("--cost-classifier", help="directory, for reward.kind=external")
    parser.add_argument("--label", help="its output that means unsafe")
    arguments = parser.parse_args()
    ray.init(address="local", log_to_driver=False, include_dashboard=False)
    external = {"model": arguments.cost_classifier, "label": arguments.label, "is_cost": True}
    lines = []
    for kind in arguments.kinds:
        found = [outcome(kind, seed, arguments.output, external, arguments.overrides) for seed in arguments.seeds]
        outcomes, groups = [one for one, _ in found], found[0][1]
        for one in outcomes:
            if one.warnings:
                print(kind, *one.warnings)
        if any(prompts != groups for _, prompts in found):  # seeds split prompts alike only where they are given
            noisy = [noisy_quality(0.0, [one], prompts, num_samples=1000, seed=0) for one, prompts in found]
            lines += [
                row(f"{kind} seed {seed}", n, len(p))
                for seed, n, (_, p) in zip(arguments.seeds, noisy, found, strict=True)
            ]
        else:
            lines.append(row(kind, noisy_quality(0.0, outcomes, groups, num_samples=1000, seed=0), len(groups)))
    print("| reward | test pairs | accuracy | calibration error (by noise alone) | Brier |\n|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
