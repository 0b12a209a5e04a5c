"""The dataflow: one dataclass per hop, and the column names that carry the same things between processes.

    raw row -> PreferencePair -> TokenizedPair -> PairFeatures -> PairConfidence -> PackedBatch -> PairScores -> loss
    online: prompt -> SampleRequest -> Rollout -> ScoredRollout -> pairs or advantages -> PackedBatch -> PairScores

Between processes the hops are arrow columns of one `ray.data.Dataset`; every phase adds columns and keeps the others:

    ingest    row_id, source, prompt_key, split, prompt, chosen, rejected, chosen_safe, rejected_safe,
              prompt_ids, chosen_ids, rejected_ids
    features  + chosen_states, rejected_states, ref_chosen_logps, ref_rejected_logps
    cost      + chosen_cost, rejected_cost where the run has a cost model, joined to the pairs when they are ranked
    rank      + chosen_reward, rejected_reward, margin_mean, margin_variance, label_confidence, fold, weight

Shape letters: B pairs, L layers, D hidden width, P/C/R prompt/chosen/rejected tokens, N scored tokens, S row length.
This module imports neither torch nor ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100

Split = Literal["train", "valid", "test"]
Layout = Literal["shared", "packed", "padded"]
Method = Literal["offline", "online_dpo", "policy_gradient"]
Objective = Literal["label_confidence", "dpo", "cdpo", "rdpo", "ipo", "sft", "ava_p", "ava_d"]

TEXT_COLUMNS = (
    "row_id",
    "source",
    "prompt_key",
    "split",
    "prompt",
    "chosen",
    "rejected",
    "chosen_safe",
    "rejected_safe",
)
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
FEATURE_COLUMNS = ("chosen_states", "rejected_states", "ref_chosen_logps", "ref_rejected_logps")
RANK_COLUMNS = (
    "chosen_reward",
    "rejected_reward",
    "margin_mean",
    "margin_variance",
    "label_confidence",
    "fold",
    "weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: text of the turn.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A validated, canonical preference: one conversation, two answers, one of them preferred.

    Attributes:
        row_id: unique within the data set; stable across runs.
        source: free text that tells where the row is from ("" when unknown).
        prompt: turns up to and including the last user turn.
        chosen: text of the preferred answer.
        rejected: text of the dispreferred answer.
        chosen_safe: human label of the chosen answer, None when unknown.
        rejected_safe: likewise for the rejected answer.
        split: split named by the data itself, None to split by prompt hash.
    """

    row_id: str
    source: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    split: Split | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantinedRow:
    """A row that was not used, and why.

    Attributes:
        path: file the row came from, "" for a row of a Dataset.
        line: line (text) or row (parquet, Dataset) number, from 1.
        reason: short stable code, counted in the manifest.
        detail: one sentence about this row.
        excerpt: the first 200 characters of the raw row.
    """

    path: str
    line: int
    reason: str
    detail: str
    excerpt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedPair:
    """Token ids of a pair under one chat template; both answers continue the same prompt ids.

    Attributes:
        prompt_ids: shape (P,), int32, ends with the generation prompt of the template.
        chosen_ids: shape (C,), int32, ends with the end-of-response token.
        rejected_ids: shape (R,), int32, likewise.

    Example: prompt "<bos><|user|>Hi<|assistant|>", chosen "Hello<eos>", rejected "Go away<eos>".
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair when the prompt is stored once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch of B pairs laid out in rows; the model sees only this.

    Layouts: "shared" stores prompt, chosen, rejected once each, rejected positions restart after the prompt and a mask
    keeps the two answers apart; "packed" stores prompt+chosen and prompt+rejected back to back; "padded" is one
    sequence a row with right padding and a 2-D mask, the plain path that the others are tested against.

    Attributes:
        input_ids: (rows, S) int64, pad tokens where unused.
        position_ids: (rows, S) int64.
        attention_mask: (rows, 1, S, S) bool, True where query may see key (shared, packed); (rows, S) int64 (padded).
        score_from: (N,) int64, flat positions (row * S + column) whose next-token distribution scores a response token.
        score_labels: (N,) int64, the response token scored at each of these.
        score_sequence: (N,) int64 in [0, 2B): sequence the token belongs to; chosen of pair b is b, rejected is B + b.
        end_positions: (2B,) int64, flat position of the end-of-response token of each sequence, same order.
        pair_index: (B,) int64, position of each pair in the caller's list.
        num_real_tokens: tokens that are not padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    score_from: torch.Tensor
    score_labels: torch.Tensor
    score_sequence: torch.Tensor
    end_positions: torch.Tensor
    pair_index: torch.Tensor
    num_real_tokens: int

    @property
    def num_pairs(self) -> int:
        """B."""
        return int(self.pair_index.shape[0])

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        import dataclasses

        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=True) if hasattr(value, "to") else value
        return PackedBatch(**moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """What one forward of a model says about B pairs.

    Attributes:
        chosen_logps: (B,) summed log-probability of the chosen response tokens, nats, float32, with gradient.
        rejected_logps: (B,) likewise.
        chosen_lengths: (B,) scored tokens, int64.
        rejected_lengths: (B,) likewise.
        chosen_states: (B, L, D) detached hidden states at the end-of-response token, or None when not asked for.
        rejected_states: (B, L, D) likewise.
        token_logps: (N,) log-probability of every scored token in the order of the batch, nats, with gradient.
        token_values: (N, H) what H value heads predict before each scored token, or None without value heads.
    """

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    chosen_states: torch.Tensor | None = None
    rejected_states: torch.Tensor | None = None
    token_logps: torch.Tensor | None = None
    token_values: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfidence:
    """Posterior of the reward margin of B pairs and what the loss makes of it.

    Attributes:
        margin_mean: (B,) r(chosen) - r(rejected), reward units.
        margin_variance: (B,) posterior variance of the margin, 0 for a point estimate.
        label_confidence: (B,) gamma in (0, 1), P(the stored order is right); below 1/2 the pair is flipped.
    """

    margin_mean: torch.Tensor
    margin_variance: torch.Tensor
    label_confidence: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One response that a sampler is asked for.

    Attributes:
        prompt_index: position of the prompt in the round.
        sample_index: number of the response to that prompt, from 0.
        prompt_ids: templated prompt, ends with the generation prompt. Shape (P,), int32.
        seed: of this response's random stream, so that it depends neither on the batch nor on the engine.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: np.ndarray
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response, as the sampler saw it.

    Attributes:
        prompt_index: as requested.
        sample_index: as requested.
        prompt_ids: (P,) int32.
        response_ids: (R,) int32, up to and including the end-of-response token, if it came; R >= 1.
        sampler_logps: (R,) float32, log-probability of each response token under the sampler's weights at temperature 1
            and without truncation of the distribution, nats.
        reached_end: False when the length limit cut the response.
        weight_version: of the weights that sampled it.
    """

    prompt_index: int
    sample_index: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    sampler_logps: np.ndarray
    reached_end: bool
    weight_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """A response and what reward and reference say of it.

    Attributes:
        rollout: the response.
        reward: of the response, scored at its last token, reward units.
        reward_variance: posterior variance of the reward, 0 for a point estimate.
        reference_token_logps: (R,) float32, log-probability of each response token under the frozen reference, nats.
        cost: > 0 unsafe, <= 0 safe; nan when the run has no cost model.
        token_rewards: (R,) float32 reward of each token in place of `reward`, or None.
        head_rewards: (M,) float32 reward by each member of the reward model, or None with one member.
        head_scales: (M,) float32 standard deviation that each member states, or None.
    """

    rollout: Rollout
    reward: float
    reward_variance: float
    reference_token_logps: np.ndarray
    cost: float = float("nan")
    token_rewards: np.ndarray | None = None
    head_rewards: np.ndarray | None = None
    head_scales: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generated answer and what the judges say of it.

    Attributes:
        prompt: the user turn.
        response: decoded text without special tokens.
        category: category of the prompt.
        harmful: True for a prompt that should be refused.
        num_tokens: generated tokens up to and including the end token.
        reached_end: False when cut at the length limit.
        cost: judge's score, > 0 unsafe, <= 0 safe.
        is_refusal: verdict of the refusal detector.
        reward: reward of the run's reward head on the reference model's states, nan when there is none.
    """

    prompt: str
    response: str
    category: str
    harmful: bool
    num_tokens: int
    reached_end: bool
    cost: float
    is_refusal: bool
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: point estimate.
        low: lower end of the 95 % percentile bootstrap interval.
        high: upper end.
        num_items: items averaged.
    """

    mean: float
    low: float
    high: float
    num_items: int
