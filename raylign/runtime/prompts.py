"""Prompts of the online methods: those of the stored training pairs, each once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylign.errors import DataError

if TYPE_CHECKING:
    import ray.data


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCounts:
    """What became of the prompts.

    Attributes:
        used: distinct prompts that are sampled from.
        too_long: distinct prompts that leave no room for a response within the model's context.
    """

    used: int
    too_long: int


def collect_prompts(pairs: ray.data.Dataset, *, max_prompt_tokens: int | None) -> tuple[list[np.ndarray], PromptCounts]:
    """Token ids of the distinct prompts of the training split, in the order of their keys, which are hashes.

    Args:
        pairs: with the columns of the ingest phase.
        max_prompt_tokens: longest prompt that leaves room for a response, None without limit.

    Raises:
        DataError: no prompt is left.
    """
    found: dict[str, np.ndarray] = {}
    for batch in pairs.select_columns(["prompt_key", "split", "prompt_ids"]).iter_batches(batch_format="numpy"):
        for key, split, ids in zip(batch["prompt_key"], batch["split"], batch["prompt_ids"], strict=True):
            if split == "train":
                found.setdefault(str(key), np.asarray(ids, np.int32))
    keys = sorted(key for key in found if max_prompt_tokens is None or len(found[key]) <= max_prompt_tokens)
    counts = PromptCounts(used=len(keys), too_long=len(found) - len(keys))
    if not keys:
        raise DataError(
            f"no training prompt is left to sample from: {counts.too_long} leave no room for a response of "
            "sampler.max_new_tokens in the model's context; lower it, or data.max_prompt_length"
        )
    return [found[key] for key in keys], counts


def write_prompts(prompts: Sequence[np.ndarray], file: Path) -> None:
    """Write token ids of prompts, whole or not at all."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.table({"prompt_ids": pa.array(list(prompts), pa.list_(pa.int32()))}), temporary)
    temporary.replace(file)


def prompts_fingerprint(prompts: Sequence[np.ndarray]) -> str:
    """Hash of the token ids of all prompts, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in prompts:
        digest.update(np.int64(len(ids)).tobytes())
        digest.update(ids.astype(np.int32).tobytes())
    return digest.hexdigest()


def read_prompts(file: str | Path) -> list[np.ndarray]:
    """Token ids of the prompts, in the order written."""
    return [np.array(ids, np.int32) for ids in pq.read_table(file)["prompt_ids"].to_pylist()]
