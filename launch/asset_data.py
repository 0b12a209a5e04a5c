"""The data files of `raylign/assets`: what may ship, cut from the downloaded sources.

Only sources whose licence allows redistribution pass; the allow-lists below are the rule, and a row from anywhere else
is left out. Attribution is in `raylign/assets/NOTICE.md`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.asset_corpus import first_human_turn, hash_share, normalise_prompt, read_rows
from raylign.errors import DataError

PAIR_SOURCE_PREFIX = "hh-"
PAIR_COLUMNS = ("id", "source", "prompt", "chosen", "rejected", "split")
HARMFUL_QUOTAS: Mapping[str, int] = {"advbench": 40, "harmbench": 40, "strongreject": 40, "jailbreakbench": 30}
SAFE_SOURCE = "xstest"
# Not needed to see alignment work on a tiny model, so not carried in a wheel: sexual content and weapons chemistry.
_SKIPPED_CATEGORIES = frozenset({"Sexual content", "Sexual/Adult content", "chemical_biological"})
_SKIPPED_WORDS = ("child", "minor", "pedoph", "underage", "teen")


def build_pairs(source: Path, output: Path) -> int:
    """Write the shippable preference pairs.

    Args:
        source: pairs with columns id, source, prompt, chosen, rejected, split.
        output: `.jsonl.gz` to write.

    Returns:
        Number of pairs written.

    Raises:
        DataError: no row may ship.
    """
    rows = [
        {column: row[column] for column in PAIR_COLUMNS}
        for row in read_rows(source)
        if row["source"].startswith(PAIR_SOURCE_PREFIX)
    ]
    if not rows:
        raise DataError(f"{source} has no row whose source starts with {PAIR_SOURCE_PREFIX!r}; nothing may ship")
    return _write_rows(rows, output)


def build_eval_prompts(sources: Iterable[Path], pairs: Path, output: Path) -> int:
    """Write a fixed subset of harmful prompts and all benign look-alikes of XSTest.

    Args:
        sources: prompt files with columns prompt, category, source, harmful.
        pairs: shipped pairs; prompts that open one of them are left out.
        output: `.jsonl` to write.

    Returns:
        Number of prompts written.

    Raises:
        DataError: a source has fewer prompts than its quota.
    """
    seen = {normalise_prompt(first_human_turn(row["prompt"])) for row in read_rows(pairs)}
    harmful: dict[str, list[dict[str, Any]]] = {name: [] for name in HARMFUL_QUOTAS}
    safe: list[dict[str, Any]] = []
    for row in sorted((row for path in sources for row in read_rows(path)), key=_shuffled):
        key = normalise_prompt(row["prompt"])
        if key in seen or not _may_ship(row):
            continue
        if row["harmful"] and row["source"] in harmful:
            picked = harmful[row["source"]]
            if len(picked) == HARMFUL_QUOTAS[row["source"]]:
                continue
        elif not row["harmful"] and row["source"] == SAFE_SOURCE:
            picked = safe
        else:
            continue
        seen.add(key)
        picked.append({name: row[name] for name in ("prompt", "category", "source", "harmful")})
    short = {name: len(rows) for name, rows in harmful.items() if len(rows) < HARMFUL_QUOTAS[name]}
    if short or not safe:
        raise DataError(f"too few prompts to fill the quotas {dict(HARMFUL_QUOTAS)}: {short}, benign {len(safe)}")
    return _write_rows([row for rows in harmful.values() for row in rows] + safe, output)


def build_refusal_labels(source: Path, output: Path) -> int:
    """Write the human-labelled XSTest completions unchanged.

    Args:
        source: rows with columns prompt, response, label.
        output: `.jsonl.gz` to write.

    Returns:
        Number of rows written.
    """
    columns = ("prompt", "response", "label", "prompt_type", "model")
    return _write_rows([{column: row[column] for column in columns} for row in read_rows(source)], output)


def _may_ship(row: Mapping[str, Any]) -> bool:
    # HarmBench's contextual prompts need a context that is not part of the prompt; its copyright ones ask for lyrics.
    is_whole = row.get("functional", "standard") == "standard"
    is_mild = row["category"] not in _SKIPPED_CATEGORIES and not any(w in row["prompt"].lower() for w in _SKIPPED_WORDS)
    return is_whole and (is_mild or not row["harmful"])


def _shuffled(row: Mapping[str, Any]) -> float:
    return hash_share(normalise_prompt(row["prompt"]), "shipped-eval-prompts")


def _write_rows(rows: list[dict[str, Any]], output: Path) -> int:
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # mtime=0: the same rows give the same bytes.
    output.write_bytes(gzip.compress(lines, mtime=0) if output.suffix == ".gz" else lines)
    return len(rows)
