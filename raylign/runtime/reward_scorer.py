"""From the files of a fitted reward to what scores responses with it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylign.config import RewardModelSection, RobustSection, TokenRewardSection
from raylign.evaluation.scoring import RewardScorer, StatesReward
from raylign.models.token_reward import Rule, TokenReward
from raylign.runtime.fitted_reward import FittedReward, load_reward
from raylign.runtime.robust import robust_rewards
from raylign.runtime.text_rewards import make_text_reward

if TYPE_CHECKING:
    import numpy as np
    import torch

    from raylign.data.conversations import Ids
    from raylign.evaluation.scoring import ResponseReward
    from raylign.models.reward_model import TextReward
    from raylign.rewards.posterior import RewardPosterior
    from raylign.runtime.evaluators import ActorOptions


def load_response_reward(
    model_path: str,
    reward_dir: str,
    layers: tuple[int, ...],
    device: torch.device | str,
    *,
    reward_model: RewardModelSection,
    options: ActorOptions,
    token_reward: TokenRewardSection | None = None,
) -> ResponseReward:
    """What was fitted to all training pairs, for responses that are none of them.

    Args:
        model_path: directory of the reference.
        reward_dir: of the reward phase.
        layers: transformer layers that heads were fitted on.
        device: of heads.
        reward_model: which classifier, for a reward of texts.
        options: the actor that scores.
        token_reward: credit of tokens, for kinds that reward tokens, which come as a `TokensReward`.
    """
    fitted = load_reward(Path(reward_dir))
    if isinstance(fitted, FittedReward):
        return StatesReward(fitted.full.to(device), layers)
    reward = make_text_reward(
        model_path, reward_model, directory=fitted.members, options=options, token_reward=token_reward
    )
    return TokensReward(reward) if isinstance(reward, TokenReward) else TextsReward(reward)


class TextsReward:
    """A reward of token ids, as a `ResponseReward`.

    Args:
        reward: loaded.
    """

    layers = None

    def __init__(self, reward: TextReward | TokenReward) -> None:
        self._reward = reward

    def __call__(
        self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids], states: torch.Tensor | None
    ) -> RewardPosterior:
        """See `ResponseReward`."""
        return self._reward.posterior(prompt_ids, response_ids)


class TokensReward(TextsReward):
    """A reward of token ids that also rewards every token.

    Args:
        reward: loaded, in the credit of the run.
    """

    def __init__(self, reward: TokenReward) -> None:
        super().__init__(reward)
        self._tokens = reward

    def token_rewards(
        self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids], *, rule: Rule | None = None
    ) -> list[np.ndarray]:
        """See `TokenReward.token_rewards`."""
        return self._tokens.token_rewards(prompt_ids, response_ids, rule=rule)


def make_reward_scorer(
    model_path: str,
    reward_dir: str,
    layers: tuple[int, ...],
    *,
    robust: RobustSection,
    options: ActorOptions,
    reward_model: RewardModelSection,
) -> RewardScorer:
    """The run's reward of texts.

    Args:
        model_path: directory of the reference.
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        robust: rule over members.
        options: the actor that scores; its number types must be those of the features.
        reward_model: which classifier, for a reward of texts.
    """
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.models.numerics import actor_device, load_reference

    device = actor_device(options.num_gpus)
    forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
    return RewardScorer(
        forward,
        load_tokenizer(model_path, trust_remote_code=options.trust_remote_code),
        load_response_reward(model_path, reward_dir, layers, device, reward_model=reward_model, options=options),
        rule=functools.partial(robust_rewards, robust=robust),
        layout=resolve_layout("auto", forward.causal_lm.config),
    )
