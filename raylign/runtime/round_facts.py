"""What a round asks for, and what is counted and reported of it: plain functions of requests and responses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raylign.cost.flops import Work, pair_work, sequence_work
from raylign.types import Rollout, SampleRequest, ScoredRollout

if TYPE_CHECKING:
    from raylign.config import RunConfig
    from raylign.runtime.weight_sync import SyncReport


def sample_requests(
    prompts: Sequence[np.ndarray], rows: np.ndarray, index: int, config: RunConfig
) -> list[SampleRequest]:
    """K requests for each prompt of a round, prompts in a row.

    Args:
        prompts: token ids of all prompts.
        rows: of the prompts of the round. Shape (P,).
        index: of the round; the same prompt in another round gets other random streams.
        config: of the run, for the number of samples and the seed.
    """
    requests = []
    for position, row in enumerate(rows):
        for sample in range(config.online.num_samples):
            name = f"{config.run.seed}:{index}:{row}:{sample}".encode()
            # 31 bits, which every random generator takes
            seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") >> 1
            requests.append(
                SampleRequest(prompt_index=position, sample_index=sample, prompt_ids=prompts[row], seed=seed)
            )
    return requests


def sampling_counts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Counts of one call for responses, for the ledger; prompts count once per response."""
    return {
        "prompt_tokens": sum(len(rollout.prompt_ids) for rollout in rollouts),
        "generated_tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "num_items": len(rollouts),
    }


def sampling_flops(rollouts: Sequence[Rollout], flops: Callable[[Work], int]) -> int:
    """Model FLOPs of sampling responses, each after its own prompt; what a prefix cache saves is not known."""
    lengths = ((len(rollout.prompt_ids), len(rollout.response_ids)) for rollout in rollouts)
    return sum(flops(sequence_work(prompt + response, scored_tokens=response)) for prompt, response in lengths)


def forward_work(rollouts: Sequence[Rollout], *, is_shared: bool) -> Work:
    """Work of a forward over responses, two to a prompt at a time; an odd one stands alone.

    Args:
        rollouts: the responses to a prompt in a row.
        is_shared: whether the two compute their prompt once.
    """
    by_prompt: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_index, []).append(rollout)
    work = Work()
    for members in by_prompt.values():
        prompt, lengths = len(members[0].prompt_ids), [len(rollout.response_ids) for rollout in members]
        for first, second in zip(lengths[::2], lengths[1::2], strict=False):
            work += pair_work(prompt, first, second, is_shared=is_shared)
        if len(lengths) % 2:
            work += sequence_work(prompt + lengths[-1], scored_tokens=lengths[-1])
    return work


def round_facts(scored: Sequence[ScoredRollout], sync: SyncReport) -> dict[str, float]:
    """Metrics of a round under the names of the field."""
    rewards = np.array([item.reward for item in scored])
    lengths = np.array([len(item.rollout.response_ids) for item in scored])
    logps = np.array([item.rollout.sampler_logps.sum() for item in scored])
    reference = np.array([item.reference_token_logps.sum() for item in scored])
    return {
        "critic/score/mean": float(rewards.mean()),
        "critic/score/std": float(rewards.std()),
        "response_length/mean": float(lengths.mean()),
        "response_length/clip_ratio": float(np.mean([not item.rollout.reached_end for item in scored])),
        "sampler/reference_kl": float((logps - reference).mean()),
        "sync/seconds": sync.seconds,
        "sync/bytes": sync.num_bytes,
        "sync/version": sync.version,
        "sync/probe_kl": sync.probe_kl,
        **_member_facts(scored),
    }


def _member_facts(scored: Sequence[ScoredRollout]) -> dict[str, float]:
    """Which members of the reward decide, and how far they are apart; nothing with one member."""
    members = [item.head_rewards for item in scored if item.head_rewards is not None]
    if len(members) < len(scored):
        return {}
    import torch

    from raylign.rewards.member_facts import member_facts

    scales = [item.head_scales for item in scored if item.head_scales is not None]
    facts = member_facts(
        torch.from_numpy(np.stack(members)),
        torch.from_numpy(np.stack(scales)) if scales else None,
    )
    named = {
        "reward/disagreement": facts.mean_disagreement,
        "reward/gap": facts.mean_gap,
        **{f"reward/argmin_share/{head}": share for head, share in enumerate(facts.argmin_share)},
    }
    if facts.nominal_share is not None and facts.mean_sigma is not None:
        named["reward/sigma"] = facts.mean_sigma
        named |= {f"reward/nominal_share/{head}": share for head, share in enumerate(facts.nominal_share)}
    return named
