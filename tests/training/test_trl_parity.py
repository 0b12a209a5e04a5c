"""The trainer's update is TRL's: one batch's loss and gradients, and a trajectory of 50 updates.

Real on both sides: `DPOTrainer` with its own tokenization, collation, loss, clipping, optimiser and schedule, and
raylign's packed forward and `offline_update`. Float32, because TRL's head function works in it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

trl = pytest.importorskip("trl", reason="TRL is in the extra 'bench'")

from raylign.config import TrainSection  # noqa: E402
from raylign.data.packing import pack_pairs  # noqa: E402
from raylign.losses.preference import dpo, logp_margin  # noqa: E402
from raylign.models.forward import PolicyForward  # noqa: E402
from raylign.models.loading import load_policy, load_tokenizer, resolve_model  # noqa: E402
from raylign.training.micro_batches import Packing  # noqa: E402
from raylign.training.offline import offline_update  # noqa: E402
from raylign.training.optim import build_optimizer  # noqa: E402
from raylign.training.table import PairBatch  # noqa: E402
from raylign.types import TokenizedPair  # noqa: E402

# TRL, datasets and accelerate warn about their own internals
pytestmark = pytest.mark.filterwarnings("ignore")

BATCH_SIZE = 4
NUM_UPDATES = 50
BETA = 0.1
LEARNING_RATE = 5e-3
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "me", "so", "gave", "some", "milk")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with the embedded tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(resolve_model("embedded"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_rows(num_rows: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def text(words: tuple[str, ...] = WORDS) -> str:
        return " ".join(rng.choice(words, rng.integers(2, 12)))

    # answers of other words, so that there is something to learn
    half = len(WORDS) // 2

    return [
        {
            "prompt": [{"role": "user", "content": text()}],
            "chosen": [{"role": "assistant", "content": text(WORDS[:half])}],
            "rejected": [{"role": "assistant", "content": text(WORDS[half:])}],
        }
        for _ in range(num_rows)
    ]


def make_trainer(model_path: str, output_dir: Path, num_rows: int, **options: Any) -> Any:
    from datasets import Dataset

    args = trl.DPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=NUM_UPDATES,
        train_sampling_strategy="sequential",
        logging_steps=1,
        lr_scheduler_type="linear",
        beta=BETA,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return trl.DPOTrainer(
        model=load_policy(model_path, dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list(make_rows(num_rows)),
        processing_class=load_tokenizer(model_path),
    )


def tokens_of(trainer: Any) -> list[TokenizedPair]:
    """The ids that TRL made, so that only what follows tokenization is compared."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [TokenizedPair(**{n: np.asarray(row[n], np.int32) for n in names}) for row in trainer.train_dataset]


def perturb(model: torch.nn.Module) -> None:
    """Move a policy away from its reference, where the margin is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2.0 * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean())


def test_loss_and_gradients_of_one_batch(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, BATCH_SIZE, gradient_checkpointing=False)
    perturb(trainer.model)
    ours = copy.deepcopy(trainer.model)
    [batch] = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    packed = pack_pairs(tokens_of(trainer), layout="shared", pad_token_id=0)
    with torch.no_grad():
        reference = PolicyForward(trainer.ref_model)(packed)
    scores = PolicyForward(ours)(packed)
    margin = logp_margin(scores.chosen_logps, scores.rejected_logps, reference.chosen_logps, reference.rejected_logps)
    our_loss = dpo(margin, beta=BETA).mean()
    our_loss.backward()

    assert abs(float(loss) - np.log(2)) > 1e-3, "the policy equals its reference: nothing is compared"
    torch.testing.assert_close(our_loss, loss.detach(), rtol=1e-5, atol=1e-6)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
def test_trajectory_of_fifty_updates(model_path: str, tmp_path: Path) -> None:
    trainer = make_trainer(model_path, tmp_path, NUM_UPDATES * BATCH_SIZE)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    pairs = tokens_of(trainer)
    policy = PolicyForward(load_policy(model_path, dtype="float32"))
    reference = PolicyForward(load_policy(model_path, dtype="float32"))
    optimizer = build_optimizer(policy, learning_rate=LEARNING_RATE, weight_decay=0.0)
    # the schedule of transformers: the first update runs at the peak, the last one just above zero
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / NUM_UPDATES)
    packing = Packing(layout="shared", pad_token_id=0, batch_tokens=4096)
    ours = []
    for update in range(NUM_UPDATES):
        tokens = pairs[update * BATCH_SIZE : (update + 1) * BATCH_SIZE]
        with torch.no_grad():
            scores = reference(pack_pairs(tokens, layout="shared", pad_token_id=0))
        batch = PairBatch(
            tokens=tokens,
            ref_chosen_logps=scores.chosen_logps,
            ref_rejected_logps=scores.rejected_logps,
            label_confidence=None,
            fold=torch.full((BATCH_SIZE,), -1),
            weight=torch.ones(BATCH_SIZE),
        )
        summary = offline_update(
            policy,
            optimizer,
            scheduler,
            batch,
            update=update,
            settings=TrainSection(objective="dpo", beta=BETA),
            packing=packing,
            seed=0,
        )
        ours.append(float(summary.columns["loss"].mean()))

    assert len(theirs) == NUM_UPDATES
    assert max(theirs) - min(theirs) > 0.3, "nothing was learned: a trajectory of constants proves nothing"
    # the same sums in another order; 2.5e-7 apart when written
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    final = dict(trainer.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter, final[name], rtol=1e-3, atol=1e-4)
