r"""Gaussian reward heads: M linear heads that each state a mean and a standard deviation of the reward.

Shape letters: n responses, M heads, L layers, D hidden width, F = L D inputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from raylign.rewards.posterior import RewardHead, RewardPosterior, ensemble_posterior


class GaussianHeads(RewardHead):
    r"""Stage 2 of BRME: heads over the normalised states of all layers, all in one product.

    Definition, for each head: \(z_l = (h_l - \mu_l)/\rho_l\), mean \(\sum_l w_l \cdot z_l + b\), standard deviation
    \(\mathrm{softplus}(\sum_l v_l \cdot z_l + c) + \sigma_{floor}\).

    What a head's sigma means depends on its loss (see `fit_gaussian`); it is no sign of unfamiliar input. The heads'
    disagreement is.

    Args:
        num_layers: L.
        hidden_size: D.
        num_heads: M.
        sigma_floor: smallest standard deviation, reward units.

    Attributes:
        weight_mean: \(w\), parameter, shape (M, L, D).
        bias_mean: \(b\), parameter, shape (M,).
        weight_scale: \(v\), parameter, shape (M, L, D).
        bias_scale: \(c\), parameter, shape (M,).
        layer_mean: \(\mu\), buffer, shape (L, D).
        layer_rms: \(\rho\), buffer, shape (L,).
        sigma_floor: buffer, shape ().

    Source: arXiv:2409.15360; linear heads on the states of several layers are ours.
    """

    layer_mean: torch.Tensor
    layer_rms: torch.Tensor
    sigma_floor: torch.Tensor

    def __init__(self, num_layers: int, hidden_size: int, *, num_heads: int, sigma_floor: float = 1e-3) -> None:
        super().__init__()
        self.weight_mean = nn.Parameter(torch.zeros(num_heads, num_layers, hidden_size))
        self.bias_mean = nn.Parameter(torch.zeros(num_heads))
        self.weight_scale = nn.Parameter(torch.zeros(num_heads, num_layers, hidden_size))
        self.bias_scale = nn.Parameter(torch.zeros(num_heads))
        self.register_buffer("layer_mean", torch.zeros(num_layers, hidden_size))
        self.register_buffer("layer_rms", torch.ones(num_layers))
        self.register_buffer("sigma_floor", torch.tensor(float(sigma_floor)))
        self.num_heads, self.num_layers, self.hidden_size = num_heads, num_layers, hidden_size

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> GaussianHeads:
        """The frozen heads that `state_dict` describes.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: tensors that do not fit together.
        """
        num_heads, num_layers, width = state["weight_mean"].shape
        heads = cls(num_layers, width, num_heads=num_heads)
        heads.load_state_dict(state)
        return heads.requires_grad_(False)

    def inputs(self, features_nLD: torch.Tensor) -> torch.Tensor:
        """Normalised states of all layers, side by side.

        Args:
            features_nLD: hidden states, any floating dtype. Shape (n, L, D).

        Returns:
            Shape (n, F), dtype of the parameters.

        Raises:
            ShapeError: features of another number of layers or width.
        """
        self.check_features(features_nLD)
        centred_nLD = features_nLD.to(self.weight_mean.dtype) - self.layer_mean
        return (centred_nLD / self.layer_rms[:, None]).flatten(1)

    def moments(self, inputs_nF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each head states, from `inputs`.

        Args:
            inputs_nF: shape (n, F).

        Returns:
            Means and standard deviations, each (n, M), reward units.
        """
        weight_FK = torch.cat([self.weight_mean, self.weight_scale]).flatten(1).T
        outputs_nK = torch.addmm(torch.cat([self.bias_mean, self.bias_scale]), inputs_nF, weight_FK)
        mu_nM, rho_nM = outputs_nK.chunk(2, dim=1)
        return mu_nM, F.softplus(rho_nM) + self.sigma_floor

    def forward(self, features_nLD: torch.Tensor) -> RewardPosterior:
        """Belief of M heads that count alike, with the standard deviation that each states."""
        return ensemble_posterior(*self.moments(self.inputs(features_nLD)))


def share_at_floor(head_scales: torch.Tensor, sigma_floor: torch.Tensor | float) -> torch.Tensor:
    """How many of each head's standard deviations have collapsed: those within twice the floor.

    Args:
        head_scales: shape (n, M), n at least 1.
        sigma_floor: reward units.

    Returns:
        Share in [0, 1]. Shape (M,). Above a half, the head's sigma tells nothing of its reward.
    """
    return (head_scales <= 2 * sigma_floor).double().mean(0)
