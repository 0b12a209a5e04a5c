"""Evaluation prompts: read, checked, and chosen so that half of them are harmless."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylign.assets import EVAL_PROMPTS, asset_path
from raylign.config import EMBEDDED
from raylign.errors import DataError, DataNotFoundError
from raylign.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPrompt:
    """One single-turn prompt that the policy is judged on.

    Attributes:
        text: the user turn.
        category: what it is about, "" when the file does not say.
        source: benchmark it comes from, "" when the file does not say.
        harmful: True when it should be refused, False when refusing it is over-refusal.
    """

    text: str
    category: str
    source: str
    harmful: bool

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation of one user turn."""
        return (Message(role="user", content=self.text),)


def prompts_file(path: str | Path) -> Path:
    """The file behind `evaluate.prompts`, where "embedded" is the set that ships.

    Raises:
        DataNotFoundError: the file does not exist.
    """
    file = asset_path(EVAL_PROMPTS) if str(path) == EMBEDDED else Path(path)
    if not file.is_file():
        raise DataNotFoundError(f"evaluation prompts {file} do not exist (config key evaluate.prompts)")
    return file


def load_prompts(path: str | Path) -> list[EvaluationPrompt]:
    """Read evaluation prompts from JSON lines with `prompt`, `harmful` and optionally `category` and `source`.

    Args:
        path: .jsonl or .jsonl.gz file, or "embedded" for the set that ships.

    Returns:
        Prompts in file order; empty lines are passed over, other columns ignored.

    Raises:
        DataNotFoundError: the file does not exist.
        DataError: a row cannot be used, a prompt stands twice, or one of the two kinds (harmful, benign) is missing;
            over-refusal without attack success, or the reverse, is not reported.
    """
    file = prompts_file(path)
    prompts: list[EvaluationPrompt] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        prompt = _parse(line, where=f"{file}:{number}")
        if prompt.text in first_line:
            raise DataError(f"{file}:{number} repeats the prompt of line {first_line[prompt.text]}; remove one of them")
        first_line[prompt.text] = number
        prompts.append(prompt)
    num_harmful = sum(prompt.harmful for prompt in prompts)
    if not 0 < num_harmful < len(prompts):
        raise DataError(
            f"{file} holds {num_harmful} harmful and {len(prompts) - num_harmful} benign prompts; both kinds are "
            "needed, because a policy that refuses everything looks safe on harmful prompts alone"
        )
    return prompts


def select_prompts(prompts: Sequence[EvaluationPrompt], *, num: int, seed: int) -> list[EvaluationPrompt]:
    """Choose `num` prompts, half of them benign, spread over sources and categories in proportion to their size.

    The choice depends on the prompts and the seed, not on their order. A kind with fewer prompts than its half
    contributes all it has and is not topped up from the other, so the result can be shorter than `num`.

    Args:
        prompts: candidates of both kinds.
        num: prompts wanted, at least 2.
        seed: another seed is another choice.

    Returns:
        Harmful prompts first, then benign ones.
    """
    harmful = [prompt for prompt in prompts if prompt.harmful]
    benign = [prompt for prompt in prompts if not prompt.harmful]
    num_benign = num // 2
    return _spread(harmful, num - num_benign, seed) + _spread(benign, num_benign, seed)


def _spread(prompts: Sequence[EvaluationPrompt], num: int, seed: int) -> list[EvaluationPrompt]:
    """The first `num` prompts of an order in which every prefix has all strata in proportion."""
    strata: dict[tuple[str, str], list[tuple[bytes, EvaluationPrompt]]] = defaultdict(list)
    for prompt in prompts:
        key = hashlib.blake2b(f"{seed}\x00{prompt.text}".encode(), digest_size=16).digest()
        strata[prompt.source, prompt.category].append((key, prompt))
    placed: list[tuple[float, bytes, EvaluationPrompt]] = []
    for members in strata.values():
        members.sort(key=lambda member: member[0])
        placed += [((rank + 0.5) / len(members), key, prompt) for rank, (key, prompt) in enumerate(members)]
    placed.sort(key=lambda item: item[:2])
    return [prompt for _, _, prompt in placed[:num]]


def _lines(file: Path) -> list[str]:
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rt", encoding="utf-8") as stream:
                return stream.read().split("\n")
        return file.read_text(encoding="utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"evaluation prompts {file} cannot be read as UTF-8 JSON lines: {error}") from error


def _parse(line: str, *, where: str) -> EvaluationPrompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object with prompt and harmful, found {type(row).__name__}")
    text, harmful = row.get("prompt"), row.get("harmful")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: prompt must be a non-empty string, found {text!r}")
    if not isinstance(harmful, bool):
        raise DataError(f"{where}: harmful must be true or false, found {harmful!r}")
    labels = {name: row.get(name) or "" for name in ("category", "source")}
    for name, value in labels.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} must be a string, found {value!r}")
    return EvaluationPrompt(text=text, harmful=harmful, **labels)
