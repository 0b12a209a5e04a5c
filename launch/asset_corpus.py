"""Documents for building the embedded models: reading, filtering, hash splits, and the prompts nothing may train on.

All splits are by the normalised first human turn, so two answers to one prompt never land on two sides.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from raylign.errors import DataError, DataNotFoundError

Messages: TypeAlias = list[dict[str, str]]

HELDOUT_SHARE = 0.01
# Prompts of the human safety labels: this share may teach the policy its unsafe answers, the rest trains the judge.
POLICY_SHARE = 0.4

# Openers without answers and forum replies: they teach rude fragments, not answers.
_SKIPPED_SOURCES = ("hh-red-team-prompts", "diasafety/")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})  # noqa: RUF001
_ROLES = {"Human": "user", "Assistant": "assistant"}
_CODE_NOISE = re.compile(r"```|</?[a-z]+>|[{};]\s*\n|\\begin\{|\bdef \w+\(|https?://|<\||\|--")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Cleaned documents as chats or plain text.

    Attributes:
        train: documents to train on.
        heldout: documents whose prompt hash is held out; never trained on.
        num_dropped: documents left out, by reason.
    """

    train: list[Messages | str]
    heldout: list[Messages | str]
    num_dropped: Counter[str] = field(default_factory=Counter)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `.jsonl` or `.jsonl.gz` file.

    Args:
        path: the file.

    Yields:
        One dict per line.

    Raises:
        DataNotFoundError: the file does not exist.
        DataError: a line is not a JSON object.
    """
    if not path.is_file():
        raise DataNotFoundError(f"{path} is not a file; expected JSON lines, plain or gzip-compressed")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is {type(row).__name__}, expected a JSON object")
            yield row


def normalise_prompt(text: str) -> str:
    """Key under which two spellings of one prompt are equal: lower case, letters and digits only.

    Args:
        text: first human turn.

    Returns:
        Words joined by single spaces.
    """
    return " ".join(re.findall(r"[^\W_]+", text.lower().replace("'", "").replace("’", "")))  # noqa: RUF001


def hash_share(key: str, salt: str) -> float:
    """Stable position of a key in [0, 1), independent between salts.

    Args:
        key: what to hash.
        salt: names the split.

    Returns:
        Uniform value that depends on nothing but the arguments.
    """
    return int.from_bytes(hashlib.sha256(f"{salt}\0{key}".encode()).digest()[:8], "big") / 2**64


def is_policy_prompt(prompt: str) -> bool:
    """Whether a safety-labelled prompt belongs to the policy's half (else to the judge's)."""
    return hash_share(normalise_prompt(prompt), "policy-or-judge") < POLICY_SHARE


def is_heldout_prompt(prompt: str) -> bool:
    """Whether documents that open with this prompt measure the held-out loss."""
    return hash_share(normalise_prompt(prompt), "lm-heldout") < HELDOUT_SHARE


def first_human_turn(messages: Sequence[Mapping[str, str]]) -> str:
    """Content of the first user message, or of the first message where there is none."""
    if not messages:
        raise DataError("a conversation without messages has no prompt")
    return next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])


def parse_dialogue(text: str) -> Messages | None:
    """Turn a `Human: ... Assistant: ...` transcript into messages.

    Args:
        text: transcript with turns separated by blank lines.

    Returns:
        Alternating messages ending with the assistant, or None when the text is not such a transcript.
    """
    pieces = _SPEAKER.split(text)
    if pieces[0].strip() or len(pieces) < 5:
        return None
    messages = [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if messages[-1]["role"] == "user":
        messages.pop()
    is_alternating = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
    return messages if messages and is_alternating and all(m["content"] for m in messages) else None


def why_dirty(text: str, *, max_words: int) -> str | None:
    """Reason to drop a text as garbage, or None.

    Args:
        text: text of a whole document.
        max_words: longer texts are dropped.

    Returns:
        A short reason for the count of dropped documents.
    """
    plain = text.translate(_TYPOGRAPHY)
    words = plain.split()
    if len(words) < 4:
        return "short"
    if len(words) > max_words:
        return "long"
    if sum(not c.isascii() for c in plain) > 0.01 * len(plain):
        return "not ascii"
    if sum(c.isalpha() or c.isspace() for c in plain) < 0.8 * len(plain) or _CODE_NOISE.search(plain):
        return "code or symbols"
    if max(map(len, words)) > 30 or len(set(words)) < 0.25 * len(words):
        return "repetitive"
    return None


def clean_chat(messages: Messages) -> Messages:
    """Replace typographic quotes and dashes by their ASCII forms."""
    return [{"role": m["role"], "content": m["content"].translate(_TYPOGRAPHY).strip()} for m in messages]


def read_corpus(paths: Iterable[Path], *, forbidden: frozenset[str], max_words: int) -> Corpus:
    """Read, filter and split pretraining documents.

    Args:
        paths: files with columns text and source.
        forbidden: normalised prompts that nothing trains on.
        max_words: longer documents are dropped.

    Returns:
        Train and held-out documents; exact repeats are dropped.
    """
    train: list[Messages | str] = []
    heldout: list[Messages | str] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for path in paths:
        for row in read_rows(path):
            text, source = str(row["text"]), str(row.get("source", ""))
            reason = "source" if source.startswith(_SKIPPED_SOURCES) else why_dirty(text, max_words=max_words)
            if reason is None and text in seen:
                reason = "repeat"
            seen.add(text)
            messages = parse_dialogue(text)
            prompt = first_human_turn(messages) if messages else text
            if reason is None and normalise_prompt(prompt) in forbidden:
                reason = "forbidden prompt"
            if reason is None and messages is None and _SPEAKER.search(text):
                reason = "odd turns"
            if reason is not None:
                dropped[reason] += 1
                continue
            document = messages or text
            (heldout if is_heldout_prompt(prompt) else train).append(document)
    return Corpus(train=train, heldout=heldout, num_dropped=dropped)


def forbidden_prompts(
    *, eval_prompts: Iterable[Path], pairs: Iterable[Path], labels: Iterable[Path], for_judge: bool = False
) -> frozenset[str]:
    """Normalised prompts that a stage must not train on.

    Args:
        eval_prompts: files of evaluation prompts; all of their rows are forbidden.
        pairs: preference pairs; rows with split "test" are forbidden.
        labels: safety labels; rows with split "test" are forbidden, and so is the other side of the policy/judge
            split of the train rows.
        for_judge: forbid the policy's side of the labels instead of the judge's.

    Returns:
        Keys as made by `normalise_prompt`.
    """
    keys = {normalise_prompt(row["prompt"]) for path in eval_prompts for row in read_rows(path)}
    keys |= {
        normalise_prompt(first_human_turn(row["prompt"]))
        for path in pairs
        for row in read_rows(path)
        if row["split"] == "test"
    }
    for path in labels:
        for row in read_rows(path):
            if row["split"] == "test" or is_policy_prompt(row["prompt"]) == for_judge:
                keys.add(normalise_prompt(row["prompt"]))
    return frozenset(keys)
