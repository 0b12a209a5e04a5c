"""What vLLM buys: sampling engines against transformers' generate, on the same model, prompts and one thread each.

    python -m tests.benchmarks.sampler_throughput

Prompts are the embedded evaluation prompts and multi-turn hh-rlhf prompts, so their lengths and those of the answers
are uneven as in real use; both sides sample at temperature 1 up to the same limit. Rates count generated tokens. The
sides take turns and the median of the ratios counts. Then: two engines against one, greedy tokens and log-probabilities
against transformers, and the cost of a weight sync. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import ray
import torch

from raylign.config import EMBEDDED, RunConfig, load_config
from raylign.evaluation.generation import encode_prompt, generate_responses
from raylign.evaluation.prompts import load_prompts, prompts_file, select_prompts
from raylign.models.loading import load_policy, load_tokenizer, resolve_model
from raylign.runtime.phases import versions
from raylign.runtime.sampler import SamplerPool
from raylign.runtime.sampler_settings import engine_settings
from raylign.runtime.weight_sync import Probe, SyncReport, WeightUpdate
from raylign.types import Message, Rollout, SampleRequest
from tests.benchmarks.dpo_sides import load_pairs

TARGET = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The embedded model and what it is asked."""

    path: str
    model: Any
    tokenizer: Any
    conversations: list[tuple[Message, ...]]
    encoded: list[np.ndarray]

    def requests(self) -> list[SampleRequest]:
        return [
            SampleRequest(prompt_index=index, sample_index=0, prompt_ids=ids, seed=index)
            for index, ids in enumerate(self.encoded)
        ]


def load_work(num_prompts: int) -> Work:
    path = resolve_model(EMBEDDED)
    model, tokenizer = load_policy(path), load_tokenizer(path)
    single = select_prompts(load_prompts(prompts_file(EMBEDDED)), num=num_prompts // 2, seed=0)
    turns = [pair.row["prompt"] for pair in load_pairs(path, None, num_prompts - len(single))]
    conversations = [prompt.messages for prompt in single]
    conversations += [tuple(Message(role=turn["role"], content=turn["content"]) for turn in turn_) for turn_ in turns]
    encoded = [np.asarray(encode_prompt(tokenizer, conversation), np.int32) for conversation in conversations]
    return Work(path=path, model=model, tokenizer=tokenizer, conversations=conversations, encoded=encoded)


def start_pool(work: Work, config: RunConfig, *, temperature: float) -> SamplerPool:
    """As `SamplerPool.start`, which takes no temperature of 0."""
    from dataclasses import replace

    from raylign.runtime.sampler_engine import SamplerEngine

    settings = replace(engine_settings(work.path, config), temperature=temperature)
    return SamplerPool._start(ray.remote(SamplerEngine), (settings,), config)


def run_config(num_engines: int, max_new_tokens: int) -> RunConfig:
    sampler = {"num_engines": num_engines, "cpus_per_engine": 1, "max_new_tokens": max_new_tokens}
    data = {"max_length": 1024}
    return load_config(values={"train": {"method": "policy_gradient"}, "sampler": sampler, "data": data})


def pool_rate(pool: SamplerPool, work: Work) -> float:
    """Generated tokens per second."""
    start = time.perf_counter()
    rollouts = pool.generate(work.requests())
    return sum(len(rollout.response_ids) for rollout in rollouts) / (time.perf_counter() - start)


def transformers_rate(work: Work, batch_size: int, max_new_tokens: int) -> float:
    """Generated tokens per second; prompts are sorted by length, which is the better side of it."""
    start = time.perf_counter()
    answers = generate_responses(
        work.model,
        work.tokenizer,
        work.conversations,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        batch_size=batch_size,
        seed=0,
    )
    return sum(len(answer.response_ids) for answer in answers) / (time.perf_counter() - start)


def interleave(sides: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Rates of each side; they take turns, so that a busy machine hits both."""
    rates: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for values, side in zip(rates, sides, strict=True):
            values.append(side())
    return rates


def ratio(rates: list[list[float]]) -> float:
    """Median of first side over second side."""
    return statistics.median(first / second for first, second in zip(*rates, strict=True))


@torch.no_grad()
def token_logps(model: Any, ids: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(ids).long()
    logps = model(tokens[None]).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, tokens[1:, None])[:, 0].numpy()


def sync(pool: SamplerPool, work: Work, version: int) -> SyncReport:
    ids = np.concatenate(work.encoded[-2:])[:256]
    probe = Probe(token_ids=tuple(ids.tolist()), token_logps=token_logps(work.model, ids))
    weights = dict(work.model.state_dict())
    return pool.sync(WeightUpdate(version=version, weights=weights, adapter=None, probe=probe))


def differences(work: Work, rollouts: Sequence[Rollout]) -> np.ndarray:
    """|trainer - sampler| log-probability of every sampled token, nats."""
    found = []
    for rollout in rollouts:
        whole = np.concatenate([rollout.prompt_ids, rollout.response_ids])
        trainer = token_logps(work.model, whole)[len(rollout.prompt_ids) - 1 :]
        found.append(np.abs(trainer - rollout.sampler_logps))
    return np.concatenate(found)


@torch.no_grad()
def greedy_parity(work: Work, rollouts: Sequence[Rollout], max_new_tokens: int) -> tuple[int, float]:
    """Equal greedy answers, and the largest gap of the two logits where one first diverges (0 when none does)."""
    answers = generate_responses(
        work.model,
        work.tokenizer,
        work.conversations[: len(rollouts)],
        max_new_tokens=max_new_tokens,
        temperature=0,
        batch_size=1,
        seed=0,
    )
    equal, gap = 0, 0.0
    for rollout, answer in zip(rollouts, answers, strict=True):
        sampled, wanted = rollout.response_ids.tolist(), list(answer.response_ids)
        place = next((i for i, (a, b) in enumerate(zip(sampled, wanted, strict=False)) if a != b), None)
        if place is None:
            equal += sampled == wanted
            continue
        ids = torch.tensor([*rollout.prompt_ids.tolist(), *wanted[:place]])
        logits = work.model(ids[None]).logits[0, -1]
        gap = max(gap, float((logits[wanted[place]] - logits[sampled[place]]).abs()))
    return equal, gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--greedy", type=int, default=64)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    work = load_work(arguments.prompts)
    limit = arguments.max_new_tokens
    facts: dict[str, Any] = {"num_prompts": len(work.encoded), "max_new_tokens": limit}

    start = time.perf_counter()
    one = start_pool(work, run_config(1, limit), temperature=1.0)
    facts["engine_start_s"] = time.perf_counter() - start
    pool_rate(one, work)  # thread pools and allocators
    tried = {size: transformers_rate(work, size, limit) for size in arguments.batch_sizes}
    best = max(tried, key=lambda size: tried[size])
    rates = interleave([lambda: pool_rate(one, work), lambda: transformers_rate(work, best, limit)], arguments.repeats)
    facts |= {
        "ratio": ratio(rates),
        "engine_tokens_per_s": statistics.median(rates[0]),
        "transformers_tokens_per_s": statistics.median(rates[1]),
        "transformers_batch_size": best,
    }
    print(f"one engine {rates[0]}  transformers, batches of {best} {rates[1]}", flush=True)

    found = differences(work, one.generate(work.requests()))
    facts |= {"logps_mean_difference": found.mean(), "logps_max_difference": found.max()}
    reports = [sync(one, work, version) for version in (1, 2, 3)]
    facts |= {
        "sync_s": statistics.median(report.seconds for report in reports),
        "sync_bytes": reports[0].num_bytes,
        "probe_max_difference": max(report.probe_max_difference for report in reports),
    }

    two = start_pool(work, run_config(2, limit), temperature=1.0)
    pool_rate(two, work)
    rates = interleave([lambda: pool_rate(two, work), lambda: pool_rate(one, work)], arguments.repeats)
    facts["two_engines_ratio"] = ratio(rates)
    print(f"two engines {rates[0]}  one engine {rates[1]}", flush=True)
    two.stop()
    one.stop()

    greedy = start_pool(work, run_config(1, limit), temperature=0.0)
    equal, gap = greedy_parity(work, greedy.generate(work.requests()[: arguments.greedy]), limit)
    facts |= {"greedy_equal": equal, "greedy_of": arguments.greedy, "greedy_largest_gap": gap}
    greedy.stop()
    ray.shutdown()
    shown = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in facts.items()}
    figure = {"figure": "vllm_over_transformers_generate", "target": TARGET}
    print(json.dumps(figure | shown | {"versions": versions()}, default=float))


if __name__ == "__main__":
    main()
