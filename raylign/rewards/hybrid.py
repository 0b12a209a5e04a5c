r"""The hybrid layer-mixture reward: one linear probe per transformer layer and a gate that votes over layers.

A module holds M of them at once, so that an ensemble costs one batched product; the published reward is M = 1.

Shape letters: n responses, M members, L layers, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raylign.errors import ShapeError
from raylign.rewards.posterior import RewardHead, RewardPosterior, ensemble_posterior, standardization


class HybridReward(RewardHead):
    r"""Rewards of a response by M members, from the hidden states at its end-of-response token.

    Definition, for each member: \(z_l = (h_l - \mu_l)/\rho_l\), \(s_l = w_l \cdot z_l + b_l\), \(g = \sigma(V s)\),
    \(r = a \sum_l g_l s_l + c\).

    Unlike the released code, the probes are registered parameters, so that an optimiser updates them, and the states
    are normalised per layer, because their norms differ by a factor of thirty between the layers of one model. The
    members of an ensemble have own probes and votes, and a fixed scale a and shift c, 1 and 0 unless standardised.

    Args:
        num_layers: L.
        hidden_size: D.
        generators: one per member, M of them; source of the random start: probes uniform in +-1/sqrt(D), vote uniform
            in +-1/sqrt(L). None starts one member from torch's global generator.

    Attributes:
        probe_weight: \(w\), parameter, shape (M, L, D).
        probe_bias: \(b\), parameter, shape (M, L).
        vote: \(V\), parameter, shape (M, L, L), no bias.
        layer_mean: \(\mu\), buffer, shape (L, D).
        layer_rms: \(\rho\), buffer, shape (L,).
        scale: \(a\), buffer, shape (M,).
        shift: \(c\), buffer, shape (M,), reward units.

    Source: released code of arXiv:2503.10093 (E1 in docs/math.md).
    """

    layer_mean: torch.Tensor
    layer_rms: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self, num_layers: int, hidden_size: int, *, generators: Sequence[torch.Generator] | None = None
    ) -> None:
        super().__init__()
        starts = [
            (
                _uniform(num_layers, hidden_size, hidden_size, source),
                _uniform(num_layers, num_layers, num_layers, source),
            )
            for source in ([None] if generators is None else generators)
        ]
        num_heads = len(starts)
        self.probe_weight = nn.Parameter(torch.stack([probe for probe, _ in starts]))
        self.probe_bias = nn.Parameter(torch.zeros(num_heads, num_layers))
        self.vote = nn.Parameter(torch.stack([vote for _, vote in starts]))
        self.register_buffer("layer_mean", torch.zeros(num_layers, hidden_size))
        self.register_buffer("layer_rms", torch.ones(num_layers))
        self.register_buffer("scale", torch.ones(num_heads))
        self.register_buffer("shift", torch.zeros(num_heads))
        self.num_heads, self.num_layers, self.hidden_size = num_heads, num_layers, hidden_size

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> HybridReward:
        """The frozen members that `state_dict` describes, see `RewardHead.from_state`."""
        num_heads, num_layers, width = state["probe_weight"].shape
        head = cls(num_layers, width, generators=[torch.Generator() for _ in range(num_heads)])
        head.to(state["probe_weight"].dtype)
        head.load_state_dict(state)
        return head.requires_grad_(False)

    def layer_scores(self, features_nLD: torch.Tensor) -> torch.Tensor:
        """Score of each layer's probe.

        Args:
            features_nLD: hidden states, any floating dtype. Shape (n, L, D).

        Returns:
            Scores in reward units. Shape (n, M, L), dtype of the parameters.

        Raises:
            ShapeError: features of another number of layers or width.
        """
        self.check_features(features_nLD)
        # Centred before the product: the mean state is far longer than what tells responses apart.
        centred_nLD = features_nLD.to(self.probe_weight.dtype) - self.layer_mean
        products_LnM = centred_nLD.transpose(0, 1) @ self.probe_weight.permute(1, 2, 0)
        return products_LnM.permute(1, 2, 0) / self.layer_rms + self.probe_bias

    def head_rewards(self, features_nLD: torch.Tensor) -> torch.Tensor:
        """Reward by each member, E1.

        Args:
            features_nLD: hidden states, any floating dtype. Shape (n, L, D).

        Returns:
            Rewards. Shape (n, M), dtype of the parameters.

        Raises:
            ShapeError: features of another number of layers or width.
        """
        scores_nML = self.layer_scores(features_nLD)
        gates_MnL = torch.sigmoid(scores_nML.transpose(0, 1) @ self.vote.transpose(1, 2))
        return (gates_MnL.transpose(0, 1) * scores_nML).sum(-1) * self.scale + self.shift

    def forward(self, features_nLD: torch.Tensor) -> RewardPosterior:
        """Members' rewards, their mean and their spread.

        Args:
            features_nLD: hidden states, any floating dtype. Shape (n, L, D).

        Raises:
            ShapeError: features of another number of layers or width.
        """
        return ensemble_posterior(self.head_rewards(features_nLD))

    def select(self, heads: Sequence[int]) -> HybridReward:
        """The ensemble of some members, for example of the first few.

        Raises:
            ShapeError: no member, or one that is not there.
        """
        if not heads or not set(heads) <= set(range(self.num_heads)):
            raise ShapeError(f"members {list(heads)} must be some of 0 to {self.num_heads - 1}")
        common = {"layer_mean", "layer_rms"}
        state = {name: value if name in common else value[list(heads)] for name, value in self.state_dict().items()}
        return HybridReward.from_state(state).to(self.probe_weight.device)


def standardize(head: HybridReward, calibration: torch.Tensor) -> None:
    """Give all members the same mean and spread on one set of responses, in place; see `standardization`.

    Args:
        head: members, not standardised yet; with one member nothing changes.
        calibration: hidden states of at least two responses that are not all alike. Shape (n, L, D).
    """
    if head.num_heads == 1:
        return
    with torch.no_grad():
        rewards_nM = torch.cat([head.head_rewards(block) for block in torch.split(calibration, 512)])
        head.scale, head.shift = standardization(rewards_nM)


def _uniform(rows: int, columns: int, bound_of: int, generator: torch.Generator | None) -> torch.Tensor:
    bound = 1 / math.sqrt(bound_of)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
