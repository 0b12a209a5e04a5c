"""What scores sampled responses: the run's reward and the frozen reference, from one forward.

The reward is the one that re-ranks stored pairs: what was fitted on all training pairs, on the reference's states at
the end of the response, and the rule that makes one number of its members. A response that the length limit cut, or
another stop token ended, is closed with the end-of-response token for reward and cost, as stored responses are; the
log-probabilities are those of its own tokens. A cost model, where the run has one, reads the same states.

Rewards of tokens are the mean over members. The rule over members is of responses: what it takes off the mean of a
response's score comes off its last token. Taken off every token it would be a price for length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raylign.config import CostModelSection, RewardModelSection, RobustSection, TokenRewardSection
from raylign.cost.ledger import peak_device_mib, peak_rss_mib
from raylign.runtime.robust import robust_rewards
from raylign.types import Rollout, ScoredRollout

if TYPE_CHECKING:
    import torch

    from raylign.evaluation.scoring import ScoredResponses
    from raylign.runtime.evaluators import ActorOptions


class ResponseScorer:
    """Holds the reference and the reward head; a plain class that is made an actor where it is used.

    Args:
        model_path: directory of the reference: the policy before training.
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        robust: rule over members.
        options: size and number types of the actor; these must be those of the features.
        reward_model: which classifier, for a reward of texts.
        cost_dir: of the cost phase; None leaves responses without a cost.
        cost_model: which classifier, for a cost of texts.
        token_reward: credit of tokens, for a reward of tokens; None leaves responses without rewards of tokens.
    """

    def __init__(
        self,
        model_path: str,
        reward_dir: str,
        layers: tuple[int, ...],
        robust: RobustSection,
        options: ActorOptions,
        reward_model: RewardModelSection | None = None,
        cost_dir: str | None = None,
        cost_model: CostModelSection | None = None,
        token_reward: TokenRewardSection | None = None,
    ) -> None:
        import torch

        from raylign.data.tokenization import end_of_response_id
        from raylign.models.loading import load_tokenizer, resolve_layout
        from raylign.models.numerics import actor_device, load_reference
        from raylign.runtime.cost_scorer import load_response_cost
        from raylign.runtime.reward_scorer import TokensReward, load_response_reward

        if not options.num_gpus:
            torch.set_num_threads(max(1, int(options.num_cpus)))
        device = actor_device(options.num_gpus)
        tokenizer = load_tokenizer(model_path, trust_remote_code=options.trust_remote_code)
        self._forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
        self._reward = load_response_reward(
            model_path,
            reward_dir,
            layers,
            device,
            reward_model=reward_model or RewardModelSection(),
            options=options,
            token_reward=token_reward,
        )
        self._tokens: TokensReward | None = None
        if token_reward is not None:
            assert isinstance(self._reward, TokensReward)  # the driver has refused other rewards
            self._tokens = self._reward
        self._cost = None
        if cost_dir is not None:
            self._cost = load_response_cost(
                model_path, cost_dir, device, cost_model=cost_model or CostModelSection(), options=options
            )
        read = {layer for reader in (self._reward, self._cost) if reader for layer in reader.layers or ()}
        self._layers = tuple(sorted(read)) or None
        self._robust = robust
        self._layout = resolve_layout("auto", self._forward.causal_lm.config)
        self._end_id = end_of_response_id(tokenizer)
        self._pad_id = tokenizer.pad_token_id

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Score the responses of one round, in their order."""
        prompts = [rollout.prompt_ids for rollout in rollouts]
        responses = [rollout.response_ids for rollout in rollouts]
        cut = [
            np.append(ids, self._end_id) if not r.reached_end else ids
            for r, ids in zip(rollouts, responses, strict=True)
        ]
        found = self._forward_of(prompts, cut)
        # another stop token in the end token's place: its own log-probability is wanted, its state is not
        closed = [ids if ids[-1] == self._end_id else np.append(ids[:-1], self._end_id) for ids in cut]
        others = [row for row, ids in enumerate(cut) if ids[-1] != self._end_id]
        if others and found.states is not None:
            states = self._forward_of([prompts[row] for row in others], [closed[row] for row in others]).states
            assert states is not None
            found.states[others] = states
        belief = self._reward(prompts, closed, self._states_for(self._reward.layers, found.states))
        costs = np.full(len(rollouts), np.nan)
        if self._cost is not None:
            of_cost = self._states_for(self._cost.layers, found.states)
            costs = self._cost(prompts, closed, of_cost).double().numpy()
        rewards = robust_rewards(belief, self._robust).double().numpy()
        tokens = self._token_rewards(prompts, responses, rewards - belief.mean.double().numpy())
        variances = belief.variance.double().numpy()
        members = belief.head_rewards.float().numpy()
        scales = None if belief.head_scales is None else belief.head_scales.float().numpy()
        return [
            ScoredRollout(
                rollout=rollout,
                reward=float(rewards[row]),
                reward_variance=float(variances[row]),
                reference_token_logps=logps[: len(rollout.response_ids)].copy(),
                cost=float(costs[row]),
                token_rewards=tokens[row],
                head_rewards=members[row].copy() if belief.num_heads > 1 else None,
                head_scales=None if scales is None else scales[row].copy(),
            )
            for row, (rollout, logps) in enumerate(zip(rollouts, found.token_logps, strict=True))
        ]

    def _token_rewards(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], at_end: np.ndarray
    ) -> Sequence[np.ndarray | None]:
        """Rewards of the responses' own tokens, with `at_end` (n,) added to the last ones; None where not asked for."""
        if self._tokens is None:
            return [None] * len(responses)
        found = self._tokens.token_rewards(prompts, responses)
        for rewards, added in zip(found, at_end, strict=True):
            rewards[-1] += added
        return found

    def _forward_of(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> ScoredResponses:
        from raylign.evaluation.scoring import score_responses

        return score_responses(
            self._forward,
            prompts,
            responses,
            layout=self._layout,
            pad_token_id=self._pad_id,
            layers=self._layers,
        )

    def _states_for(self, layers: tuple[int, ...] | None, states: torch.Tensor | None) -> torch.Tensor | None:
        """Of all layers that were kept, those that one model reads, in its order."""
        if layers is None or states is None or self._layers is None:
            return None
        return states[:, [self._layers.index(layer) for layer in layers]]

    def peak_memory(self) -> tuple[float, float]:
        """Largest resident and largest device memory of this process since its start, MiB."""
        return peak_rss_mib(), peak_device_mib()

    def is_ready(self) -> bool:
        """True, once the models are loaded."""
        return True
