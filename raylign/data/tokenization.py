"""Preference pairs to token ids under the model's own chat template.

The template is applied to the whole conversation, once per answer; the prompt is found in it as a token prefix and a
pair for which it is none is refused. Nothing is pieced together from separately templated parts, which is how default
system prompts, begin tokens and end tokens come to be there twice (see axolotl 1616, trl 1541, 1930, 4908). Special
tokens come from the template alone: the tokenizer is told to add none.

Every answer ends with exactly one end-of-response token, also when it was cut, because that is the position whose
hidden state stands for the answer. What a template writes behind that token (a newline, often) belongs to no answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from raylign.errors import ModelError, RowError
from raylign.types import Message, PreferencePair, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DATE = date(2024, 7, 26)
_PROBE_ANSWER = "raylignprobe"
_PROBE = (Message(role="user", content="question"), Message(role="assistant", content=_PROBE_ANSWER))


def tokenize_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, *, max_length: int, prompt_limit: int
) -> TokenizedPair:
    """Token ids of one pair; see `tokenize_pairs`.

    Raises:
        RowError: the pair cannot be used.
    """
    result = tokenize_pairs([pair], tokenizer, max_length=max_length, prompt_limit=prompt_limit)[0]
    if isinstance(result, RowError):
        raise result
    return result


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, *, max_length: int, prompt_limit: int
) -> list[TokenizedPair | RowError]:
    """Token ids of many pairs in one call of the tokenizer.

    An answer is cut to `max_length - P - 1` tokens and the end-of-response token is appended after the cut.

    Args:
        pairs: B pairs.
        tokenizer: has a chat template, see `check_tokenizer`.
        max_length: largest number of tokens of prompt plus one answer.
        prompt_limit: largest number of tokens of a prompt, below `max_length`.

    Returns:
        B results in the order of `pairs`: ids, or the error for a pair that cannot be used, with one of the reasons
        special_token_in_text, template_error, template_prefix_mismatch, prompt_too_long, equal_after_truncation.
    """
    end_id = end_of_response_id(tokenizer)
    forbidden = special_pattern(tokenizer)
    results: list[TokenizedPair | RowError | None] = [None] * len(pairs)
    texts: list[str] = []
    templated: list[int] = []
    for index, pair in enumerate(pairs):
        try:
            texts += _template(pair, tokenizer, forbidden)
        except RowError as error:
            results[index] = error
        else:
            templated.append(index)
    ids = _encode(tokenizer, texts)
    for position, index in enumerate(templated):
        prompt, chosen, rejected = ids[3 * position : 3 * position + 3]
        try:
            results[index] = _assemble(prompt, chosen, rejected, end_id, max_length, prompt_limit)
        except RowError as error:
            results[index] = error
    return [result for result in results if result is not None]


def end_of_response_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template puts after an assistant turn, found by templating a probe conversation.

    Falls back to the tokenizer's `eos_token_id` for a template that puts no special token there.

    Raises:
        ModelError: neither exists.
    """
    behind = render(tokenizer, _PROBE, add_generation_prompt=False).rpartition(_PROBE_ANSWER)[2]
    special = special_ids(tokenizer)
    for token in _encode(tokenizer, [behind])[0] if behind else []:
        if token in special:
            return int(token)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the chat template puts no special token after an assistant turn and the tokenizer names no eos_token; "
            "set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse a tokenizer that cannot template a conversation, before any row is read.

    Args:
        tokenizer: as loaded.
        path: where it is from, for the message.

    Raises:
        ModelError: no chat template, a template that fails on a plain conversation, or no end-of-response token.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {path} has no chat template; add chat_template.jinja beside tokenizer.json "
            "or choose a chat model"
        )
    try:
        text = render(tokenizer, _PROBE, add_generation_prompt=False)
    except TemplateError as error:
        raise ModelError(f"the chat template in {path} fails on a user and an assistant turn: {error}") from error
    if _PROBE_ANSWER not in text:
        raise ModelError(f"the chat template in {path} leaves out the assistant's text; use the model's own template")
    end_of_response_id(tokenizer)


def _template(pair: PreferencePair, tokenizer: Any, forbidden: re.Pattern[str]) -> tuple[str, str, str]:
    """Prompt, prompt + chosen, prompt + rejected as the template writes them."""
    for text in (*(message.content for message in pair.prompt), pair.chosen, pair.rejected):
        found = forbidden.search(text)
        if found:
            raise RowError(
                "special_token_in_text",
                f"a text spells the special token {found.group()!r}, which the tokenizer would take for a real one",
            )
    chosen = (*pair.prompt, Message(role="assistant", content=pair.chosen))
    rejected = (*pair.prompt, Message(role="assistant", content=pair.rejected))
    try:
        return (
            render(tokenizer, pair.prompt, add_generation_prompt=True),
            render(tokenizer, chosen, add_generation_prompt=False),
            render(tokenizer, rejected, add_generation_prompt=False),
        )
    except TemplateError as error:
        raise RowError("template_error", f"the chat template refuses this conversation: {error}") from error


def _assemble(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], end_id: int, max_length: int, limit: int
) -> TokenizedPair:
    if len(prompt) > limit:
        raise RowError("prompt_too_long", f"the prompt has {len(prompt)} tokens, the limit is {limit}")
    room = max_length - len(prompt) - 1
    answers = []
    for name, whole in (("chosen", chosen), ("rejected", rejected)):
        if list(whole[: len(prompt)]) != list(prompt):
            raise RowError(
                "template_prefix_mismatch",
                f"the templated prompt is no token prefix of the templated {name} conversation",
            )
        body = list(whole[len(prompt) :])
        if end_id in body:
            body = body[: body.index(end_id)]
        answers.append([*body[:room], end_id])
    if answers[0] == answers[1]:
        raise RowError("equal_after_truncation", f"the answers have the same first {len(answers[0]) - 1} tokens")
    return TokenizedPair(
        prompt_ids=np.asarray(prompt, np.int32),
        chosen_ids=np.asarray(answers[0], np.int32),
        rejected_ids=np.asarray(answers[1], np.int32),
    )


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """A conversation under the tokenizer's chat template, on any day the same.

    Some templates write today's date (`strftime_now`): the same data would be other tokens tomorrow, and no cache or
    unfinished run would fit them. Here it is always the date that Llama 3's templates have where none is given.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
    """
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    template = tokenizer.get_chat_template()
    text: str = tokenizer.apply_chat_template(
        conversation,
        chat_template=_TODAY.sub(lambda call: repr(_DATE.strftime(call[2])), template),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return text


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return ids


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that no plain text gives: the tokenizer's named special tokens and the added ones that are special."""
    added = tokenizer.added_tokens_decoder
    return set(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches any special token spelled out in a text; never matches when there is none."""
    spelled = sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in spelled) or r"(?!)")
