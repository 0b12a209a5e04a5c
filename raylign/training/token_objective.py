r"""What members that reward tokens learn from: Bradley-Terry on the score, or the variational objective of AVA.

Shape letters: N pairs, B pairs of a batch, n = 2B sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from raylign.config import AvaSection
from raylign.losses.ava import AvaCounts, AvaShares, ava_shares, ava_sums
from raylign.losses.reward import anchor_loss, margin_loss
from raylign.losses.variational import TdScale, sequence_score, td_errors, td_moments
from raylign.models.token_forward import TokenOutputs, TokenRewardForward
from raylign.training.reward_model import MemberTraining, weighted_batches
from raylign.types import PackedBatch, TokenizedPair

NUM_RECORDS = 4  # per member; each one costs a backward pass of the batch per term


@dataclass(frozen=True, slots=True, kw_only=True)
class TermRecord:
    """What one update of one member was made of.

    Attributes:
        update: from 1.
        terms: each term of the objective, as weighted there, nats; they are maximised.
        grad_norms: norm of each term's gradient on the member's adapter. A term with a far larger one than the others
            is what the trunk learns, and the other heads read what is left.
        head_grad_norms: likewise on the reward head.
        sigma_mean: mean sigma over the tokens of the batch, reward units.
        sigma_min: smallest sigma.
        td_std: deviation that TD errors were divided by, nats; 1 when they are not standardised.
    """

    update: int
    terms: Mapping[str, float]
    grad_norms: Mapping[str, float]
    head_grad_norms: Mapping[str, float]
    sigma_mean: float
    sigma_min: float
    td_std: float


class BradleyTerryTokens:
    """Bradley-Terry on the score of the tokens' rewards, with the anchor of `bradley_terry_backward`.

    Args:
        score: how rewards of tokens become that of a response.
    """

    def __init__(self, score: Literal["last", "sum", "mean"]) -> None:
        self._score = score

    def __call__(
        self,
        forward: TokenRewardForward,
        name: str,
        pairs: Sequence[TokenizedPair],
        rows: np.ndarray,
        weights_N: torch.Tensor,
        options: MemberTraining,
    ) -> float:
        """Add the gradient of one member's batch and return its loss, see `train_members`."""
        total = 0.0
        for members, batch in weighted_batches(pairs, rows, weights_N, options, forward.device):
            outputs = forward.read(batch)
            score_n = sequence_score(outputs.mu, outputs.sequence, outputs.num_sequences, rule=self._score)
            chosen_B, rejected_B = score_n.chunk(2)
            pair_loss_B = margin_loss(chosen_B, rejected_B, margin_target=0.0)
            pair_loss_B = pair_loss_B + options.anchor_weight * anchor_loss(chosen_B, rejected_B)
            loss = (weights_N[members].to(pair_loss_B.device) * pair_loss_B).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total


class AvaObjective:
    """The variational objective, and what it remembers of each member.

    Token means are over the tokens of the whole batch: sums of micro-batches are divided by its counts. The deviation
    that standardises TD errors is that of the updates before, so that it does not depend on how a batch is cut. The
    first batch is read twice for its own: undivided errors of several nats would start Adam with a gradient so large
    that its steps stay small for hundreds of updates.

    Args:
        settings: coefficients and forms.
        has_rejected: pairs (ava_p), or chosen responses alone as demonstrations (ava_d).

    Attributes:
        records: of each member by its name, `NUM_RECORDS` over its updates.
    """

    def __init__(self, settings: AvaSection, *, has_rejected: bool) -> None:
        self._settings = settings
        self._has_rejected = has_rejected
        self._has_scale = settings.standardize_td and settings.irl_weight * settings.td_weight > 0
        self._scales: dict[str, TdScale] = {}
        self._num_updates: dict[str, int] = {}
        self.records: dict[str, list[TermRecord]] = {}

    def __call__(
        self,
        forward: TokenRewardForward,
        name: str,
        pairs: Sequence[TokenizedPair],
        rows: np.ndarray,
        weights_N: torch.Tensor,
        options: MemberTraining,
    ) -> float:
        """Add the gradient of one member's batch and return its loss, see `train_members`."""
        read = {int(row): pairs[row] if self._has_rejected else _demonstration(pairs[row]) for row in rows}
        update = self._num_updates.get(name, 0)
        scale = self._scales.get(name, TdScale())
        is_first = self._has_scale and scale.count == 0
        if is_first:
            scale = self._first_scale(forward, read, rows, weights_N, options)
        td_std = scale.std if self._has_scale else 1.0
        tally = _Tally(forward, name) if _is_recorded(update, len(pairs), options) else None
        counts = AvaCounts(
            chosen_tokens=sum(len(pairs[row].chosen_ids) for row in rows),
            rejected_tokens=sum(len(pairs[row].rejected_ids) for row in rows) if self._has_rejected else 0,
            num_responses=len(rows),
        )
        moments_3 = torch.zeros(3, dtype=torch.float64)
        total = 0.0
        for members, batch in weighted_batches(read, rows, weights_N, options, forward.device):
            outputs = self._read(forward, batch)
            weights_B = weights_N[members].to(outputs.mu.device)
            shares = self._shares(outputs, weights_B, counts, td_std)
            if tally is not None:
                tally.add(shares, outputs)
            shares.loss.backward()  # type: ignore[no-untyped-call]
            total += float(shares.loss.detach())
            moments_3 += self._moments(outputs)
        self._scales[name] = scale if is_first else _updated(scale, moments_3)
        self._num_updates[name] = update + 1
        if tally is not None:
            self.records.setdefault(name, []).append(tally.record(update=update + 1, td_std=td_std))
        return total

    @torch.no_grad()
    def _first_scale(
        self,
        forward: TokenRewardForward,
        pairs: Mapping[int, TokenizedPair],
        rows: np.ndarray,
        weights_N: torch.Tensor,
        options: MemberTraining,
    ) -> TdScale:
        """Of the first batch by the member that nothing has trained yet."""
        moments_3 = torch.zeros(3, dtype=torch.float64)
        for _, batch in weighted_batches(pairs, rows, weights_N, options, forward.device):
            moments_3 += self._moments(self._read(forward, batch))
        return _updated(TdScale(), moments_3)

    def _read(self, forward: TokenRewardForward, batch: PackedBatch) -> TokenOutputs:
        """What the member says of the responses that count."""
        outputs = forward.read(batch)
        return outputs if self._has_rejected else _first_sequences(outputs, batch.num_pairs)

    def _shares(self, outputs: TokenOutputs, weights_B: torch.Tensor, counts: AvaCounts, td_std: float) -> AvaShares:
        """Shares of the batch's terms, each 0-d."""
        ava = self._settings
        assert outputs.q is not None and outputs.sigma is not None
        sums = ava_sums(
            outputs.q,
            outputs.mu,
            outputs.sigma,
            outputs.sequence,
            len(weights_B),
            has_rejected=self._has_rejected,
            discount=ava.discount,
            terminal=ava.terminal,
            likelihood_weight=ava.likelihood_weight,
            negative=ava.negative,
            cer=ava.cer,
            td_std=td_std,
            detach_q=ava.detach_q,
            logprob_N=outputs.log_likelihood,
            per_pair=True,
        )
        shares = ava_shares(
            sums,
            counts,
            terminal=ava.terminal,
            irl_weight=ava.irl_weight,
            td_weight=ava.td_weight,
            cer_weight=ava.cer_weight,
        )
        return AvaShares(**{name: (weights_B * values_B).sum() for name, values_B in _by_name(shares).items()})

    def _moments(self, outputs: TokenOutputs) -> torch.Tensor:
        assert outputs.q is not None
        ava = self._settings
        errors = td_errors(outputs.q.detach(), outputs.sequence, discount=ava.discount, terminal=ava.terminal)
        return td_moments(*errors).cpu()


def _updated(scale: TdScale, moments_3: torch.Tensor) -> TdScale:
    count, total, squares = moments_3.tolist()
    return scale.updated(count=count, total=total, squares=squares)


class _Tally:
    """Terms of one batch over its micro-batches, and their gradients on one member's adapter and reward head."""

    def __init__(self, forward: TokenRewardForward, name: str) -> None:
        self._parameters: list[nn.Parameter] = [
            parameter
            for parameter_name, parameter in forward.model.named_parameters()
            if ".lora_" in parameter_name and f".{name}." in parameter_name
        ]
        self._num_adapter = len(self._parameters)
        heads: Any = forward.heads[name]
        self._parameters += heads.reward.parameters()
        self._terms: dict[str, float] = {}
        self._gradients: dict[str, list[torch.Tensor]] = {}
        self._sigmas: list[torch.Tensor] = []

    def add(self, shares: AvaShares, outputs: TokenOutputs) -> None:
        """Count a micro-batch; the graph is kept for its backward pass."""
        assert outputs.sigma is not None
        self._sigmas.append(outputs.sigma.detach())
        for name, value in _by_name(shares).items():
            self._terms[name] = self._terms.get(name, 0.0) + float(value.detach())
            if not value.requires_grad:  # a term that the objective leaves out
                continue
            found = torch.autograd.grad(value, self._parameters, retain_graph=True, allow_unused=True)
            gradients = [
                torch.zeros_like(parameter) if gradient is None else gradient
                for parameter, gradient in zip(self._parameters, found, strict=True)
            ]
            before = self._gradients.get(name)
            self._gradients[name] = (
                gradients if before is None else [a + b for a, b in zip(before, gradients, strict=True)]
            )

    def record(self, *, update: int, td_std: float) -> TermRecord:
        """The record of the batch."""
        sigma_N = torch.cat(self._sigmas) if self._sigmas else torch.zeros(1)
        return TermRecord(
            update=update,
            terms=self._terms,
            grad_norms={name: _norm(found[: self._num_adapter]) for name, found in self._gradients.items()},
            head_grad_norms={name: _norm(found[self._num_adapter :]) for name, found in self._gradients.items()},
            sigma_mean=float(sigma_N.mean()),
            sigma_min=float(sigma_N.min()),
            td_std=td_std,
        )


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def record_dicts(records: Sequence[TermRecord]) -> list[dict[str, object]]:
    """Records as JSON-like facts."""
    return [asdict(record) for record in records]


def _demonstration(pair: TokenizedPair) -> TokenizedPair:
    """The chosen response alone: one token, which is not read, stands for the rejected one."""
    return replace(pair, rejected_ids=pair.chosen_ids[:1])


def _by_name(shares: AvaShares) -> dict[str, torch.Tensor]:
    return {field.name: getattr(shares, field.name) for field in fields(shares)}


def _is_recorded(update: int, num_pairs: int, options: MemberTraining) -> bool:
    """`NUM_RECORDS` updates, evenly spaced, the first and the last among them."""
    num_updates = options.epochs * -(-num_pairs // options.batch_size)
    return update in np.linspace(0, num_updates - 1, NUM_RECORDS).round()


def _first_sequences(outputs: TokenOutputs, num: int) -> TokenOutputs:
    """Of the first sequences alone, whose tokens come first."""
    num_tokens = int((outputs.sequence < num).sum())
    kept = {
        field.name: value[: num if field.name.startswith("before") else num_tokens]
        for field in fields(outputs)
        if (value := getattr(outputs, field.name)) is not None
    }
    return TokenOutputs(**kept)
