"""Prompts of the online methods: those of the stored training pairs, each once."""

from __future__ import annotations

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


def write_prompts(pairs: ray.data.Dataset, file: Path, *, max_prompt_tokens: int | None) -> PromptCounts:
    """Write the distinct prompts of the training split, in the order of their keys, which are hashes.

    Args:
        pairs: with the columns of the ingest phase.
        file: parquet file to write.
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
    table = pa.table({"prompt_key": keys, "prompt_ids": pa.array([found[key] for key in keys], pa.list_(pa.int32()))})
    pq.write_table(table, file)
    return counts


def read_prompts(file: str | Path) -> list[np.ndarray]:
    """Token ids of the prompts, in the order written."""
    return [np.array(ids, np.int32) for ids in pq.read_table(file)["prompt_ids"].to_pylist()]
