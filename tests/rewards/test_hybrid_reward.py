from __future__ import annotations

import pytest
import torch

from raylign.errors import ShapeError
from raylign.losses.reward import margin_loss
from raylign.rewards.hybrid import HybridReward, standardize


@pytest.fixture
def head() -> HybridReward:
    head = HybridReward(3, 5, generators=[torch.Generator().manual_seed(k) for k in range(2)]).double()
    with torch.no_grad():
        head.probe_bias.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.5, -0.4]]))
        head.layer_mean.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
        head.layer_rms.copy_(torch.tensor([0.5, 2.0, 8.0]))
        head.scale.copy_(torch.tensor([1.0, 0.7]))
        head.shift.copy_(torch.tensor([0.0, -0.3]))
    return head


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_reward_is_the_gated_sum_of_layer_scores(head, features):
    """E1, one answer, member, layer and coordinate at a time."""
    for b, rewards in enumerate(head(features).head_rewards):
        for m, reward in enumerate(rewards):
            scores = []
            for layer in range(3):
                z = [(features[b, layer, d] - head.layer_mean[layer, d]) / head.layer_rms[layer] for d in range(5)]
                probe, bias = head.probe_weight[m, layer], head.probe_bias[m, layer]
                scores.append(sum(probe[d] * z[d] for d in range(5)) + bias)
            gates = [1 / (1 + torch.exp(-sum(head.vote[m, row, k] * scores[k] for k in range(3)))) for row in range(3)]
            expected = sum(g * s for g, s in zip(gates, scores, strict=True))
            torch.testing.assert_close(reward, expected * head.scale[m] + head.shift[m], rtol=0, atol=1e-12)


def test_without_a_vote_the_reward_is_half_the_sum_of_scores(head, features):
    with torch.no_grad():
        head.vote.zero_()
    halves = head.layer_scores(features).sum(-1) / 2 * head.scale + head.shift
    torch.testing.assert_close(head.head_rewards(features), halves, rtol=0, atol=1e-14)


def test_gradient_in_the_scores_is_the_derived_one(head, features):
    """dr/ds_l = g_l + sum_k s_k g_k (1 - g_k) V_kl; the probe bias shifts s_l alone, so its gradient is dr/ds_l."""
    head.head_rewards(features[:1])[:, 0].sum().backward()
    scores = head.layer_scores(features[:1])[0, 0].detach()
    vote = head.vote[0].detach()
    gates = torch.sigmoid(vote @ scores)
    derived = gates + (scores * gates * (1 - gates)) @ vote
    torch.testing.assert_close(head.probe_bias.grad[0], derived, rtol=0, atol=1e-12)
    assert not head.probe_bias.grad[1].any()


def test_all_gradients_are_right(head, features):
    names = [name for name, _ in head.named_parameters()]

    def reward(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (features,)).head_rewards

    assert torch.autograd.gradcheck(reward, tuple(p.detach().clone().requires_grad_() for p in head.parameters()))


def test_an_optimiser_finds_the_probes_and_the_state_dict_the_normaliser(head, features):
    assert {name for name, _ in head.named_parameters()} == {"probe_weight", "probe_bias", "vote"}
    assert {"layer_mean", "layer_rms", "scale", "shift"} < set(head.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    margin_loss(head(features[:2]).mean, head(features[2:]).mean, margin_target=1.0).sum().backward()
    optimizer.step()
    for name, parameter in head.named_parameters():
        assert (parameter != before[name]).all(), name


def test_half_precision_features_are_widened_before_centring(head, features):
    far = (features + 1000).half()
    head.layer_mean += 1000
    assert torch.equal(head.head_rewards(far), head.head_rewards(far.double()))


def test_no_answers_give_no_rewards(head):
    assert head(torch.zeros(0, 3, 5)).head_rewards.shape == (0, 2)


@pytest.mark.parametrize("shape", [(4, 2, 5), (4, 3, 6), (3, 5)])
def test_features_of_another_model_are_refused(head, shape):
    with pytest.raises(ShapeError, match=r"must be \(n, 3, 5\)"):
        head(torch.zeros(shape))


def test_selected_members_are_those_of_the_whole(head, features):
    torch.testing.assert_close(head.select([1]).head_rewards(features)[:, 0], head.head_rewards(features)[:, 1])
    with pytest.raises(ShapeError, match="must be some of 0 to 1"):
        head.select([2])


def test_standardised_members_share_mean_and_spread_and_keep_their_order(head):
    calibration = torch.randn(50, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        head.scale.fill_(1)
        head.shift.zero_()
        head.probe_bias[1] += 10
        before = head.head_rewards(calibration)
        standardize(head, calibration)
        after = head.head_rewards(calibration)
    torch.testing.assert_close(after.mean(0), before.mean().expand(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.std(0), before.std(0).mean().expand(2), rtol=1e-5, atol=1e-6)
    assert torch.equal(after.argsort(0), before.argsort(0))


def test_one_member_is_left_as_it_is(head, features):
    alone = head.select([0])
    before = alone.head_rewards(features)
    standardize(alone, features)
    assert torch.equal(alone.head_rewards(features), before)
