"""What the asset recipe reads, how much it spends, and how its stages hand over."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raylign.errors import DataNotFoundError


@dataclass(frozen=True, kw_only=True)
class AssetSources:
    """Files the recipe reads.

    Attributes:
        corpus: directory of pretraining documents, `*.jsonl.gz` with columns text, source.
        sft: instruction rows with column messages.
        labels: safety labels with columns prompt, response, safe, source, split.
        eval_prompts: prompts that nothing may train on.
        pairs: preference pairs whose test prompts nothing may train on; the hh-rlhf rows ship.
        refusals: human-labelled completions of XSTest.
        init: model directory to continue from; None trains tokenizer and model from scratch.
    """

    corpus: Path
    sft: Path
    labels: Path
    eval_prompts: tuple[Path, ...]
    pairs: Path
    refusals: Path
    init: Path | None


@dataclass(frozen=True, kw_only=True)
class AssetBudget:
    """Sizes and budgets of the stages.

    Attributes:
        lm_tokens: pretraining tokens.
        lm_seconds: optional limit on top of `lm_tokens`.
        sft_tokens: fine-tuning tokens of the policy.
        sft_seconds: optional limit on top of `sft_tokens`.
        judge_tokens: fine-tuning tokens of the judge.
        judge_seconds: optional limit on top of `judge_tokens`.
        block_size: tokens per pretraining block.
        batch_size: blocks per step.
        max_words: longer documents are not read.
        vocab_size: tokenizer entries when training from scratch.
        hidden_size: model width when training from scratch.
        num_layers: model depth when training from scratch.
        seed: seed of every stage.
        is_bf16: bfloat16 autocast; about twice as fast where the CPU has avx512_bf16.
        is_compiled: compile the pretraining loss.
    """

    lm_tokens: int = 16_000_000
    lm_seconds: float | None = None
    sft_tokens: int = 3_000_000
    sft_seconds: float | None = None
    judge_tokens: int = 3_000_000
    judge_seconds: float | None = None
    block_size: int = 512
    batch_size: int = 4
    max_words: int = 320
    vocab_size: int = 4096
    hidden_size: int = 192
    num_layers: int = 6
    seed: int = 0
    is_bf16: bool = False
    is_compiled: bool = False


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write bfloat16 safetensors and the tokenizer; the model in memory keeps its dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # safetensors are written for their owner alone


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write one stage's measurements as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Measurements of an earlier stage.

    Raises:
        DataNotFoundError: that stage has not run with this working directory.
    """
    if not path.is_file():
        raise DataNotFoundError(f"{path} does not exist; run stage {path.stem!r} first (--stages, --work)")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
