r"""Preference losses on the log-probability margin \(\Delta\) of a pair.

All take \(\Delta\) of shape (B,) and return one loss per pair, shape (B,), not reduced, so that weights, masks and the
mean over a global batch stay with the caller. `dpo` and `cdpo` are `label_confidence` with a constant confidence.

Shape letter: B pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from raylign.errors import ConfigError, ShapeError


def logp_margin(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
) -> torch.Tensor:
    r"""How much more than the reference the policy prefers the chosen response.

    Definition: \(\Delta = (\log\pi(y_c) - \log\pi_0(y_c)) - (\log\pi(y_r) - \log\pi_0(y_r))\), sums over response
    tokens.

    Args:
        policy_chosen_logps: summed log-probabilities in nats. Shape (B,).
        policy_rejected_logps: likewise. Shape (B,).
        reference_chosen_logps: of the frozen reference. Shape (B,).
        reference_rejected_logps: likewise. Shape (B,).

    Returns:
        Margin in nats; swapping chosen and rejected negates it. Shape (B,).

    Raises:
        ShapeError: the four differ in shape.

    Source: Rafailov et al. (2023), arXiv:2305.18290, the argument of Eq. 7.
    """
    parts = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if len({part.shape for part in parts}) != 1:
        raise ShapeError(f"log-probabilities must be alike in shape, got {[tuple(part.shape) for part in parts]}")
    return (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)


def implicit_reward(policy_logps: torch.Tensor, reference_logps: torch.Tensor, *, beta: float) -> torch.Tensor:
    r"""Reward that the policy is optimal for, up to a constant per prompt: \(\beta (\log\pi(y) - \log\pi_0(y))\).

    Args:
        policy_logps: summed log-probabilities in nats. Shape (B,).
        reference_logps: of the frozen reference. Shape (B,).
        beta: inverse temperature, dimensionless.

    Returns:
        Rewards for logging, without gradient. Shape (B,).

    Source: Rafailov et al. (2023), arXiv:2305.18290, Eq. 5 without its partition term.
    """
    return beta * (policy_logps - reference_logps).detach()


def dpo(margin: torch.Tensor, *, beta: float) -> torch.Tensor:
    r"""Direct preference optimisation.

    Definition: \(-\log\sigma(\beta\Delta)\).

    Args:
        margin: \(\Delta\) of `logp_margin`, nats. Shape (B,).
        beta: inverse temperature, dimensionless.

    Returns:
        Loss per pair in nats. Shape (B,).

    Source: Rafailov et al. (2023), arXiv:2305.18290, Eq. 7.
    """
    return -F.logsigmoid(beta * margin)  # Eq. 7


def label_confidence(margin: torch.Tensor, confidence: torch.Tensor | float, *, beta: float) -> torch.Tensor:
    r"""DPO whose stored order is right with probability \(\gamma\).

    Definition: \(-\gamma\log\sigma(\beta\Delta) - (1 - \gamma)\log\sigma(-\beta\Delta)\).

    The gradient is \(\beta(\sigma(\beta\Delta) - \gamma)\), zero at \(\Delta^* = \mathrm{logit}(\gamma)/\beta\), and
    \(\gamma < 1/2\) trains on the flipped pair. \(\gamma = 1\) is `dpo` to the bit.

    Args:
        margin: \(\Delta\) of `logp_margin`, nats. Shape (B,).
        confidence: \(\gamma\) in [0, 1]; no gradient flows into it. Shape (B,) or a number for all pairs.
        beta: inverse temperature, dimensionless.

    Returns:
        Loss per pair in nats. Shape (B,).

    Raises:
        ShapeError: a confidence tensor that is not one value per pair.

    Source: arXiv:2503.10093, the loss of its method figure (E5 in docs/math.md).
    """
    if isinstance(confidence, torch.Tensor):
        if confidence.shape != margin.shape:
            raise ShapeError(f"confidence {tuple(confidence.shape)} must be one per pair, {tuple(margin.shape)}")
        confidence = confidence.detach()
    logits = beta * margin
    return -confidence * F.logsigmoid(logits) - (1 - confidence) * F.logsigmoid(-logits)  # E5


def cdpo(margin: torch.Tensor, *, beta: float, label_smoothing: float) -> torch.Tensor:
    r"""Conservative DPO: every label is assumed flipped with probability \(\epsilon\).

    Definition: `label_confidence` with \(\gamma = 1 - \epsilon\); smallest at \(\Delta^* = \log((1-\epsilon)/\epsilon)
    / \beta\).

    Args:
        margin: \(\Delta\) of `logp_margin`, nats. Shape (B,).
        beta: inverse temperature, dimensionless.
        label_smoothing: \(\epsilon\) in [0, 1/2).

    Returns:
        Loss per pair in nats. Shape (B,).

    Raises:
        ConfigError: label_smoothing outside [0, 1/2).

    Source: Mitchell (2023), "A note on DPO with noisy preferences and relationship to IPO", Eq. 3.
    """
    _check_smoothing(label_smoothing)
    return label_confidence(margin, 1 - label_smoothing, beta=beta)


def rdpo(margin: torch.Tensor, *, beta: float, label_smoothing: float) -> torch.Tensor:
    r"""Robust DPO: an unbiased estimate of the clean DPO loss when labels flip with probability \(\epsilon\).

    Definition: \([(1 - \epsilon)\ell(\Delta) - \epsilon\ell(-\Delta)] / (1 - 2\epsilon)\), \(\ell\) = `dpo`.

    The loss may be negative, and its gradient never vanishes: margins grow until training stops.

    Args:
        margin: \(\Delta\) of `logp_margin`, nats. Shape (B,).
        beta: inverse temperature, dimensionless.
        label_smoothing: flip rate \(\epsilon\) in [0, 1/2).

    Returns:
        Loss per pair in nats. Shape (B,).

    Raises:
        ConfigError: label_smoothing outside [0, 1/2).

    Source: Chowdhury et al. (2024), arXiv:2403.00409, the robust loss of Section 3.
    """
    _check_smoothing(label_smoothing)
    kept = (1 - label_smoothing) * dpo(margin, beta=beta)
    return (kept - label_smoothing * dpo(-margin, beta=beta)) / (1 - 2 * label_smoothing)


def ipo(margin: torch.Tensor, *, tau: float) -> torch.Tensor:
    r"""Identity preference optimisation: regress the margin to a finite target.

    Definition: \((\Delta - 1/(2\tau))^2\), on summed log-probabilities as in the paper (some trainers average them over
    the response).

    Args:
        margin: \(\Delta\) of `logp_margin`, nats. Shape (B,).
        tau: strength of the regularisation, above 0.

    Returns:
        Loss per pair in nats squared. Shape (B,).

    Source: Azar et al. (2023), arXiv:2310.12036, Eq. 17.
    """
    return torch.square(margin - 1 / (2 * tau))  # Eq. 17


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): at one half the labels say nothing"
            " (config key train.label_smoothing)"
        )
