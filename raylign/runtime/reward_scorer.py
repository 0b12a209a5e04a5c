"""From the files of a fitted reward to what scores responses with it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from raylign.config import RobustSection
from raylign.evaluation.scoring import RewardScorer, StatesReward
from raylign.runtime.fitted_reward import FittedReward
from raylign.runtime.robust import robust_rewards

if TYPE_CHECKING:
    import torch

    from raylign.evaluation.scoring import ResponseReward
    from raylign.runtime.evaluators import ActorOptions


def load_response_reward(reward_dir: str, layers: tuple[int, ...], device: torch.device | str) -> ResponseReward:
    """The head of all training pairs, for responses that are none of them.

    Args:
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        device: of the head.
    """
    return StatesReward(FittedReward.load(Path(reward_dir)).full.to(device), layers)


def make_reward_scorer(
    model_path: str,
    reward_dir: str,
    layers: tuple[int, ...],
    robust: RobustSection | None = None,
    options: ActorOptions | None = None,
) -> RewardScorer:
    """The run's reward of texts, on the reference model's states.

    Args:
        model_path: directory of the reference.
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        robust: rule over members; None is their mean.
        options: the actor that scores; its number types must be those of the features.
    """
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.models.numerics import actor_device, load_reference
    from raylign.runtime.evaluators import ActorOptions

    options = options or ActorOptions()
    device = actor_device(options.num_gpus)
    forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
    return RewardScorer(
        forward,
        load_tokenizer(model_path, trust_remote_code=options.trust_remote_code),
        load_response_reward(reward_dir, layers, device),
        rule=functools.partial(robust_rewards, robust=robust or RobustSection()),
        layout=resolve_layout("auto", forward.causal_lm.config),
    )
