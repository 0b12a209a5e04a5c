"""Scoring of given answers against the plain forward of the model, one answer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.assets import asset_path
from raylign.errors import DataError, ModelError
from raylign.evaluation.generation import encode_prompt
from raylign.evaluation.scoring import RewardScorer, StatesReward, score_responses
from raylign.models.forward import PolicyForward
from raylign.models.loading import load_tokenizer
from raylign.rewards.posterior import RewardHead, ensemble_posterior
from raylign.types import Message

# two prompts, three answers to the first (an odd number) and one to the second, interleaved
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7]]
RESPONSES = [[10, 11], [12, 13, 14], [15], [10, 11]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def plain(model, prompt, response):
    with torch.no_grad():
        output = model(torch.tensor([prompt + response]), output_hidden_states=True)
    logps = output.logits[0].log_softmax(-1)
    total = sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))
    return total, torch.stack([state[0, -1] for state in output.hidden_states[1:]])


@pytest.mark.parametrize("batch_tokens", [12, 4096])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_logps_and_states_equal_the_plain_forward(model, layout, batch_tokens):
    scored = score_responses(
        PolicyForward(model),
        PROMPTS,
        RESPONSES,
        layout=layout,
        pad_token_id=0,
        batch_tokens=batch_tokens,
        layers=(1, 3),
    )
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logp, states = plain(model, prompt, response)
        assert scored.logps[index] == pytest.approx(logp, abs=1e-4)
        torch.testing.assert_close(scored.states[index], states[[0, 2]], atol=1e-4, rtol=1e-4)
    assert scored.lengths.tolist() == [2, 3, 1, 2]
    np.testing.assert_allclose(scored.mean_logps, scored.logps / [2, 3, 1, 2])


def test_empty_answers_are_refused(model):
    with pytest.raises(DataError, match="1 of them empty"):
        score_responses(PolicyForward(model), [[1]], [[]], layout="shared", pad_token_id=0)


def test_reward_reads_the_state_at_the_end_token_and_obeys_its_rule(model):
    tokenizer = load_tokenizer(asset_path("tiny_chat"))

    class Head(RewardHead):
        def __init__(self):
            super().__init__()
            self.register_buffer("signs", torch.tensor([1.0, 3.0]))

        def forward(self, states):
            return ensemble_posterior(states[:, 0, 3, None] * self.signs)

    scorer = RewardScorer(
        PolicyForward(model),
        tokenizer,
        StatesReward(Head(), (2,)),
        rule=lambda belief: belief.head_rewards.amin(-1),
        layout="shared",
    )
    prompt = (Message(role="user", content="Hi"),)
    rewards = scorer([prompt, prompt], ["Hello there", ""])
    for reward, text in zip(rewards, ["Hello there", ""], strict=True):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        _, states = plain(model, encode_prompt(tokenizer, prompt), ids)
        assert reward == pytest.approx(min(states[1, 3].item() * sign for sign in (1, 3)), abs=1e-4)


def test_rewards_that_are_not_finite_are_refused():
    class Broken(RewardHead):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))

        def forward(self, states):
            return ensemble_posterior(states[:, 0, :2])

    states = torch.ones(3, 1, 4)
    states[1, 0, 1] = torch.nan
    with pytest.raises(ModelError, match=r"1 of 3 rewards are not finite"):
        StatesReward(Broken(), (2,))([], [], states)
