r"""Rewards of tokens, and through them of responses, by members that were fine-tuned from the policy.

Shape letters: n responses (2B for B pairs), N their tokens, T tokens of one response, M members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from raylign.data.conversations import ConversationReader, Ids
from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.errors import ModelError
from raylign.evaluation.scoring import couple_answers
from raylign.losses.logprobs import segment_sum
from raylign.losses.token_credit import attention_credit, mix_with_end, score_differences
from raylign.losses.variational import sequence_score, sequence_sigma
from raylign.models.loading import context_length, resolve_layout
from raylign.models.reward_model import check_lengths, check_positions, longest_sequence, policy_ids
from raylign.models.token_forward import TokenOutputs, TokenRewardForward
from raylign.rewards.posterior import RewardPosterior, ensemble_posterior
from raylign.types import Layout, Message, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = Literal["last", "sum", "mean", "log_prob"]
Rule = Callable[[RewardPosterior], torch.Tensor]
_OF_TOKENS = ("mu", "sigma", "q", "log_likelihood", "attention")  # fields of `TokenOutputs`
_OF_SEQUENCES = ("before", "before_sigma")


class TokenReward:
    """Belief about the rewards of responses, and of their tokens, by M members of one causal language model.

    The contract of `TextReward` for the policy's token ids: responses are closed first, what members disagree about is
    the deviation, and the sigma of a score is what its tokens' Gaussians make of it, independent of each other.

    Args:
        forward: members, on their device.
        tokenizer: of the policy.
        members: names of the adapters, in the order of the M rewards.
        score: how rewards of tokens become that of a response.
        credit: reward of a token, see `token_reward.credit`.
        dense_weight: share of that credit against the score at the last token.
        scale: factor of each member's score, None for 1. Shape (M,).
        shift: added to each scaled score, None for 0. Shape (M,), reward units.
        batch_tokens: token budget of one forward, padding included.

    Attributes:
        forward: as given, in evaluation mode.
    """

    def __init__(
        self,
        forward: TokenRewardForward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        members: Sequence[str],
        score: Score,
        credit: Literal["own", "differences", "attention"] = "own",
        dense_weight: float = 1.0,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self.forward = forward.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._reader = ConversationReader(tokenizer)
        self._members = tuple(members)
        self._score: Score = score
        self._credit = credit
        self._dense_weight = dense_weight
        self._scale_M = torch.ones(self.num_heads) if scale is None else scale.float().cpu()
        self._shift_M = torch.zeros(self.num_heads) if shift is None else shift.float().cpu()
        self._batch_tokens = batch_tokens
        config = forward.causal_lm.config
        self._pad_token_id = config.get_text_config().pad_token_id or 0
        self._max_tokens = context_length(config.get_text_config())
        self._layout: Layout = resolve_layout("auto", config)

    @property
    def num_heads(self) -> int:
        """M."""
        return len(self._members)

    def posterior(self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids]) -> RewardPosterior:
        """Belief about n responses by the policy's token ids.

        Args:
            prompt_ids: templated prompts, each ends with the generation prompt.
            response_ids: one response each, closed or not.

        Returns:
            On the CPU, float32.

        Raises:
            DataError: the lists differ in length.
            ModelError: too many tokens, or a reward that is not finite.
        """
        pairs, rows_n = self._coupled(prompt_ids, response_ids)
        return self._belief(self._read(pairs))[rows_n]

    def posterior_of_texts(
        self, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
    ) -> RewardPosterior:
        """Belief about n responses by their texts.

        Args:
            conversations: turns up to and including the last user turn.
            responses: one response each.

        Raises:
            DataError: the lists differ in length.
            ModelError: as `posterior`.
        """
        check_lengths(conversations, responses)
        return self.posterior(*policy_ids(self._tokenizer, conversations, responses))

    def posterior_of_pairs(self, pairs: Sequence[TokenizedPair]) -> tuple[RewardPosterior, RewardPosterior]:
        """Belief about both responses of B stored pairs, chosen and rejected.

        Raises:
            ModelError: as `posterior`.
        """
        belief = self._belief(self._read(pairs))
        return belief[: len(pairs)], belief[len(pairs) :]

    def token_rewards(
        self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids], *, rule: Rule | None = None
    ) -> list[np.ndarray]:
        """The reward of every token of n responses, in the credit of this reward.

        What closing a response adds earns for the last token that was there: with `differences` and `attention` the
        rewards of a response add up to what they would with that token.

        Args:
            prompt_ids: templated prompts, each ends with the generation prompt.
            response_ids: one response each, closed or not.
            rule: one reward (k,) of each belief about k tokens, prefixes or responses; None is the members' mean.

        Returns:
            n arrays of shape (T,), float32, one per given token, reward units.

        Raises:
            DataError: the lists differ in length.
            ModelError: as `posterior`, or attention that the model does not give.
        """
        pairs, rows_n = self._coupled(prompt_ids, response_ids)
        outputs = self._read(pairs, with_attention=self._credit == "attention")
        rewards_N = self._credited(outputs, rule or (lambda belief: belief.mean)).float()
        lengths = torch.bincount(outputs[0].sequence, minlength=outputs[0].num_sequences)
        by_sequence = torch.split(rewards_N, lengths.tolist())
        return [
            _as_given(by_sequence[row].numpy(), len(ids))
            for row, ids in zip(rows_n.tolist(), response_ids, strict=True)
        ]

    def _coupled(
        self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids]
    ) -> tuple[list[TokenizedPair], torch.Tensor]:
        """Closed responses to one prompt two by two, and the sequence of each response among those of the pairs."""
        check_lengths(prompt_ids, response_ids)
        prompts = [[int(token) for token in ids] for ids in prompt_ids]
        closed = [self._reader.close(ids) for ids in response_ids]
        couples = couple_answers(prompts)
        pairs = [
            TokenizedPair(
                prompt_ids=np.asarray(prompts[first], np.int32),
                chosen_ids=np.asarray(closed[first], np.int32),
                rejected_ids=np.asarray(closed[second], np.int32),
            )
            for first, second in couples
        ]
        rows_n = torch.zeros(len(closed), dtype=torch.int64)
        for half in (1, 0):
            for position, couple in enumerate(couples):
                rows_n[couple[half]] = half * len(couples) + position
        return pairs, rows_n

    def _read(self, pairs: Sequence[TokenizedPair], *, with_attention: bool = False) -> list[TokenOutputs]:
        """What each member says of all tokens of the pairs."""
        check_positions(max(map(longest_sequence, pairs), default=0), self._max_tokens)
        found = []
        for name in self._members:
            self.forward.activate(name)
            found.append(
                read_pairs(
                    self.forward,
                    pairs,
                    layout=self._layout,
                    pad_token_id=self._pad_token_id,
                    batch_tokens=self._batch_tokens,
                    with_attention=with_attention,
                )
            )
        return found

    def _belief(self, outputs: Sequence[TokenOutputs]) -> RewardPosterior:
        """About whole responses."""
        return self._standardized(*_stacked([response_scores(found, self._score) for found in outputs]))

    def _credited(self, outputs: Sequence[TokenOutputs], rule: Rule) -> torch.Tensor:
        """(N,) reward of each token."""
        sequence_N = outputs[0].sequence
        if self._credit == "own":
            # without the shift, which belongs to a response and would pay for length
            return rule(self._standardized(*_stacked([(found.mu, found.sigma) for found in outputs]), is_shifted=False))
        reward_n = rule(self._belief(outputs))
        if self._credit == "attention":
            attention_N = torch.stack([_weights(found) for found in outputs]).mean(0)
            credit_N = attention_credit(attention_N, reward_n, sequence_N)
        else:
            assert self._score != "log_prob"  # refused by the configuration
            prefixes = self._standardized(*_stacked([prefix_scores(found, self._score) for found in outputs]))
            empty = self._standardized(*_stacked([_empty_scores(found, self._score) for found in outputs]))
            credit_N = score_differences(rule(prefixes), rule(empty), sequence_N)
        return mix_with_end(credit_N, reward_n, sequence_N, dense_weight=self._dense_weight)

    def _standardized(
        self, scores_kM: torch.Tensor, sigmas_kM: torch.Tensor | None, *, is_shifted: bool = True
    ) -> RewardPosterior:
        if not bool(torch.isfinite(scores_kM).all()):
            raise ModelError(
                f"{int((~torch.isfinite(scores_kM)).sum())} rewards are not finite; are the weights sound?"
            )
        scores_kM = scores_kM * self._scale_M + (self._shift_M if is_shifted else 0.0)
        return ensemble_posterior(scores_kM, None if sigmas_kM is None else sigmas_kM * self._scale_M)


@torch.no_grad()
def read_pairs(
    forward: TokenRewardForward,
    pairs: Sequence[TokenizedPair],
    *,
    layout: Layout,
    pad_token_id: int,
    batch_tokens: int,
    with_attention: bool = False,
) -> TokenOutputs:
    """What the active member says of every response token of B pairs.

    Args:
        forward: the members.
        pairs: the pairs.
        layout: of the rows, see `resolve_layout`.
        pad_token_id: fills rows.
        batch_tokens: token budget of one forward.
        with_attention: see `TokenRewardForward.read`.

    Returns:
        On the CPU; sequence b is the chosen response of pair b, B + b the rejected one, tokens in this order.
    """
    lengths = [len(pair.chosen_ids) for pair in pairs] + [len(pair.rejected_ids) for pair in pairs]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    found: dict[str, torch.Tensor] = {}
    tokens = [pair_tokens(pair, layout) for pair in pairs]
    plan = plan_micro_batches(tokens, batch_tokens=batch_tokens, num_workers=1)[0] if pairs else []
    for micro_batch in plan:
        rows = list(micro_batch.indices)
        batch = pack_pairs([pairs[row] for row in rows], layout=layout, pad_token_id=pad_token_id)
        outputs = forward.read(batch.to(forward.device), with_attention=with_attention)
        sequences = torch.tensor([*rows, *(len(pairs) + row for row in rows)])
        columns = torch.from_numpy(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in sequences.tolist()]))
        for names, place, size in ((_OF_TOKENS, columns, len(sequence_N)), (_OF_SEQUENCES, sequences, len(lengths))):
            for name in names:
                values = getattr(outputs, name)
                if values is not None:
                    found.setdefault(name, torch.zeros(size))[place] = values.float().cpu()
    return TokenOutputs(
        mu=found.pop("mu", torch.zeros(0)),
        before=found.pop("before", torch.zeros(0)),
        sequence=sequence_N,
        **found,
    )


def response_scores(outputs: TokenOutputs, score: Score) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reward of every response by one member, and its sigma.

    Args:
        outputs: of the member.
        score: of rewards, see `sequence_score`, or the sum of the log-likelihoods, which has no sigma.

    Returns:
        Scores, and sigma where the member states one; both (n,).

    Raises:
        ModelError: log_prob of a member without a policy.
    """
    if score != "log_prob":
        mu_n = sequence_score(outputs.mu, outputs.sequence, outputs.num_sequences, rule=score)
        if outputs.sigma is None:
            return mu_n, None
        return mu_n, sequence_sigma(outputs.sigma, outputs.sequence, outputs.num_sequences, rule=score)
    if outputs.log_likelihood is None:
        raise ModelError("token_reward.score=log_prob needs a member with a policy: reward.kind=ava_p or ava_d")
    return segment_sum(outputs.log_likelihood, outputs.sequence, outputs.num_sequences), None


def prefix_scores(
    outputs: TokenOutputs, score: Literal["last", "sum", "mean"]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`response_scores` of every response cut after each of its tokens, from the one forward of the whole.

    Returns:
        Scores, and sigma where the member states one; both (N,), float32.
    """
    if score == "last":
        return outputs.mu, outputs.sigma
    sums_N = _running_sum(outputs.mu, outputs)
    sigmas_N = None if outputs.sigma is None else _running_sum(outputs.sigma.square(), outputs).sqrt()
    if score == "mean":
        counts_N = _running_sum(torch.ones_like(outputs.mu), outputs)
        sums_N, sigmas_N = sums_N / counts_N, None if sigmas_N is None else sigmas_N / counts_N
    return sums_N.float(), None if sigmas_N is None else sigmas_N.float()


def _empty_scores(
    outputs: TokenOutputs, score: Literal["last", "sum", "mean"]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of responses without a token: nothing for a sum, else what the reward head says of the prompt; (n,) each."""
    if score != "sum":
        return outputs.before, outputs.before_sigma
    return torch.zeros_like(outputs.before), None if outputs.sigma is None else torch.zeros_like(outputs.before)


def _running_sum(values_N: torch.Tensor, outputs: TokenOutputs) -> torch.Tensor:
    """Sum of the values of a sequence up to each token; float64, because sums of other sequences are taken off."""
    total_N = torch.cat([torch.zeros(1, dtype=torch.float64), values_N.double().cumsum(0)])
    lengths_n = torch.bincount(outputs.sequence, minlength=outputs.num_sequences)
    starts_n = lengths_n.cumsum(0) - lengths_n
    return total_N[1:] - total_N[starts_n][outputs.sequence]


def _stacked(
    found: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and sigmas (N,) of M members as (N, M)."""
    sigmas = [sigma for _, sigma in found if sigma is not None]
    return torch.stack([values for values, _ in found], 1), torch.stack(sigmas, 1) if sigmas else None


def _weights(outputs: TokenOutputs) -> torch.Tensor:
    assert outputs.attention is not None
    return outputs.attention


def _as_given(rewards_T: np.ndarray, num_given: int) -> np.ndarray:
    """Rewards of a closed response for the tokens that were given: one more is folded, one less is 0."""
    given = np.zeros(num_given, np.float32)
    num_both = min(num_given, len(rewards_T))
    given[:num_both] = rewards_T[:num_both]
    given[num_both - 1] += rewards_T[num_both:].sum()
    return given
