"""Measurements for the model cards: judge quality, probes of hidden states, sampled answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.asset_corpus import Messages, hash_share
from launch.asset_tokens import document_rows
from raylign.errors import DataError
from raylign.evaluation.generation import generate_responses
from raylign.evaluation.metrics import auroc, binary_calibration_error
from raylign.evaluation.prompts import EvaluationPrompt
from raylign.evaluation.refusal import is_refusal
from raylign.training.classifier import predict_in_order
from raylign.training.pretrain import pad_rows


def judge_metrics(logits: Tensor, labels: Tensor, sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUC, accuracies and calibration error over all rows and per source.

    Args:
        logits: logit(unsafe) - logit(safe), shape (N,).
        labels: 1 for unsafe, shape (N,).
        sources: source per row, length N.

    Returns:
        Metrics by "all" and source; AUC and balanced accuracy are NaN where a class is missing.
    """
    names = np.asarray(sources)
    groups = {"all": np.ones(len(names), dtype=bool)} | {name: names == name for name in sorted(set(sources))}
    z, y = logits.numpy(), labels.numpy()
    return {name: _binary_metrics(z[mask], y[mask]) for name, mask in groups.items()}


@torch.no_grad()
def end_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], *, batch_size: int = 16
) -> np.ndarray:
    """Hidden states of every layer at the last token of each chat.

    Args:
        model: causal LM.
        tokenizer: its tokenizer.
        chats: conversations ending with the assistant.
        batch_size: rows per forward pass.

    Returns:
        Shape (N, num_layers + 1, D), float64; index 0 is the embedding.
    """
    rows = [ids[-1024:] for ids in document_rows(tokenizer, chats)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    states: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        input_ids = pad_rows([rows[index] for index in group], int(tokenizer.pad_token_id))
        layers = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states
        last = torch.tensor([len(rows[index]) - 1 for index in group])
        picked = torch.stack([layer[torch.arange(len(group)), last] for layer in layers], dim=1)
        states.update(zip(group, picked.double().numpy(), strict=True))
    return np.stack([states[index] for index in range(len(rows))])


def probe_accuracy(
    states: np.ndarray, labels: np.ndarray, groups: Sequence[str], *, num_folds: int = 5, ridge: float = 1.0
) -> list[float]:
    """Cross-validated accuracy of a ridge classifier per layer, folds by group.

    Args:
        states: shape (N, L, D).
        labels: +1 or -1, shape (N,); for pair differences use both signs of each difference.
        groups: rows of one group (one prompt) share a fold.
        num_folds: folds.
        ridge: penalty on standardised features, times the number of training rows / 100.

    Returns:
        Accuracy per layer, length L.

    Raises:
        DataError: fewer rows than folds.
    """
    if len(labels) < num_folds:
        raise DataError(f"{len(labels)} rows are too few for {num_folds} folds")
    folds = np.array([int(hash_share(group, "probe-folds") * num_folds) for group in groups])
    accuracies = []
    for layer in range(states.shape[1]):
        num_correct = 0
        for fold in range(num_folds):
            train, test = folds != fold, folds == fold
            if not test.any():
                continue
            mean, std = states[train, layer].mean(0), states[train, layer].std(0) + 1e-8
            x = (states[train, layer] - mean) / std
            penalty = ridge * len(x) / 100 * np.eye(x.shape[1])
            offset = labels[train].mean()
            weights = np.linalg.solve(x.T @ x + penalty, x.T @ (labels[train] - offset))
            predicted = (states[test, layer] - mean) / std @ weights + offset
            num_correct += int(((predicted > 0) == (labels[test] > 0)).sum())
        accuracies.append(num_correct / len(labels))
    return accuracies


@dataclass(frozen=True, kw_only=True)
class SampledAnswers:
    """Sampled answers to one kind of prompt, with what judge and refusal detector say.

    Attributes:
        prompts: user turns.
        answers: one answer per prompt.
        unsafe_share: share the judge calls unsafe.
        refusal_share: share the detector calls a refusal.
        ended_share: share that ended before the limit.
        num_tokens: mean answer length in tokens.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    unsafe_share: float
    refusal_share: float
    ended_share: float
    num_tokens: float


def sampled_answers(
    model: PreTrainedModel,
    judge: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvaluationPrompt],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> SampledAnswers:
    """Sample one answer per prompt and classify it.

    Args:
        model: causal LM.
        judge: sequence classifier with the same tokenizer.
        tokenizer: tokenizer of both.
        prompts: what to answer; at least one.
        temperature: sampling temperature; 0 is greedy.
        max_new_tokens: generation limit.
        seed: of the sampling.

    Returns:
        Answers and shares.
    """
    responses = generate_responses(
        model,
        tokenizer,
        [prompt.messages for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=32,
        seed=seed,
    )
    chats = [
        [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": response.text}]
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    is_unsafe = unsafe_logits(judge, tokenizer, chats) > 0
    num = len(responses)
    return SampledAnswers(
        prompts=tuple(prompt.text for prompt in prompts),
        answers=tuple(response.text for response in responses),
        unsafe_share=float(is_unsafe.mean()),
        refusal_share=sum(is_refusal(response.text) for response in responses) / num,
        ended_share=sum(response.reached_end for response in responses) / num,
        num_tokens=sum(len(response.response_ids) for response in responses) / num,
    )


def unsafe_logits(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages]) -> np.ndarray:
    """logit(unsafe) - logit(safe) of conversations.

    Args:
        judge: sequence classifier.
        tokenizer: its tokenizer.
        chats: prompt and response each.

    Returns:
        Shape (N,), float64; > 0 is unsafe.
    """
    rows = [(ids[-1024:], 0) for ids in document_rows(tokenizer, chats)]
    logits: np.ndarray = predict_in_order(judge, rows, pad_id=int(tokenizer.pad_token_id))[1].numpy()
    return logits


def _binary_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    is_unsafe = labels == 1
    called = logits > 0
    recalls = [
        float((called == value)[is_unsafe == value].mean()) if (is_unsafe == value).any() else float("nan")
        for value in (True, False)
    ]
    return {
        "num_rows": len(labels),
        "unsafe_share": float(is_unsafe.mean()),
        "auc": auroc(logits[is_unsafe], logits[~is_unsafe]),
        "accuracy": float((called == is_unsafe).mean()),
        "balanced_accuracy": sum(recalls) / 2,
        "ece": binary_calibration_error(1 / (1 + np.exp(-logits)), labels),
    }
