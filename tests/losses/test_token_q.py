"""Values from a policy's logits or probabilities, whole and in chunks."""

from __future__ import annotations

import math

import pytest
import torch

from raylign.errors import ConfigError
from raylign.losses.logprobs import token_logprobs
from raylign.losses.token_q import policy_q, token_q


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_from_logits_at_scale_one_it_is_the_log_probability():
    logits, labels = noise(7, 11), torch.arange(7)
    expected = logits.log_softmax(-1)[labels, labels]
    torch.testing.assert_close(policy_q(logits, labels, q_from="logits", logit_scale=1.0), expected, rtol=0, atol=1e-12)
    hidden, head = noise(7, 3), noise(11, 3, seed=1)
    assert torch.equal(
        token_q(hidden, head, labels, q_from="logits", logit_scale=1.0), token_logprobs(hidden, head, labels)
    )


@pytest.mark.parametrize("logit_scale", [1.0, 20.0])
def test_from_probabilities_it_spreads_by_the_scale_times_their_range(logit_scale):
    logits = noise(1, 50)
    every = torch.cat([policy_q(logits, torch.tensor([y]), q_from="probs", logit_scale=logit_scale) for y in range(50)])
    probs = logits.softmax(-1)
    spread = logit_scale * (probs.max() - probs.min())
    torch.testing.assert_close(every.max() - every.min(), spread, rtol=0, atol=1e-12)
    torch.testing.assert_close(every.exp().sum(), torch.ones_like(spread), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("logit_scale", "low", "high"), [(1.0, -10.83, -9.8), (100.0, -100.0, 0.0)])
def test_over_a_real_vocabulary_probabilities_need_a_large_scale(logit_scale, low, high):
    """One peaked distribution over 50,257 tokens: at scale 1 the likeliest and the rarest token differ by at most 1."""
    logits = 4 * noise(1, 50_257)
    order = logits[0].argsort()
    ends = torch.cat(
        [policy_q(logits, order[place, None], q_from="probs", logit_scale=logit_scale) for place in (0, -1)]
    )
    assert low <= ends[0] <= ends[1] <= high
    assert ends[0] >= -math.log(50_257) - logit_scale
    assert (ends[1] - ends[0]).item() == pytest.approx(logit_scale * logits.softmax(-1).max().item(), rel=1e-6)


@pytest.mark.parametrize("q_from", ["logits", "probs"])
@pytest.mark.parametrize("logit_softcap", [None, 2.0])
@pytest.mark.parametrize("num_tokens", [0, 3, 8])
def test_chunks_give_the_values_and_gradients_of_the_whole(q_from, logit_softcap, num_tokens):
    hidden, head, bias = (
        part.requires_grad_() for part in (noise(num_tokens, 4), noise(6, 4, seed=1), noise(6, seed=2))
    )
    labels = torch.arange(num_tokens) % 6
    logits = hidden @ head.T + bias
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    expected = policy_q(logits, labels, q_from=q_from, logit_scale=3.0)
    actual = token_q(
        hidden,
        head,
        labels,
        q_from=q_from,
        logit_scale=3.0,
        chunk_tokens=3,
        bias=bias,
        logit_softcap=logit_softcap,
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    upstream = noise(num_tokens, seed=3)
    for found, wanted in zip(
        *(torch.autograd.grad(value, (hidden, head, bias), upstream) for value in (actual, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_another_source_is_named():
    with pytest.raises(ConfigError, match=r"q_from='q_head' must be logits or probs"):
        policy_q(noise(2, 3), torch.tensor([0, 1]), q_from="q_head", logit_scale=1.0)
