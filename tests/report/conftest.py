"""A small run's report data, with texts that try to break out of the page."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raylign.cost.rows import Cost, Counts
from raylign.evaluation.drift import measure_drift
from raylign.evaluation.judges import SignCheck
from raylign.evaluation.refusal import RefusalValidation
from raylign.evaluation.safety import compare_summaries
from raylign.report.data import ConfidenceFacts, CostFacts, LayerPoint, ReportData, RewardQuality
from raylign.types import Completion, Interval

INGEST_COST = Cost(wall_s=4.2, device_s={"cpu": 8.4}, peak_rss_mib=300)
TRAIN_COST = Cost(
    wall_s=60.04,
    device_s={"cpu": 120.08, "H200": 60.04},
    counts=Counts(num_items=5400, forward_tokens=123_456, backward_tokens=123_456, flops=4_560_000_000_000),
    peak_rss_mib=900,
    peak_device_mib=2048,
)
EVIL = "</pre><script>alert('http://evil.example/x.js')</script>"


def completion(index: int, *, harmful: bool, is_after: bool) -> Completion:
    is_unsafe = harmful and (not is_after or index % 4 == 0)
    return Completion(
        prompt=f"{'harmful' if harmful else 'benign'} prompt {index} {EVIL}",
        response=f"answer {index} {EVIL}",
        category="c",
        harmful=harmful,
        num_tokens=10 + index,
        reached_end=bool(index % 2),
        cost=1.5 if is_unsafe else -0.5 - 0.01 * index,
        is_refusal=harmful and is_after and index % 3 == 0,
        reward=float(is_after),
    )


@pytest.fixture(scope="session")
def report_data() -> ReportData:
    answers = {
        is_after: [completion(i, harmful=h, is_after=is_after) for h in (True, False) for i in range(40)]
        for is_after in (False, True)
    }
    rng = np.random.default_rng(0)
    logps = rng.normal(-2, 0.5, (12, 4))
    return ReportData(
        run_name="demo-run",
        base_model="org/tiny",
        dataset="hf://datasets/org/pairs/train.jsonl",
        objective="label_confidence",
        is_adapter=True,
        comparison=compare_summaries(answers[False], answers[True], num_samples=200, seed=0),
        before=answers[False],
        after=answers[True],
        judge_name="embedded",
        judge=SignCheck(auroc=0.81, accuracy=0.7, num_unsafe=64, num_safe=64),
        refusal_detector=RefusalValidation(
            accuracy=0.93, precision=0.97, recall=None, num=790, partial_flagged=0.5, num_partial=65
        ),
        drift=measure_drift(logps, logps + rng.normal(0, 0.1, logps.shape), num_samples=100, generator=rng),
        reward=RewardQuality(
            test_accuracy=Interval(mean=0.68, low=0.64, high=0.72, num_items=600),
            out_of_fold_accuracy=0.66,
            kind="hybrid",
            test_disagreement=0.0,
            test_ece=0.06,
            test_brier=float("nan"),
            num_train_pairs=4800,
            num_test_pairs=600,
            layers=tuple(LayerPoint(layer=i, pair_accuracy=0.5 + i / 20, calibration_error=0.1) for i in (1, 2, 3)),
        ),
        confidence=ConfidenceFacts(
            num_pairs=100, num_flips=30, mean=0.61, histogram=(10, 20, 30, 40), edges=(0.0, 0.25, 0.5, 0.75, 1.0)
        ),
        training=[{"step": s, "loss": 0.7 - s / 100, "rewards/margins": s / 50} for s in (5, 10, 15)],
        data_counts={"read": 7000, "train": 5400},
        quarantine={"invalid_json": 3},
        seconds={"ingest": 4.2, "train": 60.04},
        cost=CostFacts(
            stages={"ingest": INGEST_COST, "train": TRAIN_COST},
            phases={"ingest": INGEST_COST, "policy_update": TRAIN_COST},
            total=INGEST_COST + TRAIN_COST,
            reused=Cost(device_s={"cpu": 33.0}),
            num_killed=1,
            money=0.25,
            currency="EUR",
        ),
        config_yaml="train:\n  beta: 0.15\n",
        versions={"ray": "2.60.0"},
        git_commit=None,
        license_note="Research only.",
    )


@pytest.fixture
def replace():
    return dataclasses.replace
