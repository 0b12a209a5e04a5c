"""The headline: what a freshly sampled and labelled pair costs over what a re-weighted stored pair costs.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.refresh_overhead

Above: device-seconds of weight sync, sampling and scoring per pair that online DPO gets, one value per round, on a real
vLLM engine. Below: what live re-ranking adds to an update, per pair: the paired difference of the time of interleaved
updates on the same batches with and without the reward head. With one confidence per pair the head rides on the
policy's forward; with one per batch it needs the whole batch first, which takes a forward more.

One engine, one scorer and one trainer, a thread each; device-seconds count the CPUs that each side has to reserve: all
three above, the trainer's below. Both sides use the same model, prompts and reward. Means with Fieller's 95 % interval.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import ray
import torch

import raylign
from launch.cli import connect
from raylign.config import ConfidenceSection, RewardSection, RunConfig, load_config
from raylign.cost.compare import MeasuredRatio, Side, refresh_overhead_ratio
from raylign.models.forward import PolicyForward, resolve_layers
from raylign.models.loading import load_policy, load_tokenizer, resolve_model
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.phases import versions
from raylign.runtime.resources import ResourcePlan
from raylign.runtime.round_facts import sample_requests
from raylign.runtime.sampler import SamplerPool
from raylign.runtime.scorer import ResponseScorer
from raylign.runtime.weight_sync import Probe, WeightUpdate
from raylign.training.live_confidence import LiveConfidence
from raylign.training.micro_batches import Packing
from raylign.training.offline import offline_update
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.response_logps import pair_token_logps
from raylign.training.state import full_weights
from raylign.training.table import PairTable, read_split
from raylign.training.world import World
from raylign.types import TokenizedPair

BATCH_SIZE = 16
VARIANTS = {"pair level": {}, "pair, no centre": {"center": "none"}, "batch level": {"level": "batch"}}


def fresh_seconds(
    config: RunConfig, model: str, policy: PolicyForward, packing: Packing, table: PairTable, rounds: int, reward: str
) -> list[float]:
    """Device-seconds per fresh pair, one value per round of `BATCH_SIZE` prompts."""
    layers = resolve_layers("all", policy.num_layers)
    options = ActorOptions(num_cpus=config.sampler.scorer_cpus)
    scorer = (
        ray.remote(ResponseScorer)
        .options(num_cpus=options.num_cpus)
        .remote(model, reward, layers, config.robust, options)
    )
    pool = SamplerPool.start(model, config=config)
    ray.get(scorer.is_ready.remote())
    reserved = sum(ResourcePlan.from_config(config).training_devices.values())
    seconds = []
    try:
        for index in range(rounds + 1):
            prompts = [pair.prompt_ids for pair in table.batch(_rows(table, index)).tokens]
            ids = prompts[0]
            pair = TokenizedPair(prompt_ids=ids[:1], chosen_ids=ids[1:], rejected_ids=ids[1:2])
            started = time.perf_counter()
            logps, _ = pair_token_logps(policy, [pair], packing=packing, world=World())
            probe = Probe(token_ids=tuple(ids.tolist()), token_logps=logps[: len(ids) - 1])
            pool.sync(WeightUpdate(version=index + 1, weights=dict(full_weights(policy)), adapter=None, probe=probe))
            rollouts = pool.generate(sample_requests(prompts, np.arange(len(prompts)), index, config))
            ray.get(scorer.score.remote(rollouts))
            seconds.append((time.perf_counter() - started) * reserved / len(prompts))
    finally:
        pool.stop()
        ray.kill(scorer)
    return seconds[1:]  # the first round fills caches and starts threads


def reweighted_seconds(
    policy: PolicyForward, packing: Packing, table: PairTable, reward: FittedReward, updates: int, **options: Any
) -> list[float]:
    """What the head adds to an update, device-seconds per pair, one value per couple of updates on one batch."""
    layers = resolve_layers("all", policy.num_layers)
    live = LiveConfidence(
        reward.heads,
        layers=layers,
        settings=ConfidenceSection(source="live", **options),
        reward=RewardSection(),
        packing=packing,
        temperature=reward.temperature,
    )
    optimizer = build_optimizer(policy, learning_rate=1e-9, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, schedule="constant", num_updates=1, warmup_fraction=0.0)
    objectives = {
        "label_confidence": (load_config().train, live),
        "dpo": (load_config(overrides=["train.objective=dpo"]).train, None),
    }
    differences = []
    for index in range(updates + 1):
        batch = table.batch(_rows(table, index))
        spent = {}
        for name in sorted(objectives, reverse=bool(index % 2)):
            settings, confidence = objectives[name]
            started = time.perf_counter()
            offline_update(
                policy,
                optimizer,
                scheduler,
                batch,
                update=index,
                settings=settings,
                packing=packing,
                seed=0,
                live=confidence,
            )
            spent[name] = time.perf_counter() - started
        differences.append((spent["label_confidence"] - spent["dpo"]) / batch.num_pairs)
    return differences[1:]


def _rows(table: PairTable, index: int) -> np.ndarray:
    return np.random.default_rng(index).choice(len(table), BATCH_SIZE, replace=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4, help="responses per prompt (K)")
    arguments = parser.parse_args()
    connect(verbose=False)
    torch.set_num_threads(1)
    config = load_config(values={"train": {"method": "online_dpo"}, "online": {"num_samples": arguments.samples}})
    model = str(resolve_model("embedded"))
    with tempfile.TemporaryDirectory() as storage:
        features = raylign.extract_features(raylign.ingest("embedded", storage=storage, max_pairs=400), storage=storage)
        reward = raylign.fit_reward(features)
        ranked = Path(storage) / "ranked"
        raylign.rank(features, reward).write_parquet(str(ranked))
        heads = Path(storage) / "reward"
        heads.mkdir()
        reward.save(heads)
        table = PairTable(read_split(ranked, "train"))
        policy = PolicyForward(load_policy(model, dtype="float32"))
        packing = Packing(layout="shared", pad_token_id=load_tokenizer(model).pad_token_id, batch_tokens=4096)
        fresh = fresh_seconds(config, model, policy, packing, table, arguments.rounds, str(heads))
        found = {
            name: reweighted_seconds(policy, packing, table, reward, arguments.updates, **options)
            for name, options in VARIANTS.items()
        }
    above = Side(name="fresh pair", status="measured", fingerprint="one machine", values=tuple(fresh))
    print(f"fresh pair (sync, {arguments.samples} samples, score)   {1000 * np.mean(fresh):.2f} device-ms")
    ratios = {}
    for name, seconds in found.items():
        below = Side(
            name=f"re-weighted pair, {name}", status="measured", fingerprint="one machine", values=tuple(seconds)
        )
        ratio = refresh_overhead_ratio(above, below)
        print(f"re-weighted pair, {name:<15} {1000 * np.mean(seconds):.3f} device-ms   ratio {ratio}")
        measured = isinstance(ratio, MeasuredRatio)
        ratios[name] = {"value": ratio.value, "low": ratio.low, "high": ratio.high} if measured else str(ratio)
    print(
        json.dumps(
            {
                "figure": "refresh_overhead_ratio",
                "ratio": ratios,
                "rounds": arguments.rounds,
                "updates": arguments.updates,
                "num_samples": arguments.samples,
                "fresh_device_ms": 1000 * float(np.mean(fresh)),
                "versions": versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
