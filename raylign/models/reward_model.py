"""Rewards of texts: fine-tuned members, their weight average, or a classifier of somebody else, behind one class.

Shape letters: n responses, B pairs, M members, C outputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from raylign.data.conversations import ConversationReader, Ids
from raylign.data.packing import pack_pairs, pair_tokens, plan_micro_batches
from raylign.data.tokenization import end_of_response_id, special_pattern
from raylign.errors import DataError, ModelError
from raylign.evaluation.generation import encode_prompt
from raylign.models.classifiers import ClassifierForward
from raylign.models.loading import context_length, resolve_layout
from raylign.rewards.posterior import RewardPosterior, ensemble_posterior
from raylign.types import Layout, Message, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK_MAX_TOKENS = 512


class TextReward:
    """Belief about the rewards of responses by M classifiers that read token ids or texts.

    A classifier with the policy's tokenizer reads the policy's ids. For one with another tokenizer the ids are read
    back as a conversation, which is templated anew: with the classifier's own chat template or, when it has none, as
    the texts of all turns and the response with an empty line between them and its own begin and end tokens. Its inputs
    over its length limit lose their beginning (chat template) or their end; ids over the limit of a classifier that
    reads the policy's ids are an error. What spells a special token of its tokenizer is taken out of the texts, because
    a policy could otherwise write turns of the user that praise it.

    Responses are closed first: what was cut by a length limit, or ended by another special token, ends with the
    end-of-response token, as stored responses do.

    Args:
        forward: the classifier, on its device, in evaluation mode.
        tokenizer: of the policy, whose ids come in.
        members: names of the adapters, in the order of the M rewards; () for one whole classifier.
        own_tokenizer: of the classifier; None when it reads the policy's ids.
        column: output that is the reward.
        is_cost: the output is a cost, above 0 unsafe; the reward is minus the cost.
        scale: factor of each member's reward, None for 1. Shape (M,).
        shift: added to each scaled reward, None for 0. Shape (M,), reward units.
        batch_tokens: token budget of one forward, padding included.

    Raises:
        ModelError: a tokenizer that cannot template or pad.
    """

    def __init__(
        self,
        forward: ClassifierForward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        members: Sequence[str] = (),
        own_tokenizer: PreTrainedTokenizerBase | None = None,
        column: int = 0,
        is_cost: bool = False,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self._forward = forward.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._reader = ConversationReader(tokenizer)
        self._members = tuple(members)
        self._own: Any = own_tokenizer
        # what another tokenizer would take for its special tokens; nothing where the policy's ids are read
        self._spelled = special_pattern(own_tokenizer) if own_tokenizer is not None else re.compile(r"(?!)")
        self._column = column
        self._sign = -1.0 if is_cost else 1.0
        self._scale_M = torch.ones(self.num_heads) if scale is None else scale.float().cpu()
        self._shift_M = torch.zeros(self.num_heads) if shift is None else shift.float().cpu()
        self._batch_tokens = batch_tokens
        config = forward.classifier.config.get_text_config()
        self._pad_token_id = config.pad_token_id or 0
        if not forward.is_decoder and config.pad_token_id is None:
            raise ModelError(f"{type(forward.classifier).__name__} names no pad_token_id; set one in its config.json")
        self._max_tokens = context_length(config)
        # a classifier whose pad token ends responses reads the token before, which packed rows do not look for
        is_packed = forward.is_decoder and config.pad_token_id != end_of_response_id(tokenizer)
        self._layout: Layout = resolve_layout("auto", forward.classifier.config) if is_packed else "padded"

    @property
    def num_heads(self) -> int:
        """M."""
        return max(1, len(self._members))

    def posterior(self, prompt_ids: Sequence[Ids], response_ids: Sequence[Ids]) -> RewardPosterior:
        """Belief about n responses by the policy's token ids.

        Args:
            prompt_ids: templated prompts, each ends with the generation prompt.
            response_ids: one response each, closed or not.

        Returns:
            On the CPU, float32; members that are one whole classifier have variance 0.

        Raises:
            DataError: the lists differ in length.
            ModelError: too many tokens, a prompt that cannot be read back for another tokenizer, or a reward that is
                not finite.
        """
        check_lengths(prompt_ids, response_ids)
        if self._own is None:
            return self._score(
                [
                    [*map(int, prompt), *self._reader.close(response)]
                    for prompt, response in zip(prompt_ids, response_ids, strict=True)
                ]
            )
        return self.posterior_of_texts(
            [self._reader.conversation(ids) for ids in prompt_ids], [self._reader.response(ids) for ids in response_ids]
        )

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
        if self._own is not None:
            return self._score([self._read(*texts) for texts in zip(conversations, responses, strict=True)])
        return self.posterior(*policy_ids(self._tokenizer, conversations, responses))

    def posterior_of_pairs(self, pairs: Sequence[TokenizedPair]) -> tuple[RewardPosterior, RewardPosterior]:
        """Belief about both responses of B stored pairs, chosen and rejected.

        A decoder that reads the policy's ids computes each prompt once where its architecture allows that.

        Raises:
            ModelError: as `posterior`.
        """
        if self._own is not None or self._layout == "padded":
            prompts = [pair.prompt_ids for pair in pairs]
            both = self.posterior(
                prompts * 2, [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
            )
            return both[: len(pairs)], both[len(pairs) :]
        check_positions(max(map(longest_sequence, pairs), default=0), self._max_tokens)
        rewards_2BM = torch.zeros(2, len(pairs), self.num_heads)
        for member in range(self.num_heads):
            self._activate(member)
            rewards_2BM[:, :, member] = score_pairs(
                self._forward,
                pairs,
                layout=self._layout,
                pad_token_id=self._pad_token_id,
                batch_tokens=self._batch_tokens,
                column=self._column,
            )
        return self._posterior(rewards_2BM[0]), self._posterior(rewards_2BM[1])

    @torch.no_grad()
    def _score(self, sequences: Sequence[Sequence[int]]) -> RewardPosterior:
        check_positions(max(map(len, sequences), default=0), self._max_tokens)
        rewards_nM = torch.zeros(len(sequences), self.num_heads)
        batches = length_batches([len(ids) for ids in sequences], self._batch_tokens)
        for member in range(self.num_heads):
            self._activate(member)
            for batch in batches:
                outputs = self._forward([sequences[row] for row in batch])
                rewards_nM[batch, member] = outputs[:, self._column].cpu()
        return self._posterior(rewards_nM)

    def _posterior(self, rewards_nM: torch.Tensor) -> RewardPosterior:
        if not bool(torch.isfinite(rewards_nM).all()):
            raise ModelError(
                f"{int((~torch.isfinite(rewards_nM)).sum())} rewards are not finite; are the weights sound?"
            )
        return ensemble_posterior(self._sign * rewards_nM * self._scale_M + self._shift_M)

    def _activate(self, member: int) -> None:
        if self._members:
            self._forward.activate(self._members[member])

    def _read(self, conversation: Sequence[Message], response: str) -> list[int]:
        """Ids of one input of a classifier with a tokenizer of its own."""
        turns = [(turn.role, turn.content) for turn in conversation] + [("assistant", response)]
        messages = [{"role": role, "content": self._spelled.sub("", content)} for role, content in turns]
        if self._own.chat_template:
            try:
                text = self._own.apply_chat_template(messages, tokenize=False)
            except TemplateError as error:
                raise ModelError(f"the reward model's chat template refuses a conversation: {error}") from error
        else:
            text = "\n\n".join(message["content"] for message in messages)
        self._own.truncation_side = "left" if self._own.chat_template else "right"
        limit = min(self._own.model_max_length, self._max_tokens or _FALLBACK_MAX_TOKENS)
        ids: list[int] = self._own(
            text, add_special_tokens=not self._own.chat_template, truncation=True, max_length=limit
        )["input_ids"]
        return ids


@torch.no_grad()
def score_pairs(
    forward: ClassifierForward,
    pairs: Sequence[TokenizedPair],
    *,
    layout: Layout,
    pad_token_id: int,
    batch_tokens: int,
    column: int = 0,
) -> torch.Tensor:
    """Outputs at both ends of B pairs by the member that is active.

    Args:
        forward: a decoder.
        pairs: the pairs.
        layout: of the rows, see `resolve_layout`.
        pad_token_id: fills rows.
        batch_tokens: token budget of one forward.
        column: of the outputs.

    Returns:
        Shape (2, B), float32, on the CPU, chosen first.
    """
    rewards_2B = torch.zeros(2, len(pairs))
    tokens = [pair_tokens(pair, layout) for pair in pairs]
    if not tokens:
        return rewards_2B
    (plan,) = plan_micro_batches(tokens, batch_tokens=batch_tokens, num_workers=1)
    for micro_batch in plan:
        rows = list(micro_batch.indices)
        batch = pack_pairs([pairs[row] for row in rows], layout=layout, pad_token_id=pad_token_id)
        outputs = forward.forward_pairs(batch.to(forward.device))
        rewards_2B[:, rows] = outputs[:, :, column].cpu()
    return rewards_2B


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Rows by length in batches whose padded size keeps to a token budget; a longer row stands alone.

    Args:
        lengths: tokens of each row.
        batch_tokens: rows x longest row of a batch.

    Returns:
        Positions of the rows, each in one batch.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda position: lengths[position]):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def longest_sequence(pair: TokenizedPair) -> int:
    """Tokens of the prompt with the longer response."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def check_positions(longest: int, max_tokens: int | None) -> None:
    """Refuse sequences that a reward model has no positions for.

    Args:
        longest: tokens of the longest sequence.
        max_tokens: positions, None when they are not numbered.

    Raises:
        ModelError: naming both numbers and the keys to lower.
    """
    if max_tokens is not None and longest > max_tokens:
        raise ModelError(
            f"a prompt with its response has {longest} tokens, the reward model {max_tokens} positions; "
            "lower data.max_length or sampler.max_new_tokens"
        )


def policy_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of templated prompts and of open responses.

    Args:
        tokenizer: of the policy.
        conversations: turns up to and including the last user turn.
        responses: texts.
    """
    answers: Any = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses]
    return [encode_prompt(tokenizer, conversation) for conversation in conversations], answers


def check_lengths(prompts: Sequence[Any], responses: Sequence[Any]) -> None:
    """Refuse lists that cannot be paired.

    Raises:
        DataError: naming both lengths.
    """
    if len(prompts) != len(responses):
        raise DataError(f"{len(prompts)} prompts and {len(responses)} responses cannot be paired")
