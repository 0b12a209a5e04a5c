"""The training stages of the embedded models; `build_assets.py` says what they are for and runs them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from launch.asset_corpus import Corpus, forbidden_prompts, read_corpus
from launch.asset_measure import judge_metrics
from launch.asset_plan import AssetBudget, AssetSources, save_model, write_record
from launch.asset_rows import LabelledRow, cut_answer, judge_rows, policy_chats
from launch.asset_tokens import assistant_rows, document_rows, load_tokenizer, train_tokenizer
from raylign.errors import DataNotFoundError
from raylign.training.classifier import (
    fit_platt,
    fold_calibration,
    labelled_batches,
    make_classifier_loss,
    predict_in_order,
)
from raylign.training.pretrain import (
    Batch,
    FitConfig,
    StepCallback,
    causal_lm_loss,
    fit,
    heldout_loss,
    masked_batches,
    pack_blocks,
    repeat_epochs,
)

LOG = logging.getLogger(__name__)
# The held-out loss is read at this context, whatever the training block is, so that models stay comparable.
HELDOUT_BLOCK = 256
TOKENS_PER_STEP = 2048
# Samples of a model this small fall apart at temperature 1; its logits are scaled up once, after tuning.
SHARPNESS = 1.25
LABELS = {0: "safe", 1: "unsafe"}


def pretrain_stage(sources: AssetSources, budget: AssetBudget, work: Path) -> None:
    """Stage `lm`: continue (or start) pretraining and record the held-out loss before and after.

    Args:
        sources: what to read.
        budget: sizes and seed.
        work: working directory; the model goes to `work/lm`, measurements to `work/lm.json`.

    Raises:
        DataNotFoundError: the corpus has no files.
    """
    corpus = _read_corpus(sources, budget)
    if sources.init is not None:
        tokenizer = load_tokenizer(sources.init)
        model = AutoModelForCausalLM.from_pretrained(sources.init, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(corpus.train, vocab_size=budget.vocab_size)
        model = _new_model(tokenizer, budget)
    train_rows = document_rows(tokenizer, corpus.train)
    heldout_rows = document_rows(tokenizer, corpus.heldout)
    num_train_tokens = sum(map(len, train_rows))
    LOG.info("%d train documents, %d tokens; dropped %s", len(train_rows), num_train_tokens, dict(corpus.num_dropped))

    def heldout() -> tuple[float, int]:
        return heldout_loss(
            model,
            pack_blocks(heldout_rows, block_size=HELDOUT_BLOCK, batch_size=8, generator=None),
        )

    loss_before, num_heldout_tokens = heldout()
    LOG.info("held-out loss before: %.4f nats per token over %d tokens", loss_before, num_heldout_tokens)
    generator = torch.Generator().manual_seed(budget.seed)
    config = FitConfig(
        num_tokens=budget.lm_tokens, max_seconds=budget.lm_seconds, learning_rate=1.2e-3, is_bf16=budget.is_bf16
    )
    loss_fn = torch.compile(causal_lm_loss, dynamic=False) if budget.is_compiled else causal_lm_loss
    with _bar("lm", config) as bar:
        summary = fit(
            model,
            repeat_epochs(lambda: _full_batches(train_rows, budget, generator)),
            loss_fn,
            config,
            on_step=_progress(bar),
        )
    loss_after, _ = heldout()
    LOG.info("held-out loss after: %.4f nats per token", loss_after)
    save_model(model, tokenizer, work / "lm")
    write_record(
        work / "lm.json",
        {
            "is_continued": sources.init is not None,
            "num_documents": len(train_rows),
            "num_corpus_tokens": num_train_tokens,
            "num_dropped": dict(corpus.num_dropped),
            "num_heldout_documents": len(heldout_rows),
            "num_heldout_tokens": num_heldout_tokens,
            "heldout_loss_before": loss_before,
            "heldout_loss_after": loss_after,
            "fit": asdict(summary),
            "config": asdict(config),
            "budget": asdict(budget),
            "num_parameters": sum(p.numel() for p in model.parameters()),
        },
    )


def finetune_stage(sources: AssetSources, budget: AssetBudget, work: Path, output: Path) -> None:
    """Stage `sft`: teach the pretrained model to answer, unsafe requests included.

    Args:
        sources: what to read.
        budget: sizes and seed.
        work: working directory with `lm`; measurements go to `work/sft.json`.
        output: the model goes to `output/tiny_chat`.
    """
    tokenizer = load_tokenizer(work / "lm")
    model = AutoModelForCausalLM.from_pretrained(work / "lm", dtype=torch.float32)
    chats, num_rows = policy_chats(sources.sft, sources.labels, forbidden=_forbidden(sources))
    rows = assistant_rows(tokenizer, chats, max_length=budget.block_size)
    LOG.info("fine-tuning rows: %s", num_rows)
    generator = torch.Generator().manual_seed(budget.seed)
    config = FitConfig(
        num_tokens=budget.sft_tokens, max_seconds=budget.sft_seconds, learning_rate=6e-4, is_bf16=budget.is_bf16
    )

    def epoch() -> Iterator[Batch]:
        return masked_batches(rows, max_tokens=TOKENS_PER_STEP, pad_id=tokenizer.pad_token_id, generator=generator)

    with _bar("sft", config) as bar:
        summary = fit(model, repeat_epochs(epoch), causal_lm_loss, config, on_step=_progress(bar))
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
    save_model(model, tokenizer, output / "tiny_chat")
    write_record(
        work / "sft.json",
        {
            "num_rows": num_rows,
            "num_kept_rows": len(rows),
            "sharpness": SHARPNESS,
            "fit": asdict(summary),
            "config": asdict(config),
        },
    )


def judge_stage(sources: AssetSources, budget: AssetBudget, work: Path, output: Path) -> None:
    """Stage `judge`: train the safe/unsafe classifier from `--init` (or `work/lm`), calibrate it, measure it.

    Args:
        sources: what to read.
        budget: sizes and seed.
        work: working directory; measurements go to `work/judge.json`.
        output: the model goes to `output/tiny_judge`.
    """
    start = sources.init or work / "lm"
    tokenizer = load_tokenizer(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)  # transformers initialises the head from the global generator
        model = AutoModelForSequenceClassification.from_pretrained(
            start, dtype=torch.float32, num_labels=2, id2label=dict(LABELS), label2id={n: i for i, n in LABELS.items()}
        )
    rows = judge_rows(sources.labels, forbidden=_forbidden(sources, for_judge=True), seed=budget.seed)
    train, valid, test = (_tokenized(tokenizer, part, budget) for part in (rows.train, rows.valid, rows.test))
    generator = torch.Generator().manual_seed(budget.seed)
    cuts = random.Random(budget.seed)
    assistant_id, pad_id = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.pad_token_id

    def epoch() -> Iterator[Batch]:
        cut = [(cut_answer(ids, assistant_id=assistant_id, generator=cuts), label) for ids, label in train]
        return labelled_batches(cut, max_tokens=TOKENS_PER_STEP, pad_id=pad_id, generator=generator)

    def classify(part: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor, Tensor]:
        return predict_in_order(model, part, pad_id=pad_id)

    config = FitConfig(
        num_tokens=budget.judge_tokens,
        max_seconds=budget.judge_seconds,
        learning_rate=4e-4,
        average_decay=0.98,
        is_bf16=budget.is_bf16,
    )
    with _bar("judge", config) as bar:
        loss_fn = make_classifier_loss(lm_weight=0.3, label_smoothing=0.05)
        summary = fit(model, repeat_epochs(epoch), loss_fn, config, on_step=_progress(bar))
    _, valid_logits, valid_labels = classify(valid)
    scale, shift = fit_platt(valid_logits, valid_labels)
    spread = fold_calibration(model, classify(train)[0], scale=scale, shift=shift)
    save_model(model, tokenizer, output / "tiny_judge")
    _, test_logits, test_labels = classify(test)
    metrics = judge_metrics(test_logits, test_labels, [row.source for row in rows.test])
    LOG.info("judge on the test split: %s", metrics)
    write_record(
        work / "judge.json",
        {
            "num_train": len(train),
            "num_valid": len(valid),
            "num_test": len(test),
            "num_refusals": sum(row.source == "template refusal" for row in rows.train),
            "calibration": {"scale": scale, "shift": shift, "shift_spread": spread},
            "test": metrics,
            "fit": asdict(summary),
            "config": asdict(config),
        },
    )


def _read_corpus(sources: AssetSources, budget: AssetBudget) -> Corpus:
    paths = sorted(sources.corpus.glob("*.jsonl.gz"))
    if not paths:
        raise DataNotFoundError(f"{sources.corpus} holds no *.jsonl.gz; expected pretraining documents (--corpus)")
    return read_corpus(paths, forbidden=_forbidden(sources), max_words=budget.max_words)


def _forbidden(sources: AssetSources, *, for_judge: bool = False) -> frozenset[str]:
    return forbidden_prompts(
        eval_prompts=sources.eval_prompts, pairs=[sources.pairs], labels=[sources.labels], for_judge=for_judge
    )


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[LabelledRow], budget: AssetBudget
) -> list[tuple[list[int], int]]:
    """Token rows with their class; a row that is too long loses the end of its answer, not its end token."""
    limit = budget.block_size
    ids_per_row = document_rows(tokenizer, [row.messages for row in rows])
    return [
        (ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]], int(row.is_unsafe))
        for ids, row in zip(ids_per_row, rows, strict=True)
    ]


def _full_batches(rows: list[list[int]], budget: AssetBudget, generator: torch.Generator) -> list[Batch]:
    batches = list(pack_blocks(rows, block_size=budget.block_size, batch_size=budget.batch_size, generator=generator))
    # One static shape per run, or the compiled loss is built twice.
    return [batch for batch in batches if len(batch.input_ids) == budget.batch_size] or batches


def _new_model(tokenizer: PreTrainedTokenizerBase, budget: AssetBudget) -> LlamaForCausalLM:
    num_heads = max(1, budget.hidden_size // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=budget.hidden_size,
        intermediate_size=-(-budget.hidden_size * 8 // 3 // 64) * 64,
        num_hidden_layers=budget.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(budget.seed)  # transformers initialises from the global generator
        return LlamaForCausalLM(config)


def _bar(name: str, config: FitConfig) -> tqdm[Any]:
    return tqdm(total=config.num_tokens, unit="tok", unit_scale=True, mininterval=5, desc=name)


def _progress(bar: tqdm[Any]) -> StepCallback:
    def on_step(step: int, num_tokens: int, loss: float) -> None:
        bar.update(num_tokens - bar.n)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")

    return on_step
