r"""What a reward model believes: the contract that all reward models share, and what it says of a pair.

A point estimate is an ensemble of one member. An ensemble's belief is its members; a Gaussian posterior over weights
also knows its moments exactly. Both fit one form: member rewards for rules over members, and a mean with a square root
of the covariance for moments. The covariance is needed whole, because what two responses have in common cancels in
their margin.

Shape letters: n responses, B pairs, M members, K columns of the root, L layers, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from raylign.errors import DataError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPosterior:
    r"""Belief about the rewards of n responses.

    Attributes:
        mean: (n,) posterior mean, reward units.
        deviations: (n, K) rows of a square root of the covariance: \(\mathrm{cov}(r_a, r_b) = d_a \cdot d_b\), reward
            units. What members disagree about, not the label noise in `head_scales`.
        head_rewards: (n, M) reward by each member; for a posterior over weights, by each of M draws of the weights.
        head_scales: (n, M) standard deviation that each member states of its own reward, or None when it states none.
    """

    mean: torch.Tensor
    deviations: torch.Tensor
    head_rewards: torch.Tensor
    head_scales: torch.Tensor | None = None

    @property
    def variance(self) -> torch.Tensor:
        """(n,) posterior variance; for members, their variance with 1/M."""
        return self.deviations.square().sum(-1)

    @property
    def disagreement(self) -> torch.Tensor:
        """(n,) posterior standard deviation, the signal of unfamiliar input."""
        return self.variance.sqrt()

    @property
    def num_heads(self) -> int:
        """M."""
        return self.head_rewards.shape[-1]

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: torch.Tensor | slice) -> RewardPosterior:
        """The belief about some of the responses."""
        return RewardPosterior(
            mean=self.mean[index],
            deviations=self.deviations[index],
            head_rewards=self.head_rewards[index],
            head_scales=None if self.head_scales is None else self.head_scales[index],
        )

    def to(self, device: torch.device | str) -> RewardPosterior:
        """The same belief with every tensor on `device`."""
        return RewardPosterior(
            mean=self.mean.to(device),
            deviations=self.deviations.to(device),
            head_rewards=self.head_rewards.to(device),
            head_scales=None if self.head_scales is None else self.head_scales.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginPosterior:
    """Belief about r(chosen) - r(rejected) of B pairs.

    Attributes:
        mean: (B,) reward units.
        variance: (B,) squared reward units, 0 for a point estimate.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def preference_prob(self, temperature: float = 1.0) -> torch.Tensor:
        r"""P(chosen preferred) under the posterior.

        Definition: \(\sigma(m / \sqrt{T^2 + \pi v / 8})\), the probit approximation of \(E\,\sigma(m'/T)\) under
        \(m' \sim N(m, v)\).

        Args:
            temperature: T, reward units.

        Returns:
            Shape (B,).

        Source: MacKay (1992), "The evidence framework applied to classification networks".
        """
        return torch.sigmoid(self.mean * torch.rsqrt(temperature**2 + math.pi / 8 * self.variance))


class RewardHead(nn.Module):
    """A reward model over hidden states: calling it with (n, L, D) states gives a `RewardPosterior`.

    Attributes:
        num_layers: L.
        hidden_size: D.
        num_heads: M.
    """

    num_layers: int
    hidden_size: int
    num_heads: int

    def forward(self, features_nLD: torch.Tensor) -> RewardPosterior:
        """Belief about the rewards of n responses.

        Args:
            features_nLD: hidden states at the end of the response, any floating dtype. Shape (n, L, D).

        Raises:
            ShapeError: features of another number of layers or width.
        """
        raise NotImplementedError

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> RewardHead:
        """The frozen head that `state_dict` describes.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: tensors that do not fit together.
        """
        raise NotImplementedError

    def check_features(self, features_nLD: torch.Tensor) -> None:
        """Refuse features of other layers or another model.

        Raises:
            ShapeError: naming both shapes.
        """
        if features_nLD.dim() != 3 or features_nLD.shape[1:] != (self.num_layers, self.hidden_size):
            raise ShapeError(
                f"features {tuple(features_nLD.shape)} must be (n, {self.num_layers}, {self.hidden_size}): "
                "the head was made for other layers or another model"
            )


def ensemble_posterior(head_rewards: torch.Tensor, head_scales: torch.Tensor | None = None) -> RewardPosterior:
    """Belief of M members that count alike.

    Args:
        head_rewards: shape (n, M), M at least 1.
        head_scales: standard deviation that each member states, or None. Shape (n, M).

    Returns:
        Mean over members, and deviations of the members from it over sqrt(M).

    Raises:
        ShapeError: rewards that are not (n, M), or scales of another shape.
    """
    if head_rewards.dim() != 2 or head_rewards.shape[1] < 1:
        raise ShapeError(f"head_rewards {tuple(head_rewards.shape)} must be (n, M) with at least one member")
    if head_scales is not None and head_scales.shape != head_rewards.shape:
        raise ShapeError(f"head_scales {tuple(head_scales.shape)} must be one per reward, {tuple(head_rewards.shape)}")
    mean_n = head_rewards.mean(-1)
    deviations_nM = (head_rewards - mean_n[:, None]) / math.sqrt(head_rewards.shape[1])
    return RewardPosterior(mean=mean_n, deviations=deviations_nM, head_rewards=head_rewards, head_scales=head_scales)


def concat_posteriors(parts: Sequence[RewardPosterior]) -> RewardPosterior:
    """Beliefs of one reward model about several groups of responses, one after the other.

    Args:
        parts: at least one.
    """
    scales = [part.head_scales for part in parts if part.head_scales is not None]
    return RewardPosterior(
        mean=torch.cat([part.mean for part in parts]),
        deviations=torch.cat([part.deviations for part in parts]),
        head_rewards=torch.cat([part.head_rewards for part in parts]),
        head_scales=torch.cat(scales) if scales else None,
    )


def margin_posterior(chosen: RewardPosterior, rejected: RewardPosterior) -> MarginPosterior:
    r"""Belief about the margins of B pairs, both halves by the same reward model.

    Definition: mean \(\bar r_c - \bar r_r\), variance \(|d_c - d_r|^2\): what both rewards share, such as an offset of
    a member, cancels.

    Args:
        chosen: of B responses.
        rejected: of B responses.

    Raises:
        ShapeError: the two are not alike.
    """
    if chosen.deviations.shape != rejected.deviations.shape:
        raise ShapeError(
            f"chosen {tuple(chosen.deviations.shape)} and rejected {tuple(rejected.deviations.shape)} posteriors must "
            "be of as many responses by one reward model"
        )
    return MarginPosterior(
        mean=chosen.mean - rejected.mean,
        variance=(chosen.deviations - rejected.deviations).square().sum(-1),
    )


def standardization(rewards_nM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Scale and shift that give all members the same mean and spread on one set of responses.

    Definition: \(a_m = \bar\sigma/\sigma_m\), \(c_m = \bar\mu - a_m\mu_m\), where \(\mu_m, \sigma_m\) are the mean and
    standard deviation of member m and the bars their means over members; the standardised reward is \(a_m r_m + c_m\).
    Members fitted to pairs alone are known up to a shift each; without this their minimum is that of the lowest shift.

    Args:
        rewards_nM: rewards of the members on pairs that none of them was fitted to. Shape (n, M), n at least 2.

    Returns:
        Scale and shift, both of shape (M,), float32; 1 and 0 for one member.

    Raises:
        DataError: fewer than two responses, or a member that gives all of them one reward.

    Source: Coste et al. (2023), arXiv:2310.02743, Section 3 (standardised before they are combined).
    """
    num_responses, num_members = rewards_nM.shape
    if num_members == 1:
        return torch.ones(1), torch.zeros(1)
    if num_responses < 2 or not bool((spread_M := rewards_nM.double().std(0)).gt(0).all()):
        raise DataError(
            f"members cannot be standardised on {num_responses} responses that one of them rewards alike; give more "
            "validation pairs or set reward.standardize=false"
        )
    mean_M = rewards_nM.double().mean(0)
    scale_M = spread_M.mean() / spread_M
    return scale_M.float(), (mean_M.mean() - scale_M * mean_M).float()
