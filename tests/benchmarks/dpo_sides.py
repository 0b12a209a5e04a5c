"""The two sides of the DPO comparison: the same model, the same pairs in the same order, the same optimiser.

TRL gets its dataset as messages and tokenizes it itself; that both sides train on the same token ids is asserted.
"""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylign.assets import PAIRS, asset_path
from raylign.config import TrainSection
from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.models.forward import PolicyForward, resolve_layers
from raylign.models.loading import load_policy, load_tokenizer
from raylign.training.micro_batches import Packing
from raylign.training.offline import offline_update
from raylign.training.optim import build_optimizer, build_scheduler
from raylign.training.table import PairBatch
from raylign.types import TokenizedPair

BATCH_SIZE = 8  # TRL's default per device
MAX_LENGTH = 512
LEARNING_RATE = 1e-6  # TRL's default
BETA = 0.1  # TRL's default
WARMUP_UPDATES = 1  # not timed: allocators, thread pools, lazily built state


@dataclass(frozen=True)
class Pair:
    """One row as TRL wants it and as raylign wants it."""

    row: dict[str, Any]
    tokens: TokenizedPair


@dataclass(frozen=True)
class Timing:
    """Seconds of one repeat.

    Attributes:
        updates_s: of the updates after the warm-up.
        cpu_s: processor seconds of the same updates, which other programs on the machine hardly touch.
        num_pairs: pairs of these updates.
        reference_s: of the reference log-probabilities, when they are computed before training.
        loss: mean over all updates, for a look at whether both sides train alike.
    """

    updates_s: float
    cpu_s: float
    num_pairs: int
    reference_s: float
    loss: float

    @property
    def pairs_per_s(self) -> float:
        """Rate of the updates alone."""
        return self.num_pairs / self.updates_s


def load_pairs(model_dir: str, data: str | None, num_pairs: int, min_user_turns: int = 2) -> list[Pair]:
    """The first multi-turn pairs of a jsonl(.gz) of message lists that fit into `MAX_LENGTH` uncut."""
    tokenizer = load_tokenizer(model_dir)
    path = Path(data) if data else asset_path(PAIRS)
    opener = gzip.open if path.suffix == ".gz" else open
    pairs: list[Pair] = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = {name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")}
            if sum(turn["role"] == "user" for turn in row["prompt"]) < min_user_turns:
                continue
            prompt = _ids(tokenizer, row["prompt"], add_generation_prompt=True)
            chosen, rejected = (_ids(tokenizer, row["prompt"] + row[half]) for half in ("chosen", "rejected"))
            if max(len(chosen), len(rejected)) > MAX_LENGTH:
                continue
            answers = {"chosen_ids": chosen[len(prompt) :], "rejected_ids": rejected[len(prompt) :]}
            pairs.append(Pair(row, TokenizedPair(prompt_ids=prompt, **answers)))
            if len(pairs) == num_pairs:
                return pairs
    raise SystemExit(f"{path} has only {len(pairs)} usable pairs with at least {min_user_turns} user turns")


def _ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> np.ndarray:
    return np.asarray(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"], np.int32)


def run_raylign(model_dir: str, pairs: list[Pair], *, batch_tokens: int = 4096) -> Timing:
    """Reference pass with the hidden states that the product caches, then the trainer's own update."""
    tokens = [pair.tokens for pair in pairs]
    policy = PolicyForward(load_policy(model_dir, dtype="float32"))
    start = time.perf_counter()
    ref_logps = reference_logps(policy, tokens, batch_tokens=batch_tokens)
    reference_s = time.perf_counter() - start
    num_updates = len(pairs) // BATCH_SIZE
    settings = TrainSection(
        objective="dpo", beta=BETA, learning_rate=LEARNING_RATE, schedule="linear", batch_size=BATCH_SIZE
    )
    optimizer = build_optimizer(policy, learning_rate=LEARNING_RATE, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, schedule="linear", num_updates=num_updates, warmup_fraction=0.0)
    packing = Packing(layout="shared", pad_token_id=0, batch_tokens=batch_tokens)
    losses = []
    for update in range(num_updates):
        if update == WARMUP_UPDATES:
            start, cpu_start = time.perf_counter(), time.process_time()
        rows = slice(update * BATCH_SIZE, (update + 1) * BATCH_SIZE)
        batch = PairBatch(
            tokens=tokens[rows],
            ref_chosen_logps=ref_logps[0, rows],
            ref_rejected_logps=ref_logps[1, rows],
            label_confidence=None,
            fold=torch.full((BATCH_SIZE,), -1),
            weight=torch.ones(BATCH_SIZE),
        )
        summary = offline_update(
            policy, optimizer, scheduler, batch, update=update, settings=settings, packing=packing, seed=0
        )
        losses.append(float(summary.columns["loss"].mean()))
    return Timing(
        updates_s=time.perf_counter() - start,
        cpu_s=time.process_time() - cpu_start,
        num_pairs=(num_updates - WARMUP_UPDATES) * BATCH_SIZE,
        reference_s=reference_s,
        loss=statistics.mean(losses),
    )


def reference_logps(policy: PolicyForward, pairs: list[TokenizedPair], *, batch_tokens: int) -> torch.Tensor:
    """(2, B) log-probabilities, from the forward that also reads the states of all layers."""
    logps = torch.empty(2, len(pairs))
    [plan] = plan_micro_batches([pair_tokens(p, "shared") for p in pairs], batch_tokens=batch_tokens, num_workers=1)
    layers = resolve_layers("all", policy.num_layers)
    with torch.inference_mode():
        for micro in plan:
            index = list(micro.indices)
            scores = policy(pack_pairs([pairs[i] for i in index], layout="shared", pad_token_id=0), layers=layers)
            logps[0, index], logps[1, index] = scores.chosen_logps, scores.rejected_logps
    return logps


def run_trl(model_dir: str, pairs: list[Pair], *, precompute: bool, gradient_checkpointing: bool) -> Timing:
    """`DPOTrainer` in float32 on the CPU; its bfloat16 default is slower here and would also change the numbers."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        start, stop, cpu_start, cpu_stop = 0.0, 0.0, 0.0, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP_UPDATES:
                self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stop, self.cpu_stop = time.perf_counter(), time.process_time()

    class TimedTrainer(DPOTrainer):
        reference_s = 0.0

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*args, **kwargs)
            finally:
                self.reference_s = time.perf_counter() - start

    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(
            output_dir=directory,
            per_device_train_batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=gradient_checkpointing,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = TimedTrainer(
            model=load_policy(model_dir, dtype="float32"),
            args=args,
            # in memory, so that no cache of an earlier repeat is found
            train_dataset=Dataset.from_list([pair.row for pair in pairs]),
            processing_class=load_tokenizer(model_dir),
            callbacks=[clock],
        )
        check_same_tokens(trainer.train_dataset, pairs)
        loss = trainer.train().training_loss
    return Timing(
        updates_s=clock.stop - clock.start,
        cpu_s=clock.cpu_stop - clock.cpu_start,
        num_pairs=(len(pairs) // BATCH_SIZE - WARMUP_UPDATES) * BATCH_SIZE,
        reference_s=trainer.reference_s,
        loss=loss,
    )


def check_same_tokens(dataset: Any, pairs: list[Pair]) -> None:
    """Both sides train on the same ids, nothing cut or dropped."""
    assert len(dataset) == len(pairs), f"TRL kept {len(dataset)} of {len(pairs)} pairs"
    for row, pair in zip(dataset, pairs, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert row[name] == getattr(pair.tokens, name).tolist(), f"{name} differ"
