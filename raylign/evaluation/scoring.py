"""Log-probabilities and rewards of given answers, by the forward that training uses.

Answers to the same prompt are scored two at a time as if they were a pair, so that the prompt is computed once; the
loneliest answer is its own partner. Shape letters: N answers, L layers, D hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from raylign.data.conversations import Ids
from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.data.tokenization import end_of_response_id
from raylign.errors import DataError, ModelError
from raylign.evaluation.generation import encode_prompt
from raylign.models.forward import PolicyForward
from raylign.rewards.fit import predict
from raylign.rewards.posterior import RewardHead, RewardPosterior
from raylign.types import Layout, Message, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewardFn = Callable[[Sequence[Sequence[Message]], Sequence[str]], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredResponses:
    """What one model says about N answers.

    Attributes:
        logps: (N,) summed log-probability of the answer's tokens, nats, float64.
        lengths: (N,) tokens of the answers, int64.
        states: (N, L, D) float32 states at the last token of each answer, None when no layers were asked for.
        token_logps: N arrays of shape (lengths[i],), float32: log-probability of each token of the answer, nats.
    """

    logps: np.ndarray
    lengths: np.ndarray
    states: torch.Tensor | None
    token_logps: list[np.ndarray]

    @property
    def mean_logps(self) -> np.ndarray:
        """(N,) log-probability per token, the quantity that the drift check ranks by."""
        means: np.ndarray = self.logps / self.lengths
        return means


@torch.no_grad()
def score_responses(
    forward: PolicyForward,
    prompt_ids: Sequence[Ids],
    response_ids: Sequence[Ids],
    *,
    layout: Layout,
    pad_token_id: int,
    batch_tokens: int = 4096,
    layers: tuple[int, ...] | None = None,
) -> ScoredResponses:
    """Score N answers.

    Args:
        forward: the model, on its device; its mode is left as found.
        prompt_ids: N templated prompts, see `encode_prompt`.
        response_ids: N answers, at least one token each.
        layout: see `resolve_layout`.
        pad_token_id: fills rows.
        batch_tokens: token budget of one forward.
        layers: layers whose states are kept, from 1.

    Raises:
        DataError: the lists differ in length, or an answer has no token.
    """
    if len(prompt_ids) != len(response_ids) or not all(len(ids) for ids in response_ids):
        raise DataError(
            f"scoring needs one non-empty answer per prompt, got {len(prompt_ids)} prompts and {len(response_ids)} "
            f"answers, {sum(not len(ids) for ids in response_ids)} of them empty"
        )
    num_responses = len(response_ids)
    logps = np.zeros(num_responses)
    lengths = np.array([len(ids) for ids in response_ids], dtype=np.int64)
    states: torch.Tensor | None = None
    token_logps = [np.zeros(0, np.float32)] * num_responses
    couples = couple_answers(prompt_ids)
    pairs = [
        TokenizedPair(
            prompt_ids=np.asarray(prompt_ids[first], np.int32),
            chosen_ids=np.asarray(response_ids[first], np.int32),
            rejected_ids=np.asarray(response_ids[second], np.int32),
        )
        for first, second in couples
    ]
    device = next(forward.parameters()).device
    was_training = forward.training
    forward.eval()
    try:
        tokens = [pair_tokens(pair, layout) for pair in pairs]
        (plan,) = plan_micro_batches(tokens, batch_tokens=batch_tokens, num_workers=1)
        for micro_batch in plan:
            members = [pairs[index] for index in micro_batch.indices]
            scores = forward(pack_pairs(members, layout=layout, pad_token_id=pad_token_id).to(device), layers=layers)
            rows = [couples[index][half] for half in (0, 1) for index in micro_batch.indices]
            logps[rows] = torch.cat([scores.chosen_logps, scores.rejected_logps]).double().cpu().numpy()
            assert scores.token_logps is not None
            pieces = np.split(scores.token_logps.float().cpu().numpy(), np.cumsum(lengths[rows])[:-1])
            for row, piece in zip(rows, pieces, strict=True):
                token_logps[row] = piece
            if scores.chosen_states is not None and scores.rejected_states is not None:
                found = torch.cat([scores.chosen_states, scores.rejected_states]).cpu()
                states = found.new_zeros(num_responses, *found.shape[1:]) if states is None else states
                states[rows] = found
    finally:
        forward.train(was_training)
    return ScoredResponses(logps=logps, lengths=lengths, states=states, token_logps=token_logps)


def couple_answers(prompt_ids: Sequence[Ids]) -> list[tuple[int, int]]:
    """Positions of answers two by two, both to the same prompt; an odd one stands with itself."""
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for position, ids in enumerate(prompt_ids):
        by_prompt[tuple(ids)].append(position)
    couples = []
    for positions in by_prompt.values():
        seconds = positions[1::2] if len(positions) % 2 == 0 else [*positions[1::2], positions[-1]]
        couples += list(zip(positions[::2], seconds, strict=True))
    return couples


class ResponseReward(Protocol):
    """A reward model of responses, whatever it reads of them.

    Attributes:
        layers: transformer layers, from 1, whose states at the last token it reads; None when it reads token ids.
    """

    @property
    def layers(self) -> tuple[int, ...] | None: ...  # noqa: D102 - documented above

    def __call__(
        self,
        prompt_ids: Sequence[Ids],
        response_ids: Sequence[Ids],
        states: torch.Tensor | None,
    ) -> RewardPosterior:
        """Belief about the rewards of N responses, on the CPU.

        Args:
            prompt_ids: N templated prompts.
            response_ids: N responses, each closed with the end-of-response token.
            states: (N, L, D) of `layers` at that token under the reference, None when `layers` is None.
        """
        ...


@dataclass(frozen=True, slots=True)
class StatesReward:
    """A head on the reference's hidden states, as a `ResponseReward`.

    Attributes:
        head: fitted, on any device.
        layers: that it was fitted on.
    """

    head: RewardHead
    layers: tuple[int, ...]

    def __call__(
        self,
        prompt_ids: Sequence[Ids],
        response_ids: Sequence[Ids],
        states: torch.Tensor | None,
    ) -> RewardPosterior:
        """See `ResponseReward`."""
        assert states is not None
        belief = predict(self.head, states.to(next(self.head.buffers()).device)).to("cpu")
        num_bad = int((~torch.isfinite(belief.head_rewards).all(-1)).sum())
        if num_bad:
            raise ModelError(f"{num_bad} of {len(states)} rewards are not finite; are the weights sound?")
        return belief


class RewardScorer:
    """The run's reward of texts, one number each.

    Args:
        forward: the reference, on its device, in the number types of the features.
        tokenizer: of the reference.
        reward: what believes something of responses.
        rule: makes one reward (N,) of each belief.
        layout: see `resolve_layout`.
        batch_tokens: token budget of one forward.
    """

    def __init__(
        self,
        forward: PolicyForward,
        tokenizer: PreTrainedTokenizerBase,
        reward: ResponseReward,
        *,
        rule: Callable[[RewardPosterior], torch.Tensor],
        layout: Layout,
        batch_tokens: int = 4096,
    ) -> None:
        self._forward = forward
        self._tokenizer = tokenizer
        self._end_id = end_of_response_id(tokenizer)
        self._reward = reward
        self._rule = rule
        self._layout = layout
        self._batch_tokens = batch_tokens

    def posterior(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> RewardPosterior:
        """Belief about one answer per conversation; every answer is closed with the end token."""
        texts = self._tokenizer(list(responses), add_special_tokens=False)["input_ids"]
        prompt_ids = [encode_prompt(self._tokenizer, prompt) for prompt in prompts]
        response_ids = [[*ids, self._end_id] for ids in texts]
        states: torch.Tensor | None = None
        if self._reward.layers is not None:
            states = score_responses(
                self._forward,
                prompt_ids,
                response_ids,
                layout=self._layout,
                pad_token_id=self._tokenizer.pad_token_id,
                batch_tokens=self._batch_tokens,
                layers=self._reward.layers,
            ).states
        return self._reward(prompt_ids, response_ids, states)

    def __call__(self, prompts: Sequence[Sequence[Message]], responses: Sequence[str]) -> np.ndarray:
        """Rewards (N,), float64, of one answer per conversation."""
        rewards: np.ndarray = self._rule(self.posterior(prompts, responses)).double().numpy()
        return rewards
