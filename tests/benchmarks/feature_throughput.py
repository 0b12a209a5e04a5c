"""What Ray Data costs: the features job against a bare loop over the same forward, on the same pairs.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.feature_throughput

One actor with one CPU against one thread. The job runs on few and on many pairs; the steady state is the difference
between the two runs, so that start-up (Ray actor, imports, model) cancels out and is printed beside it. The bare loop
packs, runs the forward that reads all layers, and throws the states away. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import ray
import ray.data
import torch

from raylign.config import FeaturesSection, PolicySection
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_policy, resolve_model
from raylign.runtime.features_job import run_features
from raylign.runtime.phases import versions
from raylign.types import TOKEN_COLUMNS, TokenizedPair
from tests.benchmarks.dpo_sides import load_pairs, reference_logps

TARGET = 0.8
CONFIG = FeaturesSection(num_actors=1, cpus_per_actor=1)


def job_s(model_dir: str, pairs: list[TokenizedPair]) -> float:
    """Seconds of a whole features job, actor start included."""
    columns = {name: pa.array([getattr(pair, name) for pair in pairs], pa.list_(pa.int32())) for name in TOKEN_COLUMNS}
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        run_features(
            ray.data.from_arrow(pa.table(columns)),
            config=CONFIG,
            policy=PolicySection(),
            model_path=model_dir,
            output_dir=Path(directory) / "cache",
            data_fingerprint="benchmark",
        )
        return time.perf_counter() - start


def bare_s(policy: PolicyForward, pairs: list[TokenizedPair]) -> float:
    """Seconds of the forward alone."""
    start = time.perf_counter()
    reference_logps(policy, pairs, batch_tokens=CONFIG.batch_tokens)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", help="jsonl(.gz) of prompt, chosen, rejected message lists; default: embedded")
    parser.add_argument("--pairs", type=int, default=768)
    parser.add_argument("--warmup-pairs", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    model_dir = resolve_model(arguments.model)
    pairs = [pair.tokens for pair in load_pairs(model_dir, arguments.data, arguments.pairs)]
    few = pairs[: arguments.warmup_pairs]
    policy = PolicyForward(load_policy(model_dir, dtype="float32")).eval()
    bare_s(policy, few)  # thread pools and allocators
    ratios, job_rates, bare_rates, starts = [], [], [], []
    for repeat in range(arguments.repeats):
        short, whole = job_s(model_dir, few), job_s(model_dir, pairs)
        bare = bare_s(policy, pairs)
        job_rates.append((len(pairs) - len(few)) / (whole - short))
        bare_rates.append(len(pairs) / bare)
        starts.append(short - len(few) / job_rates[-1])
        ratios.append(job_rates[-1] / bare_rates[-1])
        print(
            f"repeat {repeat}  job {job_rates[-1]:.1f} pairs/s (start {starts[-1]:.1f} s)  "
            f"bare {bare_rates[-1]:.1f} pairs/s  ratio {ratios[-1]:.2f}",
            flush=True,
        )
    ray.shutdown()
    print(
        json.dumps(
            {
                "figure": "features_job_over_bare_forward",
                "ratio": round(statistics.median(ratios), 3),
                "target": TARGET,
                "job_pairs_per_s": round(statistics.median(job_rates), 2),
                "bare_pairs_per_s": round(statistics.median(bare_rates), 2),
                "start_s": round(statistics.median(starts), 2),
                "num_pairs": len(pairs),
                "versions": versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
