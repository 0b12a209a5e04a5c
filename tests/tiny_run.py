"""A model of a few kilobytes and random pairs, for tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raylign.types import TokenizedPair

VOCABULARY = 64
NUM_LAYERS = 2
HIDDEN = 32
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + eos_token }}{% endfor %}"


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=NUM_LAYERS,
                num_attention_heads=4,
                max_position_embeddings=64,
                tie_word_embeddings=True,
            )
        )


def save_tiny_model(directory: Path) -> Path:
    tiny_model().save_pretrained(directory)
    words = {"<unk>": 0, "<eos>": 1} | {chr(97 + i): 2 + i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return directory


def tiny_pairs(num_pairs: int, seed: int = 0) -> list[TokenizedPair]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return np.append(rng.integers(2, VOCABULARY, rng.integers(low, high)), 1).astype(np.int32)

    return [TokenizedPair(prompt_ids=ids(2, 9), chosen_ids=ids(1, 7), rejected_ids=ids(1, 7)) for _ in range(num_pairs)]


def tiny_table(num_pairs: int, *, num_valid: int = 0, seed: int = 0, **columns: Any) -> pa.Table:
    """Ranked pairs; the reference log-probs are made up, which no test minds."""
    rng = np.random.default_rng(seed)
    total = num_pairs + num_valid
    pairs = tiny_pairs(total, seed)
    content = {
        "row_id": [f"row-{i:04d}" for i in range(total)],
        "split": ["train"] * num_pairs + ["valid"] * num_valid,
        "ref_chosen_logps": -rng.uniform(10, 30, total),
        "ref_rejected_logps": -rng.uniform(10, 30, total),
        "label_confidence": rng.uniform(0.05, 0.99, total).astype(np.float32),
        "fold": np.where(np.arange(total) < num_pairs, np.arange(total) % 2, -1).astype(np.int16),
        "weight": np.ones(total, np.float32),
    }
    table = pa.table(content | columns)
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        table = table.append_column(name, pa.array([getattr(p, name) for p in pairs], pa.list_(pa.int32())))
    return table


def write_pairs(directory: Path, table: pa.Table) -> Path:
    """Two files, rows shuffled: neither may matter."""
    directory.mkdir(parents=True)
    table = table.take(np.random.default_rng(9).permutation(table.num_rows))
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), directory / "1.parquet")
    pq.write_table(table.slice(half), directory / "0.parquet")
    return directory
