"""Somebody's safety classifier as a cost of token ids: the log-odds of unsafe, above 0 unsafe.

Shape letters: n sequences, B pairs, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raylign.errors import ModelError
from raylign.evaluation.judges import cost_from_logits, unsafe_columns
from raylign.models.classifiers import ClassifierForward
from raylign.types import PackedBatch


class CostForward(ClassifierForward):
    """A sequence classifier whose one output is the cost, as safety judges read it.

    The cost is the log-odds of the outputs that mean unsafe, the largest of them where labels do not exclude each
    other, and the output itself where there is only one; minus `cost_threshold` of the classifier's configuration, if
    it names one.

    Args:
        model: transformers sequence classifier.
        label: the output that means unsafe; None takes all whose labels read so, such as "unsafe" or "toxic".
        where: names the classifier in messages.
        autocast_dtype: see `ClassifierForward`.

    Raises:
        ModelError: a label that the classifier does not have, or labels of which none, or all, read as unsafe.
    """

    _columns: tuple[int, ...] | None = None  # None until built: the parent compares raw outputs

    def __init__(
        self, model: nn.Module, *, label: str | None, where: str, autocast_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(model, autocast_dtype=autocast_dtype)
        config = self.classifier.config
        self._is_multi_label = config.problem_type == "multi_label_classification"
        self._threshold = float(getattr(config, "cost_threshold", 0.0))
        self._columns = tuple(unsafe_columns(config, where=where) if label is None else _labelled(config, label, where))

    def forward(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Costs of n sequences. Shape (n, 1), float32."""
        return self._cost(super().forward(sequences))

    def forward_pairs(self, batch: PackedBatch) -> torch.Tensor:
        """Costs of both responses of B pairs. Shape (2, B, 1), float32, chosen first."""
        return self._cost(super().forward_pairs(batch))

    def _cost(self, outputs: torch.Tensor) -> torch.Tensor:
        if self._columns is None:
            return outputs
        logits = outputs.reshape(-1, outputs.shape[-1])
        cost = cost_from_logits(logits, self._columns, is_multi_label=self._is_multi_label) - self._threshold
        return cost.reshape(*outputs.shape[:-1], 1)


def _labelled(config: Any, label: str, where: str) -> list[int]:
    labels = {int(column): str(name) for column, name in config.id2label.items()}
    columns = [column for column, name in labels.items() if name == label]
    if not columns:
        raise ModelError(f"{where} has the labels {list(labels.values())}, not {label!r} (config key cost_model.label)")
    return columns if len(labels) > 1 else []
