"""The formulas against the spec's numbers, against counting by hand, and against torch's flop counter.

The counter sees what the eager kernels compute: attention over all T x T pairs, masked or not. The formula counts the
T (T + 1) / 2 pairs that a causal model needs, so the two are compared with the dense number of pairs put into the same
formula. That comparison is exact, without any tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from raylign.cost.flops import ModelShape, Work, backward_factor, head_flops, pair_work, sequence_work
from raylign.cost.shapes import forward_flops, shape_of
from raylign.data.packing import pack_pairs
from raylign.errors import ModelError
from raylign.models.forward import PolicyForward
from raylign.types import TokenizedPair

# peft 0.21 and transformers 5.20 know the old name only
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
SPEC = ModelShape(num_body_parameters=600, num_head_parameters=400, num_layers=2, width=8)
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(model_type: str = "llama", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | options))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_numbers_of_the_spec():
    assert SPEC.forward(10) == 23_520
    assert SPEC.decode(6, 4) == 14_880
    assert head_flops(32, 4096) == 264_288
    assert head_flops(2, 8) == 46


def test_forward_is_the_sum_of_its_tokens_decoded_one_by_one():
    assert SPEC.forward(10) == sum(SPEC.decode(1, prefix) for prefix in range(10))


def test_generation_needs_no_logits_of_the_prompt():
    assert SPEC.generate(6, 4) == SPEC.forward(10) - 4 * 2 * SPEC.num_head_parameters


def visible(prompt: int, chosen: int, rejected: int, *, is_shared: bool) -> Work:
    """Count by walking over queries."""
    pairs = tokens = 0
    if is_shared:
        pairs += sum(q + 1 for q in range(prompt))
        tokens += prompt
    for response in (chosen, rejected):
        first = prompt if is_shared else 0
        pairs += sum(q + 1 for q in range(first, prompt + response))
        tokens += prompt + response - first
    return Work(tokens=tokens, attention_pairs=pairs, scored_tokens=chosen + rejected)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("lengths", [(2, 1, 1), (5, 3, 7), (1, 4, 2)])
def test_work_of_a_pair_counts_what_each_query_sees(lengths, is_shared):
    assert pair_work(*lengths, is_shared=is_shared) == visible(*lengths, is_shared=is_shared)


def test_work_of_a_pair_is_what_the_mask_of_the_pack_shows():
    ids = np.arange(3, 18, dtype=np.int32)
    pair = TokenizedPair(prompt_ids=ids[:6], chosen_ids=ids[6:10], rejected_ids=ids[10:])
    batch = pack_pairs([pair], layout="shared", pad_token_id=0)
    num_padding = batch.input_ids.numel() - batch.num_real_tokens  # each sees itself
    work = pair_work(6, 4, 5, is_shared=True)
    assert work.tokens == batch.num_real_tokens
    assert work.attention_pairs == int(batch.attention_mask.sum()) - num_padding
    assert work.scored_tokens == len(batch.score_labels)


@pytest.mark.parametrize("num_tokens", [1, 17])
def test_forward_equals_the_counter_over_dense_attention(num_tokens):
    model = tiny()
    shape = shape_of(model)
    ids = torch.arange(num_tokens)[None]
    with torch.no_grad():
        measured = counted(lambda: model(ids))
    dense = Work(tokens=num_tokens, attention_pairs=num_tokens**2, scored_tokens=num_tokens)
    assert measured == shape.forward_work(dense)
    upper_half = num_tokens * (num_tokens - 1) // 2
    assert measured - shape.forward(num_tokens) == 4 * shape.num_layers * shape.width * upper_half


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_forward_of_a_pack_equals_the_counter(layout):
    """The head runs on scored tokens alone; rows cost their slots and their dense attention."""
    model = tiny()
    ids = np.arange(3, 43, dtype=np.int32)
    pairs = [
        TokenizedPair(prompt_ids=ids[:9], chosen_ids=ids[9:14], rejected_ids=ids[14:21]),
        TokenizedPair(prompt_ids=ids[21:25], chosen_ids=ids[25:31], rejected_ids=ids[31:34]),
    ]
    batch = pack_pairs(pairs, layout=layout, pad_token_id=0)
    rows, length = batch.input_ids.shape
    dense = Work(tokens=rows * length, attention_pairs=rows * length**2, scored_tokens=len(batch.score_labels))
    with torch.no_grad():
        measured = counted(lambda: PolicyForward(model)(batch))
    assert measured == shape_of(model).forward_work(dense)


def test_backward_of_all_weights_is_two_forwards():
    model = tiny()
    ids = torch.arange(17)[None]
    forward = counted(lambda: model(ids))
    both = counted(lambda: model(ids).logits.sum().backward())
    assert both - forward == backward_factor(is_adapter=False, has_checkpointing=False) * forward


def test_backward_through_a_frozen_base_is_about_one_forward():
    """Attention has no frozen factor and costs two; with adapters of rank 1 the whole stays within a quarter."""
    model = get_peft_model(tiny(), LoraConfig(r=1, target_modules=["q_proj", "v_proj"]))
    ids = torch.arange(17)[None]
    forward = counted(lambda: model(input_ids=ids))
    both = counted(lambda: model(input_ids=ids).logits.sum().backward())
    factor = backward_factor(is_adapter=True, has_checkpointing=False)
    assert (both - forward) / forward == pytest.approx(factor, rel=0.25)


def test_checkpointing_adds_one_forward_of_the_layers():
    """But for the head, which is not inside a layer, and the last product of each layer, where torch stops early."""
    model = tiny()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(17)[None]
    forward = counted(lambda: model(ids))
    both = counted(lambda: model(ids).logits.sum().backward())
    head, last_products = shape_of(model).num_head_parameters, 3 * 48 * 32
    again = forward - 2 * 17 * (head + last_products)
    assert both - forward == 2 * forward + again
    assert backward_factor(is_adapter=False, has_checkpointing=True) == 3
    assert backward_factor(is_adapter=True, has_checkpointing=True) == 2


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 8}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_shape_from_the_configuration_is_that_of_the_model(family, options):
    model = tiny(family, **options)
    shape = shape_of(model)
    assert ModelShape.from_config(model.config.to_dict()) == shape
    assert shape.num_head_parameters == 101 * 32


def test_adapters_count_and_embeddings_do_not():
    plain = shape_of(tiny())
    adapted = shape_of(get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"])))
    assert adapted.num_body_parameters - plain.num_body_parameters == 3 * 2 * (32 + 4 * 12)
    assert adapted.num_head_parameters == plain.num_head_parameters


def test_experts_count_as_often_as_a_token_visits_them():
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_hidden_layers": 1}
    shape = shape_of(tiny("mixtral", **options))
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 32 * 48
    assert shape.num_body_parameters == attention + router + 2 * expert


def test_head_width_follows_from_the_hidden_size_when_it_is_not_given():
    config = tiny(head_dim=8).config.to_dict()
    assert ModelShape.from_config({**config, "head_dim": None}) == ModelShape.from_config(config)


def test_forward_flops_are_those_of_the_shape():
    assert forward_flops(tiny())(sequence_work(10)) == shape_of(tiny()).forward(10)


def test_a_model_that_cannot_be_counted_says_so_once(caplog):
    model = tiny()
    model.experts = torch.nn.Parameter(torch.zeros(4, 2, 3))
    assert forward_flops(model)(sequence_work(10)) == 0
    assert "no num_experts_per_tok" in caplog.text


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2"),
        ({}, "model_type=None"),
        ({"model_type": "llama", "hidden_size": 8}, "intermediate_size"),
    ],
)
def test_a_shape_is_not_guessed(config, told):
    with pytest.raises(ModelError, match=told):
        ModelShape.from_config(config)


def test_an_empty_sequence_costs_nothing():
    assert SPEC.forward_work(sequence_work(0)) == 0
