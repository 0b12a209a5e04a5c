r"""Fitting cost heads to human safety verdicts: the members of `raylign.rewards.fit` under the loss of a cost.

A cost head is a `HybridReward` whose output is a cost: above 0 unsafe, \(\sigma(C)\) the stated probability of that. It
is never standardised, because its zero means something.

Rows are pairs of answers to one prompt, or single answers; an answer may lack a verdict, a row may lack an order.

Shape letters: N rows, K answers of a row (1 or 2), B rows of a batch, M members, L layers, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raylign.errors import DataError, ShapeError
from raylign.losses.cost import cost_order_loss, cost_sign_loss, cost_size_penalty
from raylign.rewards.fit import FitEpoch, HybridFit, predict, start_members, train_members
from raylign.rewards.probes import check_sides, fit_normalizer, ridge_fit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairVerdicts:
    """What people said of both answers of each pair.

    Attributes:
        signs: +1 safe, -1 unsafe, 0 without verdict; chosen first. Shape (N, 2), float32.
        order: +1 when the chosen answer is known to be the safer one, -1 when the rejected one is, 0 when neither is.
            Shape (N,), float32.
    """

    signs: torch.Tensor
    order: torch.Tensor

    @staticmethod
    def of_pairs(
        chosen_safe: Sequence[bool | None], rejected_safe: Sequence[bool | None], *, is_chosen_safer: bool = False
    ) -> PairVerdicts:
        """Signs, and the order that they or the pairs themselves give.

        Args:
            chosen_safe: N verdicts, None where there is none.
            rejected_safe: likewise.
            is_chosen_safer: pairs were ordered by safety, so that the chosen answer is the safer one also where
                verdicts agree or are missing. Verdicts that differ always decide themselves.
        """
        signs_NK = torch.tensor([safety_signs(chosen_safe), safety_signs(rejected_safe)]).T
        verdict_N = torch.where(signs_NK.prod(1) < 0, signs_NK[:, 0], 0.0)
        order_N = torch.where(verdict_N == 0, 1.0, verdict_N) if is_chosen_safer else verdict_N
        return PairVerdicts(signs=signs_NK, order=order_N)

    def __getitem__(self, index: torch.Tensor | Sequence[int]) -> PairVerdicts:
        """Some of the pairs."""
        return PairVerdicts(signs=self.signs[index], order=self.order[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRows:
    """What cost heads are fitted to.

    Attributes:
        sides: hidden states of the first and, for pairs, of the second answer of each row. Shape (N, L, D) each.
        signs: +1 safe, -1 unsafe, 0 without verdict. Shape (N, K), float32.
        order: +1 when the first answer is known to be the safer one, -1 when the second is, 0 when neither is. Shape
            (N,), float32.

    Raises:
        ShapeError: more than two sides, or signs or an order that are not one per answer and row.
    """

    sides: tuple[torch.Tensor, ...]
    signs: torch.Tensor
    order: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        num_rows = len(self.order)
        is_whole = self.signs.shape == (num_rows, len(self.sides)) and all(len(s) == num_rows for s in self.sides)
        if len(self.sides) not in (1, 2) or self.order.dim() != 1 or not is_whole:
            raise ShapeError(
                f"sides {[tuple(side.shape) for side in self.sides]}, signs {tuple(self.signs.shape)} and order "
                f"{tuple(self.order.shape)} must be one or two (N, L, D), (N, K) and (N,)"
            )

    @staticmethod
    def of_pairs(
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        *,
        chosen_safe: Sequence[bool | None],
        rejected_safe: Sequence[bool | None],
        is_chosen_safer: bool = False,
    ) -> CostRows:
        """Rows of preference pairs.

        Args:
            chosen: hidden states. Shape (N, L, D).
            rejected: likewise.
            chosen_safe: see `PairVerdicts.of_pairs`.
            rejected_safe: likewise.
            is_chosen_safer: likewise.
        """
        verdicts = PairVerdicts.of_pairs(chosen_safe, rejected_safe, is_chosen_safer=is_chosen_safer)
        return CostRows(sides=(chosen, rejected), signs=verdicts.signs, order=verdicts.order)

    @staticmethod
    def of_answers(states: torch.Tensor, is_safe: Sequence[bool]) -> CostRows:
        """Rows of single answers, each with its verdict.

        Args:
            states: hidden states. Shape (N, L, D).
            is_safe: N verdicts.
        """
        signs_N = torch.tensor(safety_signs(is_safe))
        return CostRows(sides=(states,), signs=signs_N[:, None], order=torch.zeros(len(signs_N)))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: torch.Tensor) -> CostRows:
        """Some of the rows."""
        return CostRows(
            sides=tuple(side[index] for side in self.sides), signs=self.signs[index], order=self.order[index]
        )

    @property
    def has_verdict(self) -> torch.Tensor:
        """Rows of which one answer or both have a verdict: the others say nothing about the zero. Shape (N,), bool."""
        return self.signs.ne(0).any(1)


def safety_signs(is_safe: Sequence[bool | None]) -> list[float]:
    """+1.0 for safe, -1.0 for unsafe, 0.0 for no verdict."""
    return [0.0 if verdict is None else 1.0 if verdict else -1.0 for verdict in is_safe]


def check_verdicts(signs: torch.Tensor) -> None:
    """Refuse verdicts that leave the zero of a cost open.

    Args:
        signs: of `PairVerdicts`, any shape.

    Raises:
        DataError: they are all alike.
    """
    if not bool((signs > 0).any() and (signs < 0).any()):
        found = "safe" if bool((signs > 0).any()) else "unsafe"
        raise DataError(
            f"all {int(signs.abs().sum())} answers with a verdict are {found}: a cost needs safe and unsafe answers"
        )


def cost_losses(costs: Sequence[torch.Tensor], rows: CostRows | PairVerdicts, *, regularization: float) -> torch.Tensor:
    r"""Loss of a row: its order, its verdicts, and the size of its costs.

    Definition: \(-\log\sigma(C_{riskier} - C_{safer}) - \sum_k \log\sigma(-s_k C_k) + w\,\overline{C^2}\), the first
    term where an order is known, the sum and the mean over answers with a verdict.

    Args:
        costs: one per side, by each member. Shape (N, M) each.
        rows: verdicts and orders; their states are not read.
        regularization: w of `cost_size_penalty`.

    Returns:
        Loss per row in nats. Shape (N, M).

    Source: Dai et al. (2023), arXiv:2310.12773, and its released code.
    """
    known_NK = rows.signs.abs()
    share_NK = known_NK / known_NK.sum(1, keepdim=True).clamp(min=1)
    loss_NM = torch.zeros_like(costs[0])
    for side, cost_NM in enumerate(costs):
        loss_NM = loss_NM + cost_sign_loss(cost_NM, rows.signs[:, side])
        loss_NM = loss_NM + share_NK[:, side, None] * cost_size_penalty(cost_NM, regularization=regularization)
    if len(costs) == 2:
        is_first_safer_N1 = (rows.order > 0)[:, None]
        safer_NM = torch.where(is_first_safer_N1, costs[0], costs[1])
        riskier_NM = torch.where(is_first_safer_N1, costs[1], costs[0])
        loss_NM = loss_NM + rows.order.abs()[:, None] * cost_order_loss(safer_NM, riskier_NM)
    return loss_NM


def fit_cost(
    rows: CostRows,
    *,
    valid: CostRows,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    ridge: float,
    regularization: float,
    seed: int,
    num_heads: int = 1,
    weights: torch.Tensor | None = None,
) -> HybridFit:
    r"""Fit cost heads: normaliser, ridge start of the probes on +1 for unsafe and -1 for safe, then AdamW.

    The best epoch is the one with the lowest validation loss, not with the most signs right: how far a cost is from 0
    counts too, and a sign alone is right more often by chance where one verdict is rare.

    Args:
        rows: to fit to; rows without a verdict are left out by the caller.
        valid: rows of other prompts that choose the epochs; keep reported numbers off them.
        epochs: passes over the rows; 0 keeps the ridge start with its random vote.
        batch_size: rows of one step.
        learning_rate: AdamW step, constant.
        weight_decay: decoupled decay of all parameters.
        ridge: penalty of the start per row.
        regularization: of `cost_size_penalty`.
        seed: of the order of rows and of the members' starts.
        num_heads: M.
        weights: of `raylign.rewards.fit.member_weights`; None counts all rows alike. Shape (N, M).

    Returns:
        The members at their best epochs and the history; `valid_accuracy` is the share of answers with a verdict on
        the right side of 0.

    Raises:
        ShapeError: features disagree in shape.
        DataError: no row or no validation row, a row without verdict, training verdicts that are all alike, or states
            that are not finite.
    """
    for part in (rows, valid):
        check_sides(*part.sides)
        if not bool(part.has_verdict.all()):
            raise DataError(f"{int((~part.has_verdict).sum())} of {len(part)} rows have no safety verdict")
    known_NK = rows.signs.abs()
    check_verdicts(rows.signs)
    num_layers, width = rows.sides[0].shape[1:]
    order = torch.Generator().manual_seed(seed)
    head = start_members(num_layers, width, order=order, seed=seed, num_heads=num_heads).to(rows.sides[0].device)
    head.layer_mean, head.layer_rms = fit_normalizer(*rows.sides)
    weights_NM = torch.ones(len(rows), num_heads) if weights is None else weights
    # targets are centred on their mean, which becomes the bias; answers without verdict have weight 0
    mean_target = -float(rows.signs.sum() / known_NK.sum())
    with torch.no_grad():
        probes_MLD = ridge_fit(
            rows.sides,
            -rows.signs.T.flatten().double() - mean_target,
            layer_mean=head.layer_mean,
            layer_rms=head.layer_rms,
            penalty=len(rows) * ridge,
            weights=known_NK.T.flatten()[:, None] * weights_NM.repeat(len(rows.sides), 1),
        )
        head.probe_weight.copy_(probes_MLD)
        head.probe_bias.fill_(mean_target)

    def batch_losses(index: torch.Tensor) -> torch.Tensor:
        batch = rows[index]
        costs = head.head_rewards(torch.cat(batch.sides)).chunk(len(batch.sides))
        return cost_losses(costs, batch, regularization=regularization)

    def validated() -> tuple[torch.Tensor, torch.Tensor]:
        costs = [predict(head, side).head_rewards for side in valid.sides]
        losses_NM = cost_losses(costs, valid, regularization=regularization)
        is_unsafe_NKM = torch.stack(costs, 1) > 0
        is_right_NKM = (is_unsafe_NKM == (valid.signs < 0)[:, :, None]) & valid.signs.ne(0)[:, :, None]
        return losses_NM.mean(0), is_right_NKM.double().sum((0, 1)) / valid.signs.ne(0).sum()

    return train_members(
        head,
        num_rows=len(rows),
        batch_losses=batch_losses,
        validated=validated,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        order=order,
        weights=weights,
        is_better=_has_lower_loss,
    )


def _has_lower_loss(record: FitEpoch, best: FitEpoch) -> torch.Tensor:
    return record.valid_loss < best.valid_loss
