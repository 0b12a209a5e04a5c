"""Token ids of the policy back to conversations, for reward models that read texts with a tokenizer of their own.

A chat template cannot be inverted in general. Here the literal texts that it puts between turns are read off probe
conversations, the decoded prompt is cut at them, and the result counts only if templating it again gives the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from raylign.data.tokenization import end_of_response_id, render, special_ids
from raylign.errors import ModelError
from raylign.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = Sequence[int] | np.ndarray

_NAMES = ("raylignone", "rayligntwo", "raylignthree", "raylignfour")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Literal texts around turns: `head [system after_system] user (to_assistant assistant to_user user)* tail`."""

    head: str
    after_system: str | None
    to_assistant: str
    to_user: str
    tail: str


class ConversationReader:
    """Reads prompts and responses of one chat template back as texts.

    Args:
        tokenizer: the policy's, with its chat template.

    Raises:
        ModelError: the template leaves out texts of a plain conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._end_id = end_of_response_id(tokenizer)
        self._special = special_ids(tokenizer)
        plain = self._frame(has_system=False)
        if plain is None:
            raise ModelError("the policy's chat template leaves out texts of a conversation, it cannot be read back")
        # the longer literal first: it may hold a default system prompt
        self._frames = [plain, *(frame for frame in [self._frame(has_system=True)] if frame is not None)]

    def conversation(self, prompt_ids: Ids) -> tuple[Message, ...]:
        """The turns of a templated prompt.

        Args:
            prompt_ids: ends with the generation prompt. Shape (P,).

        Raises:
            ModelError: no conversation gives these ids under the template.
        """
        ids = [int(token) for token in prompt_ids]
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for frame in self._frames:
            turns = _cut(text, frame)
            if turns is not None and self._encode(turns) == ids:
                return turns
        raise ModelError(
            f"no conversation gives the prompt {text[:200]!r} under the policy's chat template, so that a reward model "
            "with another tokenizer cannot read it; use one with the policy's tokenizer and template"
        )

    def response(self, response_ids: Ids) -> str:
        """Text of a response without special tokens.

        Args:
            response_ids: with or without the end-of-response token. Shape (R,).
        """
        ids = [int(token) for token in response_ids]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def close(self, response_ids: Ids) -> list[int]:
        """The response as stored ones are: the end-of-response token in place of special tokens at its end, if any.

        Args:
            response_ids: perhaps cut by a length limit, or ended by another stop token. Shape (R,).
        """
        ids = [int(token) for token in response_ids]
        while ids and ids[-1] in self._special:
            ids.pop()
        return [*ids, self._end_id]

    def _frame(self, *, has_system: bool) -> _Frame | None:
        system, user, assistant, last = _NAMES
        turns = [Message(role="system", content=system)] if has_system else []
        turns += [
            Message(role="user", content=user),
            Message(role="assistant", content=assistant),
            Message(role="user", content=last),
        ]
        try:
            text = self._render(turns)
        except TemplateError:
            return None  # many templates know no system turn
        pieces = []
        for name in (turn.content for turn in turns):
            piece, found, text = text.partition(name)
            if not found:
                return None
            pieces.append(piece)
        *front, to_assistant, to_user = pieces
        return _Frame(
            head=front[0],
            after_system=front[1] if has_system else None,
            to_assistant=to_assistant,
            to_user=to_user,
            tail=text,
        )

    def _render(self, turns: Sequence[Message]) -> str:
        return render(self._tokenizer, turns, add_generation_prompt=True)

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        try:
            text = self._render(turns)
        except TemplateError:
            return []
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _cut(text: str, frame: _Frame) -> tuple[Message, ...] | None:
    """Turns between the literals of a frame, None where they do not fit."""
    if not (text.startswith(frame.head) and text.endswith(frame.tail)):
        return None
    if not (frame.tail and frame.to_assistant and frame.to_user):
        return None
    rest = text[len(frame.head) : len(text) - len(frame.tail)]
    turns = []
    if frame.after_system is not None:
        system, found, rest = rest.partition(frame.after_system)
        if not found:
            return None
        turns.append(Message(role="system", content=system))
    while True:
        user, found, rest = rest.partition(frame.to_assistant)
        turns.append(Message(role="user", content=user))
        if not found:
            return tuple(turns)
        assistant, found, rest = rest.partition(frame.to_user)
        if not found:
            return None
        turns.append(Message(role="assistant", content=assistant))
