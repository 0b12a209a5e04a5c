r"""Raw rows to `PreferencePair`: three public formats, one canonical form, and a stable reason for every refusal.

Formats:
    hh: `chosen` and `rejected` are whole transcripts, "\n\nHuman: ...\n\nAssistant: ...". The prompt is what they
        share, the answers are the last assistant turns (Bai et al. 2022, arXiv:2204.05862).
    pku: `prompt`, `response_0`, `response_1`, `is_response_{0,1}_safe`, `better_response_id`, `safer_response_id`
        (Ji et al. 2024, arXiv:2406.15513).
    trl: `prompt`, `chosen`, `rejected`, each a string or a list of {"role", "content"} messages. A string prompt is
        read as one user turn. It may be missing when the answers are whole conversations that share their first turns.

Optional columns of every format: `row_id` or `id`, `source`, `split`, `chosen_safe`, `rejected_safe`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from raylign.errors import RowError
from raylign.types import Message, PreferencePair, Split

RowFormat = Literal["auto", "trl", "hh", "pku"]
Prefer = Literal["safer", "better"]

_PKU_LABEL: dict[Prefer, str] = {"safer": "safer_response_id", "better": "better_response_id"}
_SPLITS: dict[str, Split] = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT_START = re.compile(r"\A\s*Human:")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_row(row: Mapping[str, Any], *, format: RowFormat = "auto", prefer: Prefer = "safer") -> PreferencePair:
    """Read one row as a preference pair.

    Args:
        row: column name to value, as read from JSON or arrow.
        format: how to read it; "auto" looks at the row's columns.
        prefer: the PKU-SafeRLHF label that names the chosen answer.

    Returns:
        The pair. Without an id column its `row_id` is a hash of its content.

    Raises:
        RowError: with one of the reasons missing_field, wrong_type, unknown_split, not_utf8, empty_text,
            bad_role_order, prompt_mismatch, multi_message_answer, chosen_equals_rejected.
    """
    if not isinstance(row, Mapping):
        raise RowError("wrong_type", f"a row must be an object with named columns, found {type(row).__name__}")
    known = _detect(row) if format == "auto" else format
    safe = (_flag(row, "chosen_safe"), _flag(row, "rejected_safe"))
    if known == "pku":
        prompt, chosen, rejected, safe = _parse_pku(row, prefer)
    elif known == "hh":
        prompt, chosen, rejected = _parse_hh(_text(row, "chosen"), _text(row, "rejected"))
    else:
        prompt, chosen, rejected = _parse_trl(row)
    _check_turns(prompt)
    if chosen == rejected:
        raise RowError("chosen_equals_rejected", "both answers are the same text, so neither can be preferred")
    return PreferencePair(
        row_id=_row_id(row) or content_key(prompt, chosen, rejected),
        source=_optional_text(row, "source"),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_safe=safe[0],
        rejected_safe=safe[1],
        split=_split(row),
    )


def content_key(prompt: Sequence[Message], chosen: str, rejected: str) -> str:
    """Sixteen hex digits of what a pair says; equal for two rows only if all their texts are equal."""
    parts = [[[message.role, message.content] for message in prompt], chosen, rejected]
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest()


def _detect(row: Mapping[str, Any]) -> RowFormat:
    if "response_0" in row and row.get("chosen") is None:
        return "pku"
    answers = (row.get("chosen"), row.get("rejected"))
    return "hh" if all(isinstance(a, str) and _TRANSCRIPT_START.match(a) for a in answers) else "trl"


# --- the formats -----------------------------------------------------------------------------------------------------


def _parse_pku(
    row: Mapping[str, Any], prefer: Prefer
) -> tuple[tuple[Message, ...], str, str, tuple[bool | None, bool | None]]:
    label = _PKU_LABEL[prefer]
    winner = _required(row, label)
    if isinstance(winner, bool) or winner not in (0, 1):
        raise RowError("wrong_type", f"{label} must be 0 or 1, found {winner!r}")
    answers = [_text(row, "response_0"), _text(row, "response_1")]
    safe = [_flag(row, "is_response_0_safe"), _flag(row, "is_response_1_safe")]
    chosen, rejected = int(winner), 1 - int(winner)
    prompt = (Message(role="user", content=_text(row, "prompt")),)
    return prompt, answers[chosen], answers[rejected], (safe[chosen], safe[rejected])


def _parse_hh(chosen: str, rejected: str) -> tuple[tuple[Message, ...], str, str]:
    chosen_turns, rejected_turns = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if turns[-1].role != "assistant":
            raise RowError("bad_role_order", f"{name} must end with an Assistant turn, ends with a Human turn")
    if chosen_turns[:-1] != rejected_turns[:-1]:
        raise RowError("prompt_mismatch", "chosen and rejected differ before their last turn")
    return tuple(chosen_turns[:-1]), chosen_turns[-1].content, rejected_turns[-1].content


def _parse_trl(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    chosen, rejected = _required(row, "chosen"), _required(row, "rejected")
    prompt = row.get("prompt")
    if prompt is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise RowError("missing_field", "prompt is missing, and string answers do not tell where it would end")
        return _implicit_prompt(_messages(chosen, "chosen"), _messages(rejected, "rejected"))
    turns = _prompt_turns(prompt)
    return tuple(turns), _answer(row, "chosen", turns), _answer(row, "rejected", turns)


def _prompt_turns(prompt: Any) -> list[Message]:
    if not isinstance(prompt, str):
        return _messages(prompt, "prompt")
    if not _TRANSCRIPT_START.match(prompt):
        return [Message(role="user", content=_checked(prompt, "prompt"))]
    # A transcript prompt usually ends with the bare marker of the answer to come.
    return _turns(re.sub(r"\n\nAssistant:\s*\Z", "", prompt), "prompt")


def _implicit_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[tuple[Message, ...], str, str]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    tails = chosen[shared:], rejected[shared:]
    if any(message.role != "assistant" for tail in tails for message in tail[:1]):
        raise RowError("prompt_mismatch", f"chosen and rejected share {shared} turns and then differ in a prompt turn")
    return tuple(chosen[:shared]), _single(tails[0], "chosen"), _single(tails[1], "rejected")


def _answer(row: Mapping[str, Any], name: str, prompt: list[Message]) -> str:
    """Text of an answer that is a string, a message list, or a conversation that repeats the prompt first."""
    value = row[name]
    if isinstance(value, str):
        return _checked(value, name)
    messages = _messages(value, name)
    if len(messages) > len(prompt) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    return _single(messages, name)


def _single(messages: Sequence[Message], name: str) -> str:
    if len(messages) != 1:
        raise RowError("multi_message_answer", f"{name} has {len(messages)} messages after the prompt, expected one")
    if messages[0].role != "assistant":
        raise RowError("bad_role_order", f"{name} must be an assistant message, found role {messages[0].role!r}")
    return messages[0].content


def _turns(text: str, name: str) -> list[Message]:
    """Turns of a transcript; texts are stripped because the format pads them with blanks and newlines."""
    pieces = _MARKER.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError("bad_role_order", f"{name} must start with a Human or Assistant marker")
    return [
        Message(role=_HH_ROLES[role], content=_checked(content.strip(), name))
        for role, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RowError("wrong_type", f"{name} must be text or a list of messages, found {type(value).__name__}")
    messages = []
    for item in value:
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise RowError("wrong_type", f'{name} must hold messages {{"role", "content"}}, found {str(item)[:60]!r}')
        if not isinstance(item["role"], str):
            raise RowError("wrong_type", f"a role in {name} must be text, found {type(item['role']).__name__}")
        messages.append(Message(role=item["role"], content=_checked(item["content"], name)))
    if not messages:
        raise RowError("empty_text", f"{name} holds no message")
    return messages


def _check_turns(prompt: Sequence[Message]) -> None:
    """An optional system turn, then user and assistant in turn, a user turn last."""
    roles = [message.role for message in prompt]
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(body))]
    if body != expected or not body or body[-1] != "user":
        raise RowError("bad_role_order", f"prompt turns must alternate and end with user, found {' '.join(roles)!r}")


# --- the fields ------------------------------------------------------------------------------------------------------


def _required(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise RowError("missing_field", f"column {name!r} is missing or null; found {sorted(map(str, row))}")
    return value


def _text(row: Mapping[str, Any], name: str) -> str:
    return _checked(_required(row, name), name)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} must be text, found {type(value).__name__}")
    if not value.strip():
        raise RowError("empty_text", f"{name} is empty or blank")
    return _encodable(value, name)


def _encodable(value: str, name: str) -> str:
    # JSON may spell half of a surrogate pair, which neither a tokenizer nor arrow can encode.
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not_utf8", f"{name} holds half of a surrogate pair at character {error.start}") from None
    return value


def _optional_text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} must be text, found {type(value).__name__}")
    return _encodable(value, name)


def _row_id(row: Mapping[str, Any]) -> str:
    """Text of `row_id` or `id`, "" when there is none."""
    name = "row_id" if row.get("row_id") is not None else "id"
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _optional_text(row, name)


def _flag(row: Mapping[str, Any], name: str) -> bool | None:
    value = row.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise RowError("wrong_type", f"{name} must be true, false or null, found {value!r}")


def _split(row: Mapping[str, Any]) -> Split | None:
    name = _optional_text(row, "split")
    if not name:
        return None
    if name not in _SPLITS:
        raise RowError("unknown_split", f"split must be one of {sorted(_SPLITS)}, found {name!r}")
    return _SPLITS[name]
