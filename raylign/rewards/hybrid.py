r"""The hybrid layer-mixture reward: one linear probe per transformer layer and a gate that votes over layers.

Shape letters: B responses, L layers, D hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from raylign.errors import ShapeError


class HybridReward(nn.Module):
    r"""Reward of a response from the hidden states at its end-of-response token.

    Definition: \(z_l = (h_l - \mu_l)/\rho_l\), \(s_l = w_l \cdot z_l + b_l\), \(g = \sigma(V s)\), \(r = \sum_l g_l
    s_l\).

    Unlike the released code, the probes are registered parameters, so that an optimiser updates them, and the states
    are normalised per layer, because their norms differ by a factor of thirty between the layers of one model.

    Args:
        num_layers: L.
        hidden_size: D.
        generator: source of the random start: probes uniform in +-1/sqrt(D), vote uniform in +-1/sqrt(L).

    Attributes:
        probe_weight: \(w\), parameter, shape (L, D).
        probe_bias: \(b\), parameter, shape (L,).
        vote: \(V\), parameter, shape (L, L), no bias.
        layer_mean: \(\mu\), buffer, shape (L, D).
        layer_rms: \(\rho\), buffer, shape (L,).

    Source: released code of arXiv:2503.10093 (E1 in docs/math.md).
    """

    layer_mean: torch.Tensor
    layer_rms: torch.Tensor

    def __init__(self, num_layers: int, hidden_size: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.probe_weight = nn.Parameter(_uniform(num_layers, hidden_size, bound_of=hidden_size, generator=generator))
        self.probe_bias = nn.Parameter(torch.zeros(num_layers))
        self.vote = nn.Parameter(_uniform(num_layers, num_layers, bound_of=num_layers, generator=generator))
        self.register_buffer("layer_mean", torch.zeros(num_layers, hidden_size))
        self.register_buffer("layer_rms", torch.ones(num_layers))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.probe_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.probe_weight.shape[1]

    def layer_scores(self, features_BLD: torch.Tensor) -> torch.Tensor:
        """Score of each layer's probe.

        Args:
            features_BLD: hidden states, any floating dtype. Shape (B, L, D).

        Returns:
            Scores in reward units. Shape (B, L), dtype of the parameters.

        Raises:
            ShapeError: features of another number of layers or width.
        """
        if features_BLD.dim() != 3 or features_BLD.shape[1:] != self.probe_weight.shape:
            raise ShapeError(
                f"features {tuple(features_BLD.shape)} must be (B, {self.num_layers}, {self.hidden_size}): "
                "the head was made for other layers or another model"
            )
        # Centred before the product: the mean state is far longer than what tells responses apart.
        centred_BLD = features_BLD.to(self.probe_weight.dtype) - self.layer_mean
        return (centred_BLD * self.probe_weight).sum(-1) / self.layer_rms + self.probe_bias

    def forward(self, features_BLD: torch.Tensor) -> torch.Tensor:
        """Reward of each response, E1.

        Args:
            features_BLD: hidden states, any floating dtype. Shape (B, L, D).

        Returns:
            Rewards. Shape (B,), dtype of the parameters.

        Raises:
            ShapeError: features of another number of layers or width.
        """
        scores_BL = self.layer_scores(features_BLD)
        gates_BL = torch.sigmoid(scores_BL @ self.vote.T)
        return (gates_BL * scores_BL).sum(-1)


def _uniform(rows: int, columns: int, *, bound_of: int, generator: torch.Generator | None) -> torch.Tensor:
    bound = 1 / math.sqrt(bound_of)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
