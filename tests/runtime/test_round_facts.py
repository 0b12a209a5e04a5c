"""What is asked of a round and counted of it, on numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_rounds import tiny_round

from raylign.config import load_config
from raylign.cost.flops import Work, pair_work, sequence_work
from raylign.runtime.round_facts import forward_work, round_facts, sample_requests, sampling_counts, sampling_flops
from raylign.runtime.weight_sync import SyncReport

PROMPTS = [np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)]
CONFIG = load_config(values={"train": {"method": "online_dpo"}, "online": {"num_samples": 3}, "run": {"seed": 7}})


def test_every_prompt_of_a_round_is_asked_for_each_of_its_samples() -> None:
    requests = sample_requests(PROMPTS, np.array([2, 0]), 1, CONFIG)
    assert [(r.prompt_index, r.sample_index, len(r.prompt_ids)) for r in requests] == [
        (0, 0, 2), (0, 1, 2), (0, 2, 2), (1, 0, 3), (1, 1, 3), (1, 2, 3)
    ]  # fmt: skip
    assert len({request.seed for request in requests}) == 6
    assert all(0 <= request.seed < 2**31 for request in requests)


def test_seeds_follow_run_round_prompt_and_sample_and_not_the_place_in_the_round() -> None:
    seeds = {r.sample_index: r.seed for r in sample_requests(PROMPTS, np.array([0]), 1, CONFIG)}
    moved = {r.sample_index: r.seed for r in sample_requests(PROMPTS, np.array([2, 0]), 1, CONFIG) if r.prompt_index}
    assert seeds == moved
    later = {r.sample_index: r.seed for r in sample_requests(PROMPTS, np.array([0]), 2, CONFIG)}
    assert not set(seeds.values()) & set(later.values())


@pytest.mark.parametrize("num_samples", [2, 3])
def test_a_shared_prompt_is_counted_once_per_couple(num_samples: int) -> None:
    rollouts = [item.rollout for item in tiny_round(2, num_samples).scored]
    expected = Work()
    for start in (0, num_samples):
        prompt = len(rollouts[start].prompt_ids)
        lengths = [len(rollout.response_ids) for rollout in rollouts[start : start + num_samples]]
        expected += pair_work(prompt, lengths[0], lengths[1], is_shared=True)
        if num_samples == 3:
            expected += sequence_work(prompt + lengths[2], scored_tokens=lengths[2])
    assert forward_work(rollouts, is_shared=True) == expected
    padded = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
    assert forward_work(rollouts, is_shared=False).tokens == padded


def test_sampling_counts_a_prompt_with_each_response() -> None:
    rollouts = [item.rollout for item in tiny_round(2, 2).scored]
    prompts = sum(len(rollout.prompt_ids) for rollout in rollouts)
    responses = sum(len(rollout.response_ids) for rollout in rollouts)
    assert sampling_counts(rollouts) == {"prompt_tokens": prompts, "generated_tokens": responses, "num_items": 4}
    assert sampling_flops(rollouts, lambda work: work.tokens) == prompts + responses
    assert sampling_flops(rollouts, lambda work: work.scored_tokens) == responses


def test_facts_of_a_round() -> None:
    scored = tiny_round(3, 4).scored
    report = SyncReport(
        version=2, seconds=0.5, num_bytes=10, probe_mean_difference=0.0, probe_max_difference=0.0, probe_kl=1e-9
    )
    facts = round_facts(scored, report)
    assert facts["critic/score/mean"] == pytest.approx(np.mean([item.reward for item in scored]))
    assert facts["response_length/clip_ratio"] == 0.5  # samples 0 and 2 of 4 were cut
    kl = np.mean([item.rollout.sampler_logps.sum() - item.reference_token_logps.sum() for item in scored])
    assert facts["sampler/reference_kl"] == pytest.approx(kl, rel=1e-5)
    assert (facts["sync/version"], facts["sync/bytes"], facts["sync/seconds"]) == (2, 10, 0.5)
