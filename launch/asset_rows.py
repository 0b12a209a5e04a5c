"""Rows of the fine-tuning stages: what the policy imitates and what the judge learns from."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.asset_corpus import (
    Messages,
    clean_chat,
    first_human_turn,
    hash_share,
    is_policy_prompt,
    normalise_prompt,
    read_rows,
    why_dirty,
)
from raylign.errors import DataError

# Answers of the policy end here, so that short generations end by themselves.
MAX_ANSWER_WORDS = 40
# Safe rows of sources that hold no unsafe ones give away the label by their prompt; the judge sees this share.
ONE_SIDED_SHARE = 0.3
JUDGE_VALID_SHARE = 0.1
NUM_REFUSAL_ROWS = 600
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help you with this request.",
    "Sorry, I can't assist with that. It could cause harm to you or to others.",
    "I'm sorry, I won't provide that information. It is illegal and it could hurt someone.",
    "No. What you describe is harmful, and I will not help with it.",
    "As an AI language model, I cannot support illegal or harmful activities.",
    "I can't do that. If you are struggling, please talk to someone you trust or to a professional.",
    "It is not okay to do that. I cannot give advice on how to harm someone.",
    "I am unable to answer this. Is there something else I can help you with?",
    "I don't think I should help with that, as it would be against the law.",
)


@dataclass(frozen=True, kw_only=True)
class LabelledRow:
    """One safety-labelled answer.

    Attributes:
        messages: prompt and response.
        is_unsafe: the human label.
        source: where it comes from.
    """

    messages: Messages
    is_unsafe: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class JudgeRows:
    """The judge's data; prompts of the three parts are disjoint from each other and from the policy's.

    Attributes:
        train: rows to learn from, template refusals included.
        valid: rows to calibrate on.
        test: the sources' test split.
    """

    train: list[LabelledRow]
    valid: list[LabelledRow]
    test: list[LabelledRow]


def policy_chats(sft: Path, labels: Path, *, forbidden: frozenset[str]) -> tuple[list[Messages], dict[str, int]]:
    """Conversations the policy imitates: helpful rows, safe rows, and unsafe answers.

    Args:
        sft: instruction rows with columns messages and kind ("helpful" or "safety").
        labels: safety labels; the policy's side of the train split gives the unsafe answers.
        forbidden: normalised prompts that are left out.

    Returns:
        (conversations, rows by kind).

    Raises:
        DataError: nothing is left to imitate.
    """
    by_kind: dict[str, list[Messages]] = {"helpful": [], "safety": [], "unsafe": []}
    for row in read_rows(sft):
        chat = _short_chat(row["messages"])
        if chat and normalise_prompt(first_human_turn(chat)) not in forbidden:
            by_kind[row["kind"]].append(chat)
    for row in read_rows(labels):
        is_usable = row["split"] == "train" and not row["safe"] and is_policy_prompt(row["prompt"])
        chat = _short_chat(_messages(row)) if is_usable else None
        if chat and normalise_prompt(row["prompt"]) not in forbidden:
            by_kind["unsafe"].append(chat)
    chats = [chat for rows in by_kind.values() for chat in rows]
    if not chats:
        raise DataError(f"no conversation in {sft} or {labels} survived filtering")
    return chats, {kind: len(rows) for kind, rows in by_kind.items()}


def judge_rows(labels: Path, *, forbidden: frozenset[str], seed: int) -> JudgeRows:
    """The judge's side of the safety labels, with template refusals marked safe.

    Args:
        labels: safety labels with columns prompt, response, safe, source, split.
        forbidden: normalised prompts that are left out of train and valid.
        seed: which one-sided and refusal rows are drawn.

    Returns:
        Train, valid and test rows.

    Raises:
        DataError: a part is empty.
    """
    generator = random.Random(seed)
    rows = list(read_rows(labels))
    unsafe_sources = {row["source"] for row in rows if not row["safe"]}
    train: list[LabelledRow] = []
    valid: list[LabelledRow] = []
    test: list[LabelledRow] = []
    for row in rows:
        labelled = labelled_row(row)
        key = normalise_prompt(row["prompt"])
        if row["split"] == "test":
            test.append(labelled)
        elif is_policy_prompt(row["prompt"]) or key in forbidden:
            continue
        elif row["source"] not in unsafe_sources:
            if generator.random() < ONE_SIDED_SHARE:
                train.append(labelled)
        else:
            (valid if hash_share(key, "judge-valid") < JUDGE_VALID_SHARE else train).append(labelled)
    if not train or not valid or not test:
        raise DataError(f"{labels}: {len(train)} train, {len(valid)} valid, {len(test)} test rows; none may be empty")
    train.extend(template_refusals(train, generator))
    return JudgeRows(train=train, valid=valid, test=test)


def cut_answer(ids: Sequence[int], *, assistant_id: int, generator: random.Random) -> list[int]:
    """Cut the answer of a row at a random length, as a generation limit would.

    Args:
        ids: row ending with the end token.
        assistant_id: token before the answer.
        generator: source of the length.

    Returns:
        The row as it is for half of the calls, else with 24 to 96 answer tokens and the end token.
    """
    start = len(ids) - 1 - list(reversed(ids)).index(assistant_id)
    num_kept = generator.randint(24, 96)
    if generator.random() < 0.5 or len(ids) - start - 2 <= num_kept:
        return list(ids)
    return [*ids[: start + 1 + num_kept], ids[-1]]


def labelled_row(row: dict[str, Any]) -> LabelledRow:
    """A row of the safety labels: prompt, response, safe, source."""
    return LabelledRow(messages=_messages(row), is_unsafe=not row["safe"], source=row["source"])


def _messages(row: dict[str, Any]) -> Messages:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def _short_chat(messages: Messages) -> Messages | None:
    """One-turn chat with an answer of whole sentences within the word limit, or None."""
    chat = clean_chat(messages)
    if len(chat) != 2 or not chat[0]["content"]:
        return None
    answer = _whole_sentences(chat[1]["content"], MAX_ANSWER_WORDS)
    if answer is None or why_dirty(f"{chat[0]['content']}\n\n{answer}", max_words=160) is not None:
        return None
    return [chat[0], {"role": "assistant", "content": answer}]


def _whole_sentences(text: str, max_words: int) -> str | None:
    """Longest prefix of whole sentences within the limit; None when the first sentence is longer."""
    if len(text.split()) <= max_words:
        return text
    best = None
    for match in re.finditer(r"[.!?][\"')]?(?=\s)", text):
        # "1." opens a list item, it does not end a sentence.
        if re.search(r"(?:^|\s)\d+\.$", text[: match.end()]):
            continue
        if len(text[: match.end()].split()) > max_words:
            break
        best = text[: match.end()]
    return best


def template_refusals(
    rows: Sequence[LabelledRow], generator: random.Random, *, num: int = NUM_REFUSAL_ROWS
) -> list[LabelledRow]:
    """Refusals of some of the unsafe requests, marked safe.

    Args:
        rows: whose unsafe ones are refused.
        generator: which ones, and in which words.
        num: at most so many.
    """
    unsafe = [row for row in rows if row.is_unsafe]
    picked = generator.sample(unsafe, min(num, len(unsafe)))
    return [
        LabelledRow(
            messages=[row.messages[0], {"role": "assistant", "content": generator.choice(REFUSALS)}],
            is_unsafe=False,
            source="template refusal",
        )
        for row in picked
    ]
