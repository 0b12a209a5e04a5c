"""Approximate variational alignment (AVA) as an objective of the off-policy trainer.

The policy's own log-probabilities are the values q, and a head on its last hidden states, trained with it, states a
Gaussian reward of every response token. Every term is a sum over tokens or pairs divided by a count of the whole batch,
which each worker knows, so that the shares of pairs add up whatever the micro-batches and workers.

TD errors are divided by their running deviation over the updates before; an update adds its own at its end. The first
update of a run starts with a forward without gradient, which measures them for it: undivided they would be far from the
prior of the rewards, and their gradient would be most of the first step.

Shape letters: B pairs of the update, b pairs of a micro-batch, N response tokens of a micro-batch, D hidden width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from raylign.config import AvaSection
from raylign.losses.ava import AvaCounts, AvaShares, ava_shares, ava_sums
from raylign.losses.logprobs import segment_sum
from raylign.losses.variational import TdScale, sequence_score, td_errors, td_moments
from raylign.models.variational_policy import TokenScores
from raylign.training.micro_batches import Packing, encode
from raylign.training.table import PairBatch
from raylign.training.world import World

TERMS = tuple(field.name for field in dataclasses.fields(AvaShares))
TRUNK_NORM = "ava/trunk_grad_norm/"
SMALLEST_SIGMA = "ava/sigma/min"
# What a pair has beside the columns of every objective, and an update besides; all are metric names.
AVA_COLUMNS = (
    *(f"ava/{term}" for term in TERMS),
    "ava/accuracies/last",
    "ava/accuracies/sum",
    "ava/accuracies/log_prob",
    "ava/rewards/chosen",
    "ava/rewards/rejected",
    "ava/sigma/mean",
    "ava/sigma/at_floor",
)
AVA_FACTS = (SMALLEST_SIGMA, "ava/td_std")


class Variational:
    """The objective of one run with what it remembers between updates.

    Args:
        objective: from preferences or from demonstrations, the chosen responses.
        settings: coefficients and forms.
        world: this worker.
    """

    def __init__(
        self, objective: Literal["ava_p", "ava_d"], settings: AvaSection, *, world: World | None = None
    ) -> None:
        self.scale = TdScale()
        self._has_rejected = objective == "ava_p"
        self._has_scale = settings.standardize_td and settings.irl_weight * settings.td_weight > 0
        self._settings = settings
        self._world = world or World()
        self._counts = AvaCounts(chosen_tokens=1, rejected_tokens=0, num_responses=1)
        self._moments = torch.zeros(0)
        self._squares: torch.Tensor | None = None
        self._is_first = True

    def begin_update(self, policy: nn.Module, batch: PairBatch, *, packing: Packing, is_logged: bool = False) -> None:
        """Count the tokens of the whole batch, and forget the last update; in the first one, measure its TD errors.

        Args:
            policy: what training calls.
            batch: all B pairs of the update.
            packing: how a forward of the batch is cut.
            is_logged: measure the gradient of each term in the trunk's outputs as well.
        """
        self._counts = AvaCounts(
            chosen_tokens=sum(len(pair.chosen_ids) for pair in batch.tokens),
            rejected_tokens=sum(len(pair.rejected_ids) for pair in batch.tokens) if self._has_rejected else 0,
            num_responses=batch.num_pairs,
        )
        self._moments = torch.zeros(3, dtype=torch.float64, device=self._world.device)
        self._squares = torch.zeros(len(TERMS), dtype=torch.float64, device=self._world.device) if is_logged else None
        self._is_first = self.scale.count == 0 and self._has_scale
        if self._is_first:
            for micro, scores in encode(policy, batch.tokens, layers=None, packing=packing, world=self._world):
                assert isinstance(scores, TokenScores)  # the policy is a `VariationalPolicy`
                self._count_td(scores, is_filler=not micro.weight)
            self._move_scale()

    def losses(self, scores: TokenScores, weight: torch.Tensor, *, is_filler: bool = False) -> dict[str, torch.Tensor]:
        """Loss of the pairs of one micro-batch, and what records say of them.

        Args:
            scores: of the b pairs, before their backward pass.
            weight: factor of each pair's loss. Shape (b,).
            is_filler: the pairs repeat others and must leave no trace.

        Returns:
            "loss", whose mean over the batch is minus the objective, `AVA_COLUMNS` and `SMALLEST_SIGMA`, each of shape
            (b,). All but the loss are without gradient.
        """
        num_chosen = len(scores.chosen_logps)
        kept = self._kept(scores)
        if self._has_scale and not self._is_first:
            self._count_td(scores, is_filler=is_filler)
        shares = self._shares(scores, kept, num_chosen)
        if self._squares is not None:
            self._measure(scores.trunk_states, shares, weight)
        num_responses = self._counts.num_responses  # times a share: the mean over the batch is the term
        terms = {f"ava/{term}": getattr(shares, term).detach() * num_responses for term in TERMS}
        said = self._rewards(scores, num_chosen) | self._sigmas(scores, kept, num_chosen)
        return {"loss": shares.loss * num_responses} | terms | said

    def end_update(self, smallest_sigma: torch.Tensor) -> dict[str, float]:
        """Let the TD errors of the batch count in the scale of the next updates.

        Args:
            smallest_sigma: the column of that name. Shape (B,).

        Returns:
            `AVA_FACTS` and, where it was measured, the norm of each term's gradient in the trunk's outputs over all
            tokens of the batch, by metric name; the same on every worker.
        """
        facts = {SMALLEST_SIGMA: float(smallest_sigma.min()), "ava/td_std": self._td_std}
        if self._has_scale and not self._is_first:
            self._move_scale()
        if self._squares is not None:
            norms = self._world.sum(self._squares).sqrt().tolist()
            facts |= {f"{TRUNK_NORM}{term}": norm for term, norm in zip(TERMS, norms, strict=True)}
        return facts

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the heads are part of the policy."""
        return dataclasses.asdict(self.scale)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.scale = TdScale(**state)

    @property
    def _td_std(self) -> float:
        return self.scale.std if self._has_scale else 1.0

    def _kept(self, scores: TokenScores) -> slice:
        """Tokens that the objective reads: chosen ones come first, and a demonstration is a chosen response."""
        return slice(None) if self._has_rejected else slice(int(scores.chosen_lengths.sum()))

    def _count_td(self, scores: TokenScores, *, is_filler: bool) -> None:
        if is_filler:
            return
        kept, ava = self._kept(scores), self._settings
        q_N, sequence_N = scores.token_q[kept].detach(), scores.token_sequence[kept]
        self._moments += td_moments(*td_errors(q_N, sequence_N, discount=ava.discount, terminal=ava.terminal))

    def _move_scale(self) -> None:
        count, total, squares = self._world.sum(self._moments).tolist()
        self.scale = self.scale.updated(count=count, total=total, squares=squares)

    def _shares(self, scores: TokenScores, kept: slice, num_chosen: int) -> AvaShares:
        """Each pair's share of every term, shape (b,)."""
        ava = self._settings
        sums = ava_sums(
            scores.token_q[kept],
            scores.token_mu[kept],
            scores.token_sigma[kept],
            scores.token_sequence[kept],
            num_chosen,
            has_rejected=self._has_rejected,
            discount=ava.discount,
            terminal=ava.terminal,
            likelihood_weight=ava.likelihood_weight,
            negative=ava.negative,
            cer=ava.cer,
            td_std=self._td_std,
            detach_q=ava.detach_q,
            per_pair=True,
        )
        return ava_shares(
            sums,
            self._counts,
            terminal=ava.terminal,
            irl_weight=ava.irl_weight,
            td_weight=ava.td_weight,
            cer_weight=ava.cer_weight,
        )

    def _measure(self, trunk_states: torch.Tensor, shares: AvaShares, weight: torch.Tensor) -> None:
        """Add a micro-batch's squared gradients in the trunk's outputs; no parameter's gradient is touched."""
        assert self._squares is not None
        for number, term in enumerate(TERMS):
            share = (getattr(shares, term) * weight).sum()
            if share.requires_grad:  # demonstrations have no contrastive return
                (gradient,) = torch.autograd.grad(share, trunk_states, retain_graph=True, allow_unused=True)
                self._squares[number] += 0 if gradient is None else gradient.double().square().sum()

    @torch.no_grad()
    def _rewards(self, scores: TokenScores, num_chosen: int) -> dict[str, torch.Tensor]:
        """Rewards and who is preferred by them; of both responses, also where the objective reads the chosen alone."""
        values = {}
        for rule in ("last", "sum"):
            score = sequence_score(scores.token_mu, scores.token_sequence, 2 * num_chosen, rule=rule)
            values[rule] = score.view(2, num_chosen)
        return {
            "ava/rewards/chosen": values["last"][0],
            "ava/rewards/rejected": values["last"][1],
            "ava/accuracies/last": values["last"][0] > values["last"][1],
            "ava/accuracies/sum": values["sum"][0] > values["sum"][1],
            "ava/accuracies/log_prob": scores.chosen_logps > scores.rejected_logps,
        }

    @torch.no_grad()
    def _sigmas(self, scores: TokenScores, kept: slice, num_chosen: int) -> dict[str, torch.Tensor]:
        """Of the tokens that the objective reads; the mean over pairs of the first two is one over tokens."""
        pair_N, sigma_N = scores.token_sequence[kept] % num_chosen, scores.token_sigma[kept]
        is_low_N = (sigma_N <= 2 * self._settings.sigma_floor).to(sigma_N.dtype)
        per_token = self._counts.num_responses / (self._counts.chosen_tokens + self._counts.rejected_tokens)
        smallest = sigma_N.new_full((num_chosen,), torch.inf).scatter_reduce(0, pair_N, sigma_N, "amin")
        return {
            "ava/sigma/mean": segment_sum(sigma_N, pair_N, num_chosen) * per_token,
            "ava/sigma/at_floor": segment_sum(is_low_N, pair_N, num_chosen) * per_token,
            SMALLEST_SIGMA: smallest,
        }
