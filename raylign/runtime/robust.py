"""The rule over members that the configuration names, applied to beliefs."""

from __future__ import annotations

import torch

from raylign.config import RobustSection
from raylign.rewards import aggregate
from raylign.rewards.posterior import RewardPosterior


def robust_rewards(posterior: RewardPosterior, robust: RobustSection) -> torch.Tensor:
    """One reward of each response, by `robust.rule`; the mean when there is one member.

    With robust.set_type=heads_global the n responses are those of one round, and the minimum is that of the member
    which is worst on average over all of them.

    Args:
        posterior: of n responses.
        robust: rule and knobs.

    Returns:
        Shape (n,), without gradient.
    """
    mu, sigma = posterior.head_rewards, posterior.head_scales
    # a posterior over weights is unsure even when it shows a single draw
    if posterior.num_heads == 1 and robust.rule not in ("uwo", "lcb"):
        return posterior.mean.detach()
    if robust.set_type == "heads_global" and robust.rule in ("min", "brme"):
        w_nominal = robust.w_nominal if robust.rule == "brme" else 0.0
        return aggregate.global_rewards(mu, sigma, w_nominal=w_nominal, head=aggregate.worst_head(mu))
    match robust.rule:
        case "mean":
            return posterior.mean.detach()
        case "min":
            return aggregate.minimum(mu, sigma)
        case "uwo":
            return aggregate.uwo(_moments(posterior), uncertainty_weight=robust.uncertainty_weight)
        case "lcb":
            return aggregate.lcb(_moments(posterior), k=robust.lcb_k)
        case "cvar":
            return aggregate.cvar(mu, sigma, level=robust.cvar_level)
        case "entropic":
            return aggregate.entropic(mu, sigma, b=robust.entropic_b)
        case "brme":
            return aggregate.brme(mu, sigma, w_nominal=robust.w_nominal)


def _moments(posterior: RewardPosterior) -> torch.Tensor:
    """Two members (n, 2) with the posterior's mean and variance: the members' own, or exact where its draws are not."""
    return posterior.mean[:, None] + posterior.disagreement[:, None] * torch.tensor([-1.0, 1.0])
