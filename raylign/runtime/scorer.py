"""What scores sampled responses: the run's reward and the frozen reference, from one forward.

The reward is the one that re-ranks stored pairs: the head of all training pairs, on the reference's states at the end
of the response. A response that the length limit cut, or another stop token ended, is closed with the end-of-response
token for the reward, as stored responses are; the log-probabilities are those of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raylign.cost.ledger import peak_device_mib, peak_rss_mib
from raylign.types import Rollout, ScoredRollout

if TYPE_CHECKING:
    from raylign.evaluation.scoring import ScoredResponses
    from raylign.runtime.evaluators import ActorOptions


class ResponseScorer:
    """Holds the reference and the reward head; a plain class that is made an actor where it is used.

    Args:
        model_path: directory of the reference: the policy before training.
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        options: size and number types of the actor; these must be those of the features.
    """

    def __init__(self, model_path: str, reward_dir: str, layers: tuple[int, ...], options: ActorOptions) -> None:
        import torch

        from raylign.data.tokenization import end_of_response_id
        from raylign.models.loading import load_tokenizer, resolve_layout
        from raylign.models.numerics import actor_device, load_reference
        from raylign.runtime.reward_job import FittedReward

        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        device = actor_device(options.num_gpus)
        tokenizer = load_tokenizer(model_path, trust_remote_code=options.trust_remote_code)
        self._forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
        self._head = FittedReward.load(Path(reward_dir)).full.to(device)
        self._device = device
        self._layers = layers
        self._layout = resolve_layout("auto", self._forward.causal_lm.config)
        self._end_id = end_of_response_id(tokenizer)
        self._pad_id = tokenizer.pad_token_id

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score responses, in their order."""
        import torch

        prompts = [rollout.prompt_ids for rollout in rollouts]
        responses = [rollout.response_ids for rollout in rollouts]
        cut = [
            np.append(ids, self._end_id) if not r.reached_end else ids
            for r, ids in zip(rollouts, responses, strict=True)
        ]
        found = self._forward_of(prompts, cut)
        # another stop token in the end token's place: its own log-probability is wanted, its state is not
        others = [row for row, ids in enumerate(cut) if ids[-1] != self._end_id]
        if others:
            closed = [np.append(cut[row][:-1], self._end_id) for row in others]
            states = self._forward_of([prompts[row] for row in others], closed).states
            assert found.states is not None and states is not None
            found.states[others] = states
        assert found.states is not None
        with torch.no_grad():
            rewards = self._head(found.states.to(self._device)).double().cpu().numpy()
        return [
            ScoredRollout(
                rollout=rollout,
                reward=float(reward),
                reward_variance=0.0,
                reference_token_logps=logps[: len(rollout.response_ids)].copy(),
            )
            for rollout, reward, logps in zip(rollouts, rewards, found.token_logps, strict=True)
        ]

    def _forward_of(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> ScoredResponses:
        from raylign.evaluation.scoring import score_responses

        return score_responses(
            self._forward, prompts, responses, layout=self._layout, pad_token_id=self._pad_id, layers=self._layers
        )

    def peak_memory(self) -> tuple[float, float]:
        """Largest resident and largest device memory of this process since its start, MiB."""
        return peak_rss_mib(), peak_device_mib()

    def is_ready(self) -> bool:
        """True, once the models are loaded."""
        return True
