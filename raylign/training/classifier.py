"""Train and calibrate a safe/unsafe sequence classifier that plain transformers can load.

`LlamaForSequenceClassification` pools the last token that is not padding and maps it to two logits without a bias.
Shapes: B rows, L tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from raylign.errors import DataError, ShapeError
from raylign.training.pretrain import Batch, LossFn, bucket_indices, pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pooled_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Final hidden states of all tokens and of the pooled one.

    Args:
        model: sequence classifier with a `base_model`, a `score` head and a `config.pad_token_id`.
        batch: right-padded rows.

    Returns:
        (states (B, L, D), pooled states (B, D)).
    """
    states_BLD = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    is_token_BL = batch.input_ids != model.config.pad_token_id
    last_B = (is_token_BL * torch.arange(is_token_BL.shape[1])).argmax(-1)
    return states_BLD, states_BLD[torch.arange(len(last_B)), last_B]


def make_classifier_loss(*, lm_weight: float, label_smoothing: float) -> LossFn:
    """Cross entropy of the class labels plus the language-modelling loss of the same rows.

    Definition: CE(score(h_last), label) + lm_weight * mean_t -log p(y_t | y_<t), with the input embedding as the
    output embedding. The second term keeps a small model from forgetting the language on a few thousand labels.

    Args:
        lm_weight: weight of the auxiliary term; 0 leaves it out.
        label_smoothing: share of the target moved to the other class.

    Returns:
        Loss function for `raylign.training.pretrain.fit` on batches whose labels have shape (B,).

    Source: auxiliary objective of Radford et al. (2018), "Improving Language Understanding by Generative
    Pre-Training", Eq. 5.
    """

    def classifier_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        if batch.labels.ndim != 1:
            raise ShapeError(f"class labels must have shape (B,), found {tuple(batch.labels.shape)}")
        states_BLD, pooled_BD = pooled_states(model, batch)
        loss = F.cross_entropy(model.score(pooled_BD).float(), batch.labels, label_smoothing=label_smoothing)
        if not lm_weight:
            return loss
        logits_BLV = states_BLD[:, :-1] @ model.get_input_embeddings().weight.T
        return loss + lm_weight * F.cross_entropy(
            logits_BLV.float().flatten(0, 1),
            batch.input_ids[:, 1:].flatten(),
            ignore_index=model.config.pad_token_id,
        )

    return classifier_loss


def labelled_batches(
    rows: Sequence[tuple[Sequence[int], int]], *, max_tokens: int, pad_id: int, generator: torch.Generator
) -> Iterator[Batch]:
    """One epoch of rows with one class label each, batched by length.

    Args:
        rows: (token ids, class) per row.
        max_tokens: padded tokens per batch.
        pad_id: id of the padding.
        generator: order of the epoch.

    Yields:
        Right-padded batches with labels of shape (B,).
    """
    for group in bucket_indices([len(ids) for ids, _ in rows], max_tokens=max_tokens, generator=generator):
        ids = [rows[index][0] for index in group]
        yield Batch(
            input_ids=pad_rows(ids, pad_id),
            labels=torch.tensor([rows[index][1] for index in group]),
            num_tokens=sum(map(len, ids)),
        )


@torch.no_grad()
def predict_in_order(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], int]], *, pad_id: int, batch_size: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled states, logit differences and labels, in the order of the rows.

    Args:
        model: sequence classifier.
        rows: (token ids, class) per row.
        pad_id: id of the padding.
        batch_size: rows per forward pass.

    Returns:
        (states (N, D) float64, logit(unsafe) - logit(safe) (N,) float64, labels (N,) int64).

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("no rows to classify: the labels after filtering and splitting are empty")
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    states_ND = torch.empty(len(rows), model.config.hidden_size, dtype=torch.float64)
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        input_ids = pad_rows([rows[index][0] for index in group], pad_id)
        batch = Batch(input_ids=input_ids, labels=torch.zeros(len(group)), num_tokens=input_ids.numel())
        states_ND[group] = pooled_states(model, batch)[1].double()
    logits_N2 = states_ND @ model.score.weight.double().T
    return states_ND, logits_N2[:, 1] - logits_N2[:, 0], torch.tensor([label for _, label in rows])


def fit_platt(logit_difference: Tensor, labels: Tensor, *, ridge: float = 1e-3) -> tuple[float, float]:
    """Scale and shift that calibrate a logit for balanced classes.

    Definition: argmin over (a, b) of the class-balanced mean of log(1 + exp(-s (a z + b))), s = +-1, by Newton steps.

    Args:
        logit_difference: z = logit(unsafe) - logit(safe), shape (N,), float64.
        labels: 1 for unsafe, shape (N,).
        ridge: pull of (a, b) towards (1, 0), which keeps separable data finite.

    Returns:
        (a, b).

    Raises:
        DataError: a class is missing.

    Source: Platt (1999), without the target smoothing.
    """
    targets = labels.to(logit_difference.dtype)
    num_unsafe = float(targets.sum())
    if not 0 < num_unsafe < len(targets):
        raise DataError(f"calibration needs both classes, found {int(num_unsafe)} unsafe of {len(targets)} rows")
    weights = torch.where(targets > 0, 0.5 / num_unsafe, 0.5 / (len(targets) - num_unsafe))
    design = torch.stack([logit_difference, torch.ones_like(logit_difference)], dim=1)
    start = torch.tensor([1.0, 0.0], dtype=design.dtype)
    parameters = start.clone()
    for _ in range(50):
        probability = torch.sigmoid(design @ parameters)
        gradient = design.T @ (weights * (probability - targets)) + ridge * (parameters - start)
        curvature = (design * (weights * probability * (1 - probability))[:, None]).T @ design
        parameters = parameters - torch.linalg.solve(curvature + ridge * torch.eye(2, dtype=design.dtype), gradient)
    return float(parameters[0]), float(parameters[1])


@torch.no_grad()
def fold_calibration(model: PreTrainedModel, states: Tensor, *, scale: float, shift: float) -> float:
    """Write a calibration into the bias-free head, so that a zero logit difference is the balanced decision.

    The scale multiplies the weights. The shift needs a bias the head lacks; the direction v = S^-1 m / (m' S^-1 m),
    m and S the mean and covariance of the pooled states, has v'h = 1 on average with the least variance over h, and
    takes its place.

    Args:
        model: sequence classifier, changed in place.
        states: pooled states to take mean and covariance from, shape (N, D), float64.
        scale: a of `fit_platt`.
        shift: b of `fit_platt`.

    Returns:
        Standard deviation over rows of the shift that was meant to be constant, in logits.
    """
    mean_D = states.mean(0)
    covariance_DD = torch.cov(states.T)
    jitter = 1e-4 * covariance_DD.diagonal().mean()
    solved_D = torch.linalg.solve(covariance_DD + jitter * torch.eye(len(mean_D), dtype=states.dtype), mean_D)
    direction_D = solved_D / (mean_D @ solved_D)
    weight_2D = model.score.weight.double() * scale
    weight_2D[1] += 0.5 * shift * direction_D
    weight_2D[0] -= 0.5 * shift * direction_D
    model.score.weight.copy_(weight_2D)
    return float((states @ direction_D * shift).std())
