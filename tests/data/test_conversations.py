"""Prompts back to conversations: exact for templates in use, refused where the ids say something else."""

from __future__ import annotations

import pytest

from raylign.assets import asset_path
from raylign.data.conversations import ConversationReader
from raylign.errors import ModelError
from raylign.evaluation.generation import encode_prompt
from raylign.models.loading import load_tokenizer
from raylign.types import Message

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|system|>Be kind.<eos>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
TRANSCRIPT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}\n\nHuman: {% else %}\n\nAssistant: {% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}\n\nAssistant:{% endif %}"
)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ["user", "assistant"] * len(contents)
    head = () if system is None else (Message(role="system", content=system),)
    return head + tuple(Message(role=role, content=text) for role, text in zip(roles, contents, strict=False))


CONVERSATIONS = [turns("Hi"), turns("a [b]\n\n c", "<ok>", "d"), turns("x", "y", "z", "é", "w?")]


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM, BRACKETS])
def test_prompts_are_read_back(make_tokenizer, template):
    tokenizer = make_tokenizer() if template is None else make_tokenizer(template)
    reader = ConversationReader(tokenizer)
    for conversation in CONVERSATIONS:
        assert reader.conversation(encode_prompt(tokenizer, conversation)) == conversation


@pytest.mark.parametrize("template", [None, DEFAULT_SYSTEM])
def test_system_turns_are_read_back(make_tokenizer, template):
    tokenizer = make_tokenizer() if template is None else make_tokenizer(template)
    conversation = turns("Hi", "Ho", "Hm", system="Be terse.")
    assert ConversationReader(tokenizer).conversation(encode_prompt(tokenizer, conversation)) == conversation


def test_the_embedded_policy_is_read_back():
    tokenizer = load_tokenizer(asset_path("tiny_chat"))
    reader = ConversationReader(tokenizer)
    for conversation in [turns("How do I pick a lock?"), turns(" Tell me ", "no\n", "please")]:
        assert reader.conversation(encode_prompt(tokenizer, conversation)) == conversation


def test_a_template_without_special_tokens_whose_generation_prompt_differs(make_tokenizer):
    """The turn marker ends with a space, the generation prompt does not: read off separately."""
    tokenizer = make_tokenizer(TRANSCRIPT)
    conversation = turns("Hi", "Ho", "Hm")
    assert ConversationReader(tokenizer).conversation(encode_prompt(tokenizer, conversation)) == conversation


def test_ids_that_no_conversation_gives_are_refused(make_tokenizer):
    tokenizer = make_tokenizer()
    reader = ConversationReader(tokenizer)
    prompt = encode_prompt(tokenizer, turns("Hi"))
    for ids in (prompt[1:], prompt[:-1], [*prompt, 5], prompt[:1] * 2 + prompt[1:]):
        with pytest.raises(ModelError, match="no conversation gives"):
            reader.conversation(ids)


def test_responses_lose_special_tokens_and_are_closed_once(make_tokenizer):
    tokenizer = make_tokenizer()
    reader = ConversationReader(tokenizer)
    text = tokenizer("Sure <3", add_special_tokens=False)["input_ids"]
    end, other, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<pad>", "<|user|>"])
    for ids in (text, [*text, end], [*text, other], [*text, other, end], [*text, turn]):
        assert reader.response(ids) == "Sure <3"
        assert reader.close(ids) == [*text, end]
    assert reader.close([end]) == [end]


def test_a_template_that_drops_texts_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="leaves out"):
        ConversationReader(make_tokenizer("{{ messages[-1]['content'] }}<eos>"))
