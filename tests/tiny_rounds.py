"""Rounds of random responses for tests of the online methods."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tiny_run import VOCABULARY

from raylign.training.rounds import Round
from raylign.types import Rollout, ScoredRollout


def with_token_rewards(round_: Round, *, at_end: bool = False) -> Round:
    """The round with random rewards of tokens, or with the response's reward on its last token."""
    rng = np.random.default_rng([11, round_.index])
    scored = []
    for item in round_.scored:
        tokens = rng.normal(0, 1, len(item.rollout.response_ids)).astype(np.float32)
        if at_end:
            tokens[:-1], tokens[-1] = 0, item.reward
        scored.append(replace(item, token_rewards=tokens))
    return replace(round_, scored=tuple(scored))


def tiny_round(num_prompts: int, num_samples: int, *, seed: int = 0, index: int = 0) -> Round:
    """Random prompts, responses, rewards and log-probabilities; no model made them."""
    rng = np.random.default_rng([seed, index])
    scored = []
    for prompt in range(num_prompts):
        prompt_ids = rng.integers(2, VOCABULARY, rng.integers(2, 9)).astype(np.int32)
        for sample in range(num_samples):
            response_ids = np.append(rng.integers(2, VOCABULARY, rng.integers(1, 7)), 1).astype(np.int32)
            rollout = Rollout(
                prompt_index=prompt,
                sample_index=sample,
                prompt_ids=prompt_ids,
                response_ids=response_ids,
                sampler_logps=rng.normal(-4, 0.1, len(response_ids)).astype(np.float32),
                reached_end=bool(sample % 2),
                weight_version=index + 1,
            )
            scored.append(
                ScoredRollout(
                    rollout=rollout,
                    reward=float(rng.normal()),
                    reward_variance=0.0,
                    reference_token_logps=rng.normal(-4, 0.1, len(response_ids)).astype(np.float32),
                )
            )
    return Round(index=index, scored=tuple(scored), facts={"critic/score/mean": 0.5})
