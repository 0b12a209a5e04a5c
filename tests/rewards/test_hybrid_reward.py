from __future__ import annotations

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.reward import margin_loss
from raylign.rewards.hybrid import HybridReward


@pytest.fixture
def head() -> HybridReward:
    head = HybridReward(3, 5, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        head.probe_bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
        head.layer_mean.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
        head.layer_rms.copy_(torch.tensor([0.5, 2.0, 8.0]))
    return head


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_reward_is_the_gated_sum_of_layer_scores(head, features):
    """E1, one answer, layer and coordinate at a time."""
    for b, reward in enumerate(head(features)):
        scores = []
        for layer in range(3):
            z = [(features[b, layer, d] - head.layer_mean[layer, d]) / head.layer_rms[layer] for d in range(5)]
            scores.append(sum(head.probe_weight[layer, d] * z[d] for d in range(5)) + head.probe_bias[layer])
        gates = [1 / (1 + torch.exp(-sum(head.vote[row, k] * scores[k] for k in range(3)))) for row in range(3)]
        expected = sum(g * s for g, s in zip(gates, scores, strict=True))
        torch.testing.assert_close(reward, expected, rtol=0, atol=1e-12)


def test_without_a_vote_the_reward_is_half_the_sum_of_scores(head, features):
    with torch.no_grad():
        head.vote.zero_()
    torch.testing.assert_close(head(features), head.layer_scores(features).sum(-1) / 2, rtol=0, atol=1e-14)


def test_gradient_in_the_scores_is_the_derived_one(head, features):
    """dr/ds_l = g_l + sum_k s_k g_k (1 - g_k) V_kl; the probe bias shifts s_l alone, so its gradient is dr/ds_l."""
    head(features[:1]).sum().backward()
    scores = head.layer_scores(features[:1])[0].detach()
    gates = torch.sigmoid(head.vote.detach() @ scores)
    derived = gates + (scores * gates * (1 - gates)) @ head.vote.detach()
    torch.testing.assert_close(head.probe_bias.grad, derived, rtol=0, atol=1e-12)


def test_all_gradients_are_right(head, features):
    names = [name for name, _ in head.named_parameters()]

    def reward(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (features,))

    assert torch.autograd.gradcheck(reward, tuple(p.detach().clone().requires_grad_() for p in head.parameters()))


def test_an_optimiser_finds_the_probes_and_the_state_dict_the_normaliser(head, features):
    assert {name for name, _ in head.named_parameters()} == {"probe_weight", "probe_bias", "vote"}
    assert {"layer_mean", "layer_rms"} < set(head.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    margin_loss(head(features[:2]), head(features[2:]), margin_target=1.0).sum().backward()
    optimizer.step()
    for name, parameter in head.named_parameters():
        assert (parameter != before[name]).all(), name


def test_half_precision_features_are_widened_before_centring(head, features):
    far = (features + 1000).half()
    head.layer_mean += 1000
    torch.testing.assert_close(head(far), head(far.double()), rtol=0, atol=0)


def test_no_answers_give_no_rewards(head):
    assert head(torch.zeros(0, 3, 5)).shape == (0,)


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 3, 6), (3, 5)])
def test_features_of_another_model_are_refused(head, shape):
    with pytest.raises(ShapeError, match=r"must be \(B, 3, 5\)"):
        head(torch.zeros(shape))
