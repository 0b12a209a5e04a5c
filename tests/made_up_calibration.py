"""A calibration whose fits are drawn, not fitted: two models, three rewards, known faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raylign.calibrate_config import Calibration, load_calibration
from raylign.evaluation.calibration import FitOutcome, RoundOutcome
from raylign.report.calibrate_data import CalibrationResult
from raylign.runtime.calibrate import collect

NUM_PAIRS, NUM_PROMPTS, NUM_CANDIDATES = 60, 24, 8
REWARDS: dict[str, dict[str, Any]] = {
    "single": {"reward.kind": "hybrid"},
    "brme w=0": {"reward.kind": "brme", "robust.w_nominal": 0},
    "brme w=0.5": {"reward.kind": "brme", "robust.w_nominal": 0.5},
}


def made_up_calibration(directory: Path, **sections: Any) -> Calibration:
    """Its configuration, with sections of the caller's."""
    content = {
        "run": {"name": "made-up", "storage": str(directory)},
        "evaluate": {"bootstrap_samples": 100},
        "calibrate": {
            "rewards": REWARDS,
            "seeds": [0, 1],
            "flips": [0, 0.25],
            "num_prompts": NUM_PROMPTS,
            "num_candidates": NUM_CANDIDATES,
        },
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values}
    file = directory / "calibrate.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_calibration(file)


def made_up_outcome(
    names: tuple[str, ...], gold: np.ndarray, *, seed: int, flip: float = 0.0, **changed: Any
) -> FitOutcome:
    """One fit: margins right three times in four, less under flips, and proxies that see half of the gold."""
    rng = np.random.default_rng([seed, round(100 * flip), len(names)])
    has_members = len(names) > 1
    signals = {"disagreement": 1.0, "least sigma": -1.0} if has_members else {}  # how much higher when shuffled
    values: dict[str, Any] = {
        "num_heads": 5 if has_members else 1,
        "margin_mean": rng.normal(0.7 - 1.6 * flip, 1, NUM_PAIRS),
        "margin_variance": np.full(NUM_PAIRS, 0.2 if has_members else 0.0),
        "temperature": 1.0,
        "proxies": {name: gold + rng.normal(size=gold.shape) for name in names},
        "familiar": {name: rng.normal(size=(NUM_PROMPTS, 4)) for name in signals},
        "shuffled": {name: rng.normal(shift, size=(NUM_PROMPTS, 4)) for name, shift in signals.items()},
        "floor_share": 0.1 * (1 + seed) if has_members else None,
        "anchor_spread": 0.2 * (1 + seed) if has_members else None,
        "seconds": 2.0 + seed,
    }
    return FitOutcome(**{**values, **changed})


def made_up_rounds(*, seed: int, num_rounds: int = 3) -> tuple[RoundOutcome, ...]:
    """A training whose proxy rises by one unit a round, and whose gold does not."""
    rng = np.random.default_rng(seed)
    return tuple(
        RoundOutcome(kl=0.5 * index, proxy=rng.normal(index, 1, (10, 4)), gold=rng.normal(0, 1, (10, 4)))
        for index in range(num_rounds)
    )


def made_up_result(directory: Path, *, is_trained: bool = True, **changed: Any) -> CalibrationResult:
    """What `collect` makes of it; `changed` fields are those of every fit with members."""
    calibration = made_up_calibration(directory)
    gold = np.random.default_rng(9).normal(size=(NUM_PROMPTS, NUM_CANDIDATES))
    outcomes = {
        (names, flip, seed): made_up_outcome(names, gold, seed=seed, flip=flip, **(changed if len(names) > 1 else {}))
        for names in calibration.fits
        for flip in calibration.calibrate.flips
        for seed in calibration.calibrate.seeds
    }
    facts = {
        "num_train_pairs": 1319,
        "num_valid_pairs": 145,
        "test_prompts": [f"p{i // 2}" for i in range(NUM_PAIRS)],
    }
    rounds = {("brme w=0.5", 0.0): [made_up_rounds(seed=seed) for seed in (0, 1)]} if is_trained else {}
    return collect(calibration, outcomes, gold, facts, rounds)
