r"""The objective of AVA from its terms: sums over part of a batch, divided by the counts of the whole batch.

For demonstrations (AVA-d) the objective is the mean over tokens of
\(w_l q_t - w_{irl}(KL_t - w_{td}\log N(\delta_t; \mu_t, \sigma_t^2))\). For preferences (AVA-p) rejected tokens add a
negative term and their own KL and TD terms, and pairs add the contrastive expected return. Both are maximised.

Conventions as in `raylign.losses.variational`. Shape letters: N response tokens, M responses, B pairs.
"""

from __future__ import annotations

import dataclasses

import torch

from raylign.errors import ShapeError
from raylign.losses.advantages import check_alike
from raylign.losses.gaussian_reward import kl_to_standard_normal
from raylign.losses.logprobs import segment_sum
from raylign.losses.variational import (
    Contrast,
    Negative,
    Terminal,
    contrastive_return,
    gaussian_log_density,
    negative_term,
    sequence_score,
    td_errors,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AvaSums:
    r"""Sums of the terms over the tokens and pairs of part of a batch, each a tensor with gradient: 0-d or per pair.

    Attributes:
        likelihood: \(w_l q\) of chosen tokens, nats.
        negative: `negative_term` of rejected tokens, nats.
        chosen_kl: KL to the prior of chosen tokens, nats.
        rejected_kl: of rejected tokens.
        chosen_td: log-density of the TD errors of chosen tokens, nats.
        rejected_td: of rejected tokens.
        cer: `contrastive_return` of pairs.
    """

    likelihood: torch.Tensor
    negative: torch.Tensor
    chosen_kl: torch.Tensor
    rejected_kl: torch.Tensor
    chosen_td: torch.Tensor
    rejected_td: torch.Tensor
    cer: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AvaCounts:
    """What sums are divided by: counts of the whole batch, over all micro-batches and workers.

    Attributes:
        chosen_tokens: response tokens of chosen responses (or demonstrations).
        rejected_tokens: of rejected responses; 0 for demonstrations.
        num_responses: chosen responses, which is also the number of pairs.
    """

    chosen_tokens: int
    rejected_tokens: int
    num_responses: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AvaShares:
    """A part's share of each term of the objective, as weighted there: shares of all parts add up to the term.

    Attributes:
        likelihood: of chosen tokens. Each field is a tensor with gradient, of the shape of the sums.
        negative: of rejected tokens.
        kl: -irl_weight x mean KL, of chosen and of rejected tokens.
        td: irl_weight x td_weight x mean log-density, likewise.
        cer: cer_weight x mean contrastive return.
    """

    likelihood: torch.Tensor
    negative: torch.Tensor
    kl: torch.Tensor
    td: torch.Tensor
    cer: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """What is minimised: the negative of the objective."""
        return -(self.likelihood + self.negative + self.kl + self.td + self.cer)


def ava_sums(
    q_N: torch.Tensor,
    mu_N: torch.Tensor,
    sigma_N: torch.Tensor,
    sequence_N: torch.Tensor,
    num_chosen: int,
    *,
    has_rejected: bool,
    discount: float,
    terminal: Terminal,
    likelihood_weight: float,
    negative: Negative,
    cer: Contrast,
    td_std: float = 1.0,
    detach_q: bool = False,
    logprob_N: torch.Tensor | None = None,
    per_pair: bool = False,
) -> AvaSums:
    r"""Sums of the terms over part of a batch.

    Args:
        q_N: value of each token, read from the state before it: `token_q`, or the output of a head. Shape (N,).
        mu_N: mean of each token's reward, read from the state after it. Shape (N,).
        sigma_N: its standard deviation, above 0. Shape (N,).
        sequence_N: response of each token: [0, num_chosen) are chosen, [num_chosen, 2 num_chosen) their rejected
            responses in the same order. Shape (N,), int64.
        num_chosen: chosen responses of this part (B), or demonstrations (M); 0 for an empty part.
        has_rejected: whether there are pairs (AVA-p) or demonstrations (AVA-d).
        discount: of the next token's value.
        terminal: as for `td_errors`.
        likelihood_weight: of q.
        negative: form of `negative_term`.
        cer: form of `contrastive_return`.
        td_std: what TD errors are divided by, `TdScale.std`.
        detach_q: keep the gradient of the TD term from q.
        logprob_N: log-probabilities for likelihood and negative term where q is none. Shape (N,). None takes q.
        per_pair: keep a sum of each chosen response and its rejected one, so that pairs may be weighted.

    Returns:
        Sums, 0-d or of shape (num_chosen,), connected to the graph also when they are empty.

    Raises:
        ShapeError: tensors differ in shape, or a response has no or scattered tokens.
        ConfigError: unknown forms.

    Source: arXiv:2411.09341, its objectives for demonstrations and preferences; terms of rejected tokens reconstructed.
    """
    logprob_N = q_N if logprob_N is None else logprob_N
    check_alike(q=q_N, mu=mu_N, sigma=sigma_N, sequence=sequence_N, logprob=logprob_N)
    num_responses = 2 * num_chosen if has_rejected else num_chosen
    score_M = sequence_score(mu_N, sequence_N, num_responses, rule="last")
    delta_N, has_td_N = td_errors(q_N.detach() if detach_q else q_N, sequence_N, discount=discount, terminal=terminal)
    kl_N = kl_to_standard_normal(mu_N, sigma_N)
    density_N = torch.where(has_td_N, gaussian_log_density(delta_N / td_std, mu_N, sigma_N), 0)
    is_chosen_N = sequence_N < num_chosen
    chosen_M, rejected_M = score_M[:num_chosen], score_M[num_chosen:]
    pair_term = contrastive_return(chosen_M, rejected_M, form=cer) if has_rejected else torch.zeros_like(score_M)
    pair_N = torch.where(is_chosen_N, sequence_N, sequence_N - num_chosen)

    def total(values_N: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
        return segment_sum(values_N, pair_N[kept_N], num_chosen)

    rejected_logprob_N = logprob_N[~is_chosen_N]
    sums = AvaSums(
        likelihood=likelihood_weight * total(logprob_N[is_chosen_N], is_chosen_N),
        negative=total(
            negative_term(rejected_logprob_N, form=negative, likelihood_weight=likelihood_weight), ~is_chosen_N
        ),
        chosen_kl=total(kl_N[is_chosen_N], is_chosen_N),
        rejected_kl=total(kl_N[~is_chosen_N], ~is_chosen_N),
        chosen_td=total(density_N[is_chosen_N], is_chosen_N),
        rejected_td=total(density_N[~is_chosen_N], ~is_chosen_N),
        cer=pair_term,
    )
    if per_pair:
        return sums
    return AvaSums(**{field.name: getattr(sums, field.name).sum() for field in dataclasses.fields(AvaSums)})


def ava_shares(
    sums: AvaSums,
    counts: AvaCounts,
    *,
    terminal: Terminal,
    irl_weight: float,
    td_weight: float,
    cer_weight: float,
) -> AvaShares:
    r"""Shares of the objective's terms; `.loss` is what a micro-batch calls backward on.

    Definition: means over the tokens of each kind of response (chosen, rejected), over the tokens that have a TD error,
    and over pairs, with their weights.

    td_weight should stay below 1: the best sigma^2 of a token is then at least 1 - td_weight, whereas at 1 it is 0
    wherever a TD error is within 1, and above 1 only the floor of sigma bounds the objective.

    Args:
        sums: of this part.
        counts: of the whole batch.
        terminal: as given to `ava_sums`; with "drop" each response has one TD error less than tokens.
        irl_weight: of KL and TD terms together.
        td_weight: of the TD term against KL.
        cer_weight: of the contrastive return; no effect for demonstrations.

    Returns:
        The shares.

    Raises:
        ShapeError: counts that cannot be those of a batch.
    """
    num_responses, chosen, rejected = counts.num_responses, counts.chosen_tokens, counts.rejected_tokens
    if num_responses < 1 or chosen < num_responses or 0 < rejected < num_responses:
        raise ShapeError(f"{counts} is no batch: every response needs a token; give the counts of the whole batch")
    cut = num_responses if terminal == "drop" else 0
    # Without rejected tokens, or with no token but the last, the sums are 0 and so is their share.
    per_chosen, per_rejected, per_chosen_td, per_rejected_td = (
        1 / max(count, 1) for count in (chosen, rejected, chosen - cut, rejected - cut)
    )
    return AvaShares(
        likelihood=sums.likelihood * per_chosen,
        negative=sums.negative * per_rejected,
        kl=-irl_weight * (sums.chosen_kl * per_chosen + sums.rejected_kl * per_rejected),
        td=irl_weight * td_weight * (sums.chosen_td * per_chosen_td + sums.rejected_td * per_rejected_td),
        cer=cer_weight * sums.cer / num_responses,
    )
