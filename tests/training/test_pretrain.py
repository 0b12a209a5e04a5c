"""The plain training loop: packing, batching, schedule, budget. Models are a few parameters built here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from raylign.errors import ConfigError, DataError
from raylign.training.pretrain import (
    Batch,
    FitConfig,
    bucket_indices,
    causal_lm_loss,
    fit,
    heldout_loss,
    learning_rate_at,
    masked_batches,
    pack_blocks,
    repeat_epochs,
)
from raylign.types import IGNORE_INDEX


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_blocks_hold_every_token_in_order_but_the_last_few():
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    batches = list(pack_blocks(rows, block_size=3, batch_size=2, generator=None))
    assert [batch.input_ids.tolist() for batch in batches] == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9]]]
    assert [batch.num_tokens for batch in batches] == [6, 3]


def test_shuffled_blocks_are_reproducible_and_complete():
    rows = [[n] * 4 for n in range(20)]
    first, second = (
        torch.cat([b.input_ids for b in pack_blocks(rows, block_size=4, batch_size=3, generator=generator())])
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert sorted(first[:, 0].tolist()) == list(range(20))
    assert first[:, 0].tolist() != list(range(20))


def test_buckets_hold_every_row_once_within_the_token_limit():
    lengths = [3, 9, 4, 4, 30, 7, 1, 2]
    groups = list(bucket_indices(lengths, max_tokens=20, generator=generator()))
    assert sorted(itertools.chain(*groups)) == list(range(8))
    # row 4 is longer than the limit and stands alone
    assert all(len(group) * max(lengths[i] for i in group) <= 20 or group == [4] for group in groups)


def test_no_rows_give_no_batches():
    assert list(masked_batches([], max_tokens=8, pad_id=0, generator=generator())) == []
    assert list(repeat_epochs(list)) == []


def test_padding_does_not_change_the_loss(model):
    row = ([1, 5, 6, 7], [IGNORE_INDEX, IGNORE_INDEX, 6, 7])
    longer = ([1, 5, 6, 7, 8, 9], [IGNORE_INDEX] * 6)
    [alone] = masked_batches([row], max_tokens=100, pad_id=0, generator=generator())
    [padded] = masked_batches([row, longer], max_tokens=100, pad_id=0, generator=generator())
    assert padded.input_ids.shape == (2, 6)
    torch.testing.assert_close(causal_lm_loss(model, alone), causal_lm_loss(model, padded))


def test_loss_is_the_mean_negative_log_probability_of_scored_tokens(model):
    ids = torch.tensor([[1, 2, 3]])
    logps = model(input_ids=ids).logits.log_softmax(-1)
    batch = Batch(input_ids=ids, labels=torch.tensor([[IGNORE_INDEX, 2, 3]]), num_tokens=3)
    torch.testing.assert_close(causal_lm_loss(model, batch), -(logps[0, 0, 2] + logps[0, 1, 3]) / 2)
    loss, num_scored = heldout_loss(model, [batch])
    assert num_scored == 2
    assert loss == pytest.approx(causal_lm_loss(model, batch).item())


def test_schedule_warms_up_and_decays_to_zero():
    config = FitConfig(num_tokens=1, learning_rate=2.0, warmup_fraction=0.1)
    assert learning_rate_at(0.0, config) > 0
    assert learning_rate_at(0.05, config) == pytest.approx(1.0)
    assert learning_rate_at(0.1, config) == pytest.approx(2.0)
    assert learning_rate_at(0.55, config) == pytest.approx(1.0)
    assert learning_rate_at(1.0, config) == pytest.approx(0.0, abs=1e-12)


def test_fit_stops_at_its_budget_and_learns(model):
    rows = [[1, 2, 3, 4, 5, 6, 7, 8]] * 8
    seen: list[int] = []
    summary = fit(
        model,
        repeat_epochs(lambda: pack_blocks(rows, block_size=8, batch_size=2, generator=None)),
        causal_lm_loss,
        FitConfig(num_tokens=16 * 60, learning_rate=1e-2),
        on_step=lambda step, num_tokens, loss: seen.append(num_tokens),
    )
    assert summary.num_tokens == 16 * 60 == seen[-1]
    assert summary.num_steps == 60 == len(seen)
    assert summary.final_loss < 0.5 * math.log(16)


def test_average_of_constant_gradients_lags_behind_the_last_weights():
    def run(decay: float) -> float:
        weight = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(weight.weight)
        batch = Batch(input_ids=torch.zeros(1, 1), labels=torch.zeros(1), num_tokens=1)
        config = FitConfig(num_tokens=20, weight_decay=0.0, average_decay=decay)
        fit(weight, repeat_epochs(lambda: [batch]), lambda module, _: -module.weight.sum(), config)
        return weight.weight.item()

    assert 0 < run(0.9) < run(0.0)


def test_fit_without_batches_says_so(model):
    with pytest.raises(DataError, match="no batches"):
        fit(model, [], causal_lm_loss, FitConfig(num_tokens=10))


@pytest.mark.parametrize(
    "wrong", [{"num_tokens": 0}, {"num_tokens": 1, "max_seconds": 0.0}, {"num_tokens": 1, "average_decay": 1.0}]
)
def test_config_refuses_budgets_that_cannot_be_spent(wrong):
    with pytest.raises(ConfigError, match=next(reversed(wrong))):
        FitConfig(**wrong)
