r"""Fine-tuning LoRA members of a cost model on human safety verdicts: the loss that their training loop steps on.

The loop, its orders and its weights are those of reward models. Cost > 0 is unsafe, cost <= 0 is safe.

Shape letters: N pairs, B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raylign.models.classifiers import ClassifierForward
from raylign.rewards.fit_cost import PairVerdicts, cost_losses
from raylign.training.reward_model import MemberTraining, weighted_batches
from raylign.types import TokenizedPair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CostObjective:
    r"""The sign-aware loss of a classifier whose one output is the cost, as `train_members` calls it.

    Definition: \(\sum_i w_i \ell_i / B\) with \(\ell\) of `cost_losses`. Pairs of weight 0 cost nothing.

    Attributes:
        verdicts: of all N pairs.
        regularization: weight of the squared cost, see `cost_size_penalty`.

    Source: Dai et al. (2023), arXiv:2310.12773, and its released code; there the whole model is trained.
    """

    verdicts: PairVerdicts
    regularization: float

    def __call__(
        self,
        forward: ClassifierForward,
        name: str,
        pairs: Sequence[TokenizedPair],
        rows: np.ndarray,
        weights_N: torch.Tensor,
        options: MemberTraining,
    ) -> float:
        """Add the gradient of one member's batch and return its loss.

        Args:
            forward: the members, this one active.
            name: of the member.
            pairs: all N pairs.
            rows: those of the batch. Shape (B,), int64.
            weights_N: of each pair for this member.
            options: token budget and layout.
        """
        total = 0.0
        for members, batch in weighted_batches(pairs, rows, weights_N, options, forward.device):
            chosen_B1, rejected_B1 = forward.forward_pairs(batch)[:, :, :1].cpu()
            verdicts = self.verdicts[members]
            losses_B1 = cost_losses([chosen_B1, rejected_B1], verdicts, regularization=self.regularization)
            loss = (weights_N[members] * losses_B1[:, 0]).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total
