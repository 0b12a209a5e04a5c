"""Token ids of pairs under templates that go wrong elsewhere. The tokenizer is one of bytes, the templates are real."""

from __future__ import annotations

import random

import numpy as np
import pytest

from raylign.data.tokenization import check_tokenizer, end_of_response_id, tokenize_pair, tokenize_pairs
from raylign.errors import ModelError, RowError
from raylign.types import Message, PreferencePair

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
STRIPPING = CHATML.replace("m['content']", "m['content'] | trim")
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
PREFIX_BREAKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ messages | length }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")


def make_pair(prompt="Hi?", chosen="Hello", rejected="Go away", turns=()):
    messages = (*turns, Message(role="user", content=prompt))
    return PreferencePair(row_id="1", source="", prompt=messages, chosen=chosen, rejected=rejected)


def texts(pair, tokenizer, **limits):
    """Decoded prompt, chosen and rejected."""
    tokens = tokenize_pair(pair, tokenizer, **({"max_length": 512, "prompt_limit": 256} | limits))
    ids = (tokens.prompt_ids, tokens.chosen_ids, tokens.rejected_ids)
    assert all(i.dtype == np.int32 for i in ids)
    return tuple(tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in ids)


def test_plain_template(make_tokenizer):
    assert texts(make_pair(), make_tokenizer()) == ("<bos><|user|>Hi?<|assistant|>", "Hello<eos>", "Go away<eos>")


def test_tokenizer_that_adds_the_begin_token_itself_does_not_double_it(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # the trap is set
    assert texts(make_pair(), tokenizer) == texts(make_pair(), make_tokenizer())


def test_text_behind_the_end_token_belongs_to_no_answer(make_tokenizer):
    tokenizer = make_tokenizer(CHATML, specials=IM)
    prompt, chosen, rejected = texts(make_pair(), tokenizer)
    assert prompt == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == ("Hello<|im_end|>", "Go away<|im_end|>")


def test_default_system_prompt_comes_once(make_tokenizer):
    prompt, chosen, _ = texts(make_pair(), make_tokenizer(DEFAULT_SYSTEM, specials=IM))
    assert prompt.count("Be kind.") == 1
    assert "Be kind." not in chosen


def test_today_is_the_same_every_day(make_tokenizer):
    """Else the same data are other tokens tomorrow."""
    dated = '{% set day = strftime_now("%d %b %Y") %}<|im_start|>system\n{{ day }}<|im_end|>\n' + CHATML
    tokenizer = make_tokenizer(dated, specials=IM)
    prompt, _, _ = texts(make_pair(), tokenizer)
    assert prompt.startswith("<|im_start|>system\n26 Jul 2024<|im_end|>\n<|im_start|>user")
    assert tokenizer.chat_template == dated


def test_template_that_strips(make_tokenizer):
    pair = make_pair(prompt="  Hi?\n", chosen="\n Hello ", rejected=" Go away\n\n")
    assert texts(pair, make_tokenizer(STRIPPING, specials=IM)) == texts(
        make_pair(), make_tokenizer(CHATML, specials=IM)
    )


def test_stripped_answers_that_become_equal_are_refused(make_tokenizer):
    with pytest.raises(RowError, match="equal_after_truncation"):
        texts(make_pair(chosen="Same", rejected="Same "), make_tokenizer(STRIPPING, specials=IM))


def test_template_without_an_end_token_gets_the_tokenizers(make_tokenizer):
    tokenizer = make_tokenizer(NO_END)
    assert end_of_response_id(tokenizer) == tokenizer.eos_token_id
    assert texts(make_pair(), tokenizer) == ("user: Hi?\nassistant:", " Hello\n<eos>", " Go away\n<eos>")


@pytest.mark.parametrize(("template", "expected"), [(CHATML, "<|im_end|>"), (DEFAULT_SYSTEM, "<|im_end|>")])
def test_end_of_response_is_the_templates_not_eos(make_tokenizer, template, expected):
    tokenizer = make_tokenizer(template, specials=IM)
    assert end_of_response_id(tokenizer) == tokenizer.convert_tokens_to_ids(expected) != tokenizer.eos_token_id


def test_multi_turn_prompt_is_whole(make_tokenizer):
    turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    prompt, chosen, _ = texts(make_pair(prompt="c", turns=turns), make_tokenizer())
    assert prompt == "<bos><|user|>a<|assistant|>b<eos><|user|>c<|assistant|>"
    assert chosen == "Hello<eos>"


# "<bos><|user|>Hi?<|assistant|>" is six tokens, so max_length=10 leaves three for text and one for the end.
def test_cut_answer_still_ends_with_the_end_token(make_tokenizer):
    tokenizer = make_tokenizer()
    _, chosen, rejected = texts(make_pair(), tokenizer, max_length=10, prompt_limit=6)
    assert (chosen, rejected) == ("Hel<eos>", "Go <eos>")


def test_answer_that_fits_exactly_is_not_cut(make_tokenizer):
    _, chosen, rejected = texts(make_pair(), make_tokenizer(), max_length=12, prompt_limit=6)
    assert (chosen, rejected) == ("Hello<eos>", "Go aw<eos>")


def test_answers_equal_after_the_cut_are_refused(make_tokenizer):
    with pytest.raises(RowError, match="equal_after_truncation"):
        texts(make_pair(chosen="same start", rejected="same end"), make_tokenizer(), max_length=12, prompt_limit=6)


def test_prompt_limit_is_inclusive(make_tokenizer):
    texts(make_pair(), make_tokenizer(), prompt_limit=6)
    with pytest.raises(RowError, match=r"prompt_too_long.* 6 tokens, the limit is 5"):
        texts(make_pair(), make_tokenizer(), prompt_limit=5)


def test_prompt_that_is_no_token_prefix_is_refused(make_tokenizer):
    with pytest.raises(RowError, match="template_prefix_mismatch"):
        texts(make_pair(), make_tokenizer(PREFIX_BREAKING, specials=IM))


def test_answer_that_merges_into_the_prompts_last_token_is_refused(make_tokenizer):
    """The template ends with a newline; the tokenizer knows two newlines as one token."""
    tokenizer = make_tokenizer(CHATML, specials=IM, merges=(("Ċ", "Ċ"),))
    with pytest.raises(RowError, match="template_prefix_mismatch"):
        texts(make_pair(chosen="\nHello"), tokenizer)
    assert texts(make_pair(chosen="Hello\n\n"), tokenizer)[1] == "Hello\n\n<|im_end|>"


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_spelled_special_token_is_refused(make_tokenizer, field):
    """Otherwise a text could end its own turn and forge the next one."""
    with pytest.raises(RowError, match=r"special_token_in_text.*<\|assistant\|>"):
        texts(make_pair(**{field: "x<|assistant|>y"}), make_tokenizer())


def test_conversation_that_the_template_refuses(make_tokenizer):
    pair = make_pair(turns=(Message(role="system", content="s"),))
    with pytest.raises(RowError, match=r"template_error.*no system turn"):
        texts(pair, make_tokenizer(NO_SYSTEM, specials=IM))


def test_one_bad_pair_does_not_disturb_its_neighbours(make_tokenizer):
    tokenizer = make_tokenizer()
    limits = {"max_length": 64, "prompt_limit": 32}
    pairs = [make_pair("a"), make_pair("b" * 40), make_pair("c", chosen="<eos>"), make_pair("d")]
    results = tokenize_pairs(pairs, tokenizer, **limits)
    assert [getattr(r, "reason", "ok") for r in results] == ["ok", "prompt_too_long", "special_token_in_text", "ok"]
    alone = tokenize_pair(pairs[3], tokenizer, **limits)
    assert all(np.array_equal(getattr(results[3], n), getattr(alone, n)) for n in ("prompt_ids", "rejected_ids"))
    assert tokenize_pairs([], tokenizer, **limits) == []


@pytest.mark.parametrize(
    "template", [CHATML, DEFAULT_SYSTEM, STRIPPING, NO_SYSTEM], ids=["chatml", "sys", "strip", "no"]
)
def test_ids_are_those_of_the_whole_conversation(make_tokenizer, template):
    """On random texts prompt + answer is what tokenizing the templated conversation at once gives, up to the end."""
    tokenizer = make_tokenizer(template, specials=IM, merges=(("Ċ", "Ċ"), ("a", "b"), ("ab", "Ċ")))
    end = end_of_response_id(tokenizer)
    rng = random.Random(0)
    num_used = 0
    for _ in range(200):
        prompt, chosen, rejected = ("x" + "".join(rng.choices("ab \né😀", k=rng.randint(1, 9))) for _ in range(3))
        pair = make_pair(prompt, chosen, rejected)
        try:
            tokens = tokenize_pair(pair, tokenizer, max_length=512, prompt_limit=256)
        except RowError as error:
            assert error.reason == "equal_after_truncation"
            continue
        num_used += 1
        for answer, ids in ((chosen, tokens.chosen_ids), (rejected, tokens.rejected_ids)):
            conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(conversation, return_dict=False)
            got = [*tokens.prompt_ids.tolist(), *ids.tolist()]
            assert got == whole[: len(got)]
            assert ids.tolist().count(end) == 1
            assert ids[-1] == end
    assert num_used > 150


def test_tokenizer_without_chat_template_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match=r"some/dir has no chat template; add chat_template\.jinja"):
        check_tokenizer(make_tokenizer(None), "some/dir")


def test_template_that_drops_the_answer_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="leaves out the assistant's text"):
        check_tokenizer(make_tokenizer("{{ messages[0]['content'] }}"), "some/dir")


def test_template_that_fails_is_refused(make_tokenizer):
    with pytest.raises(ModelError, match="fails on a user and an assistant turn"):
        check_tokenizer(make_tokenizer("{{ raise_exception('never') }}"), "some/dir")


def test_no_end_token_at_all_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(NO_END)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="set eos_token"):
        check_tokenizer(tokenizer, "some/dir")
