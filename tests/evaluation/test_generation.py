"""Sampling: reproducible, independent of batches, and drawn from the model's distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.assets import asset_path
from raylign.errors import ModelError
from raylign.evaluation.generation import GumbelNoise, encode_prompt, generate_responses
from raylign.models.loading import load_tokenizer
from raylign.types import Message

TEXTS = ["Hi", "How do I bake bread without an oven?", "Name three rivers.", "Why is the sky blue at noon?"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(asset_path("tiny_chat"))


@pytest.fixture(scope="module")
def model(tokenizer):
    """Large random weights, so that the answer depends on the whole prompt and rounding turns no tie."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).train()


def conversations(texts=TEXTS):
    return [(Message(role="user", content=text),) for text in texts]


def sample(model, tokenizer, prompts=None, **options):
    values = {"max_new_tokens": 8, "temperature": 1.0, "batch_size": 4, "seed": 0, **options}
    return generate_responses(model, tokenizer, conversations() if prompts is None else prompts, **values)


def test_answers_do_not_depend_on_batches_or_order(model, tokenizer):
    together = sample(model, tokenizer)
    alone = sample(model, tokenizer, batch_size=1)
    backwards = sample(model, tokenizer, conversations(TEXTS[::-1]), batch_size=3)[::-1]
    assert [a.response_ids for a in together] == [a.response_ids for a in alone]
    assert [a.response_ids for a in together] == [a.response_ids for a in backwards]
    assert [a.response_ids for a in together] != [a.response_ids for a in sample(model, tokenizer, seed=1)]
    assert [a.prompt_index for a in together] == [0, 1, 2, 3]


def test_global_generator_and_mode_are_left_alone(model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample(model, tokenizer)
    assert torch.equal(torch.rand(1), expected)
    assert model.training


def test_greedy_equals_the_models_own_argmax(model, tokenizer):
    """One prompt, step by step without cache or padding."""
    answer = sample(model, tokenizer, temperature=0.0)[1]
    ids = encode_prompt(tokenizer, conversations()[1])
    assert list(answer.prompt_ids) == ids
    model.eval()
    for token in answer.response_ids:
        assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)
    model.train()


def test_end_token_ends_an_answer(model, tokenizer, monkeypatch):
    """The third token of the uncut greedy answer is made an end token."""
    uncut = sample(model, tokenizer, temperature=0.0)[0]
    assert not uncut.reached_end
    end = uncut.response_ids[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    cut = sample(model, tokenizer, temperature=0.0)[0]
    assert cut.reached_end
    assert cut.response_ids == uncut.response_ids[: uncut.response_ids.index(end) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_stored_with_the_checkpoint_do_not_bend_the_distribution(model, tokenizer, monkeypatch, temperature):
    plain = sample(model, tokenizer, temperature=temperature, max_new_tokens=24)
    stored = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "top_k": 2, "min_new_tokens": 20}
    for name, value in stored.items():
        monkeypatch.setattr(model.generation_config, name, value)
    bent = sample(model, tokenizer, temperature=temperature, max_new_tokens=24)
    assert [a.response_ids for a in bent] == [a.response_ids for a in plain]
    assert model.generation_config.repetition_penalty == 3.0


def test_samples_of_a_prompt_differ_and_stand_together(model, tokenizer):
    answers = sample(model, tokenizer, num_samples=2, batch_size=3)
    assert [(a.prompt_index, a.sample_index) for a in answers] == [(i, s) for i in range(4) for s in (0, 1)]
    assert all(
        first.response_ids != second.response_ids for first, second in zip(answers[::2], answers[1::2], strict=True)
    )


def test_gumbel_noise_samples_the_softmax():
    """20,000 draws of softmax([0, 1, 2] / 2): standard error 0.0035."""
    noise = GumbelNoise([7], temperature=2.0, device=torch.device("cpu"))
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    draws = [noise(torch.zeros(1, 1), logits).argmax(-1).item() for _ in range(20_000)]
    expected = torch.softmax(logits[0] / 2, -1).numpy()
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / len(draws), expected, atol=0.014)


def test_prompt_that_does_not_fit_is_an_error(model, tokenizer):
    with pytest.raises(ModelError, match=r"256.*max_new_tokens"):
        sample(model, tokenizer, max_new_tokens=250)


def test_no_prompts(model, tokenizer):
    assert sample(model, tokenizer, []) == []
