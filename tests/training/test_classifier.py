"""The judge's loss, calibration and the folding of a bias into a head without one. Models are built here."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification

from raylign.errors import DataError, ShapeError
from raylign.training.classifier import (
    fit_platt,
    fold_calibration,
    labelled_batches,
    make_classifier_loss,
    predict_in_order,
)
from raylign.training.pretrain import Batch

ROWS = [([1, 5, 6, 2], 0), ([1, 7, 2], 1), ([1, 8, 9, 10, 11, 2], 1)]


@pytest.fixture
def model() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            num_labels=2,
        )
    ).eval()


def logit_difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 1] - logits[:, 0]


def test_loss_without_language_term_is_that_of_transformers(model):
    [batch] = labelled_batches(ROWS, max_tokens=100, pad_id=0, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model(input_ids=batch.input_ids).logits, batch.labels)
    torch.testing.assert_close(make_classifier_loss(lm_weight=0.0, label_smoothing=0.0)(model, batch), expected)


def test_language_term_scores_tokens_and_not_padding(model):
    loss_fn = make_classifier_loss(lm_weight=1.0, label_smoothing=0.0)
    plain = make_classifier_loss(lm_weight=0.0, label_smoothing=0.0)
    row = torch.tensor([[1, 7, 2]])
    padded = Batch(input_ids=F.pad(row, (0, 2)), labels=torch.tensor([1]), num_tokens=3)
    alone = Batch(input_ids=row, labels=torch.tensor([1]), num_tokens=3)
    torch.testing.assert_close(loss_fn(model, padded), loss_fn(model, alone))
    logits = model.base_model(input_ids=row).last_hidden_state @ model.get_input_embeddings().weight.T
    expected = -logits.log_softmax(-1)[0, [0, 1], [7, 2]].mean()
    torch.testing.assert_close(loss_fn(model, alone) - plain(model, alone), expected)


def test_loss_refuses_token_labels(model):
    batch = Batch(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]]), num_tokens=2)
    with pytest.raises(ShapeError, match=r"\(1, 2\)"):
        make_classifier_loss(lm_weight=0.0, label_smoothing=0.0)(model, batch)


def test_predictions_keep_the_order_and_equal_transformers(model):
    _, logits, labels = predict_in_order(model, ROWS, pad_id=0, batch_size=2)
    expected = [logit_difference(model(input_ids=torch.tensor([ids])).logits).item() for ids, _ in ROWS]
    assert labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(logits.float(), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="no rows"):
        predict_in_order(model, [], pad_id=0)


def test_platt_finds_the_closed_form_of_two_points():
    # At z = 1, three of four are unsafe; at z = -1, one of four: sigmoid(a + b) = 3/4, sigmoid(-a + b) = 1/4.
    logits = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    labels = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0])
    scale, shift = fit_platt(logits, labels, ridge=0.0)
    assert scale == pytest.approx(math.log(3.0))
    assert shift == pytest.approx(0.0, abs=1e-9)


def test_platt_balances_the_classes():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(4000) % 10 == 0).long()
    logits = 2 * labels - 1 + torch.randn(4000, generator=generator, dtype=torch.float64)
    scale, shift = fit_platt(logits, labels)
    # two unit Gaussians at +-1 have log-odds 2 z when the classes count the same, whatever their sizes
    assert scale == pytest.approx(2.0, abs=0.2)
    assert shift == pytest.approx(0.0, abs=0.2)


def test_platt_needs_both_classes():
    with pytest.raises(DataError, match="both classes"):
        fit_platt(torch.zeros(3, dtype=torch.float64), torch.zeros(3))


def test_folding_scales_exactly_and_shifts_on_average(model):
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randint(3, 16, (6,), generator=generator).tolist(), 0) for _ in range(300)]
    states, before, _ = predict_in_order(model, rows, pad_id=0)
    spread = fold_calibration(model, states, scale=2.0, shift=0.7)
    _, after, _ = predict_in_order(model, rows, pad_id=0)
    moved = after - 2.0 * before
    assert float(moved.mean()) == pytest.approx(0.7, abs=1e-4)
    assert float(moved.std()) == pytest.approx(spread, abs=1e-4)
