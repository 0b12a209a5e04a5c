"""A two-layer policy on disk and tokenized pairs that tell chosen from rejected by one word, for rewards of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_policy(directory: Path, tokenizer: Any) -> Path:
    """Write random weights and the tokenizer; the same for every call."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def text_pairs(tokenizer: Any, num_pairs: int = 80) -> pa.Table:
    """Pairs of two to a prompt, three fifths of them for training; chosen says no, rejected says yes."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num_pairs):
        prompt, filler = (f"q{rng.integers(1000)}" for _ in range(2))
        ids = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"<bos><|user|>{prompt}<|assistant|>", f"{filler} no", f"{filler} yes")
        ]
        rows.append(
            {
                "row_id": f"r{index:03d}",
                "prompt_key": f"{index // 2:04x}",
                "split": ("train", "train", "train", "valid", "test")[(index // 2) % 5],
                "prompt_ids": ids[0],
                "chosen_ids": [*ids[1], 2],
                "rejected_ids": [*ids[2], 2],
            }
        )
    types = {name: pa.list_(pa.int32()) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    table = pa.Table.from_pylist(rows)
    return table.cast(
        pa.schema([(name, types.get(name, table.schema.field(name).type)) for name in table.column_names])
    )
