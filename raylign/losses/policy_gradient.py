r"""The clipped surrogate of PPO on sampled tokens, and the correction for a sampler that is not quite the policy.

Three log-probabilities of every sampled token: `sampler_logps` of the engine that sampled it, `logps_old` of the
trainer with the same weights at the start of the round, and `logps` of the trainer now, the only one with a gradient.
The surrogate clips logps against logps_old; the importance weight, a constant, corrects logps_old against
sampler_logps.

All tensors are flat, one value per token of every response, shape (N,); losses are not reduced.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from raylign.errors import ConfigError, ShapeError
from raylign.losses.advantages import check_alike, kl_estimates

_MAX_LOG_RATIO = (
    20.0  # exp(20) is 5e8: beyond, the ratio is held, where float32 would soon overflow and spoil gradients
)


def importance_weights(logps_old: torch.Tensor, sampler_logps: torch.Tensor, *, cap: float) -> torch.Tensor:
    r"""Truncated importance weight of each token for what the sampler computed differently.

    Definition: \(w_t = \min(e^{\log\pi_{old} - \log q}, \mathrm{cap})\), q the sampler.

    Exact (without the cap) for responses of one token; for longer ones a weight per token leaves out the ratios of the
    other tokens, an error of the order of q's deviation that buys a variance that does not grow with the length.

    Args:
        logps_old: of the trainer with the weights that sampled, nats. Shape (N,).
        sampler_logps: of the sampler at temperature 1 and without truncation, nats. Shape (N,).
        cap: bound above 0; math.inf for none.

    Returns:
        Weights, without gradient; 1 where the two agree (and cap is at least 1). Shape (N,).

    Raises:
        ShapeError: the two differ in shape.

    Source: Ionides (2008), "Truncated importance sampling"; per token between trainer and sampler: Yao et al. (2025),
    fengyao.notion.site/off-policy-rl.
    """
    check_alike(logps_old=logps_old, sampler_logps=sampler_logps)
    return torch.exp(logps_old - sampler_logps).detach().clamp(max=cap)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceStats:
    """How far the sampler is from the trainer: sums, so that micro-batches and workers add up.

    Attributes:
        num_tokens: N. Each field is a 0-d float64 tensor.
        weight_sum: of the truncated weights.
        weight_square_sum: of their squares.
        num_truncated: tokens whose weight the cap changed.
        difference_sum: of |logps_old - sampler_logps|, nats.
        difference_max: the largest of these, nats.
        kl_sum: of the k3 estimates of KL(sampler || trainer), nats.
    """

    num_tokens: torch.Tensor
    weight_sum: torch.Tensor
    weight_square_sum: torch.Tensor
    num_truncated: torch.Tensor
    difference_sum: torch.Tensor
    difference_max: torch.Tensor
    kl_sum: torch.Tensor

    def __add__(self, other: ImportanceStats) -> ImportanceStats:
        """The stats of both sets of tokens together."""
        parts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        parts["difference_max"] = torch.maximum(self.difference_max, other.difference_max)
        return ImportanceStats(**parts)

    def summary(self) -> dict[str, float]:
        """Metrics to log; waits for the device. Without tokens all are 0, the effective share 1.

        Returns:
            weight_mean, truncated_share, difference_mean and difference_max and kl in nats, and effective_share, the
            effective sample size (Kish) of the weights over N.
        """
        count = max(float(self.num_tokens), 1.0)
        squares = count * float(self.weight_square_sum)
        return {
            "weight_mean": float(self.weight_sum) / count,
            "truncated_share": float(self.num_truncated) / count,
            "difference_mean": float(self.difference_sum) / count,
            "difference_max": float(self.difference_max),
            "kl": float(self.kl_sum) / count,
            "effective_share": float(self.weight_sum) ** 2 / squares if squares > 0 else 1.0,
        }


def importance_stats(logps_old: torch.Tensor, sampler_logps: torch.Tensor, *, cap: float) -> ImportanceStats:
    """Sums over tokens that say how far the sampler is from the trainer.

    Args:
        logps_old: as for `importance_weights`. Shape (N,).
        sampler_logps: likewise. Shape (N,).
        cap: likewise.

    Returns:
        Sums, to be added up over micro-batches and workers.

    Raises:
        ShapeError: the two differ in shape.
    """
    logps_old, sampler_logps = logps_old.detach().double(), sampler_logps.double()
    weights = importance_weights(logps_old, sampler_logps, cap=cap)
    log_ratio, k3 = kl_estimates(sampler_logps, logps_old)
    difference = log_ratio.abs()
    return ImportanceStats(
        num_tokens=weights.new_tensor(float(weights.numel())),
        weight_sum=weights.sum(),
        weight_square_sum=torch.square(weights).sum(),
        num_truncated=(torch.exp(-log_ratio) > cap).sum().double(),
        difference_sum=difference.sum(),
        difference_max=difference.max() if difference.numel() else difference.new_zeros(()),
        kl_sum=k3.sum(),
    )


def clipped_surrogate(
    logps: torch.Tensor,
    logps_old: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    importance_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""PPO's pessimistic surrogate, negated.

    Definition: \(-w_t \min(\rho_t A_t, \mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon) A_t)\) with
    \(\rho_t = e^{\log\pi - \log\pi_{old}}\). At \(\rho = 1\) the gradient is \(-w_t A_t \nabla\log\pi\); where
    `is_clipped` it is zero. The ratio is held at \(e^{20}\), so that no outlier overflows.

    Args:
        logps: log-probabilities under the policy being trained, nats. Shape (N,).
        logps_old: under the policy at the start of the round. Shape (N,).
        advantages: of each token. Shape (N,).
        clip: \(\epsilon\) in (0, 1).
        importance_weight: `importance_weights`, also 0 to leave a token out. Shape (N,). None means 1.

    Returns:
        Loss per token, in units of the advantages; gradient in logps only. Shape (N,).

    Raises:
        ShapeError: the tensors differ in shape.

    Source: Schulman et al. (2017), arXiv:1707.06347, Eq. 7. The weight outside of the clip is a choice of this project.
    """
    ratio = _ratio(logps, logps_old, advantages)
    advantages = advantages.detach()
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages)  # Eq. 7
    if importance_weight is None:
        return loss
    check_alike(logps=logps, importance_weight=importance_weight)
    return importance_weight.detach() * loss


def is_clipped(logps: torch.Tensor, logps_old: torch.Tensor, advantages: torch.Tensor, *, clip: float) -> torch.Tensor:
    r"""Tokens whose surrogate has no gradient: moved by more than the clip where their advantage wanted them.

    Definition: \(\rho > 1 + \epsilon\) and \(A > 0\), or \(\rho < 1 - \epsilon\) and \(A < 0\).

    Args:
        logps: as for `clipped_surrogate`. Shape (N,).
        logps_old: likewise. Shape (N,).
        advantages: likewise. Shape (N,).
        clip: likewise.

    Returns:
        Shape (N,), bool.

    Raises:
        ShapeError: the tensors differ in shape.
    """
    ratio = _ratio(logps, logps_old, advantages).detach()
    return torch.where(advantages > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantages < 0))


def value_loss(
    values: torch.Tensor, values_old: torch.Tensor, returns: torch.Tensor, *, value_clip: float
) -> torch.Tensor:
    r"""Squared error of the value head, pessimistic about moves beyond the clip.

    Definition: \(\frac12 \max((V - G)^2, (\mathrm{clip}(V, V_{old} \pm c) - G)^2)\).

    Args:
        values: of the head being trained, reward units. Shape (N,).
        values_old: of the head at the start of the round. Shape (N,).
        returns: G of `gae`. Shape (N,).
        value_clip: c above 0, reward units.

    Returns:
        Loss per token, reward units squared; gradient in values only. Shape (N,).

    Raises:
        ShapeError: the tensors differ in shape.

    Source: released code of Dai et al. (2023), arXiv:2310.12773 (Safe-RLHF).
    """
    check_alike(values=values, values_old=values_old, returns=returns)
    values_old, returns = values_old.detach(), returns.detach()
    held = torch.clamp(values, values_old - value_clip, values_old + value_clip)
    return 0.5 * torch.maximum(torch.square(values - returns), torch.square(held - returns))


def reduce_loss(
    loss: torch.Tensor, *, reduction: Literal["token_global", "sequence_sum"], num_tokens: int, num_sequences: int
) -> torch.Tensor:
    """This part's share of the loss of the whole batch: shares of micro-batches and workers add up to it.

    Definition: the sum over the part's tokens, divided by the tokens ("token_global") or the responses ("sequence_sum")
    of the whole batch. The second is the plain policy gradient; the first also weighs batches by their mean length.

    Args:
        loss: per token. Shape (N,), possibly empty.
        reduction: what the sum is divided by.
        num_tokens: tokens of the whole batch, over all micro-batches and workers.
        num_sequences: responses of the whole batch.

    Returns:
        Shape (), connected to the graph also when the part is empty.

    Raises:
        ConfigError: another reduction.
        ShapeError: the count is below 1.
    """
    counts = {"token_global": num_tokens, "sequence_sum": num_sequences}
    if reduction not in counts:
        raise ConfigError(
            f"reduction={reduction!r} must be one of {sorted(counts)} (config key policy_gradient.reduction)"
        )
    if counts[reduction] < 1:
        raise ShapeError(f"reduction={reduction} divides by {counts[reduction]}; give the counts of the whole batch")
    return loss.sum() / counts[reduction]


def _ratio(logps: torch.Tensor, logps_old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Probability ratio with a gradient in logps, shape (N,)."""
    check_alike(logps=logps, logps_old=logps_old, advantages=advantages)
    return torch.exp((logps - logps_old.detach()).clamp(max=_MAX_LOG_RATIO))
