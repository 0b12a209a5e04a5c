"""Sampled responses to what an update reads: preference pairs for online DPO, couples for policy gradients.

Shape letters: n responses of a round, N their tokens, C couples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from raylign.training.rounds import Round
from raylign.training.table import PairBatch
from raylign.types import ScoredRollout, TokenizedPair


def choose_pairs(round_: Round, *, rule: Literal["best_worst", "bradley_terry"], seed: int) -> list[tuple[int, int]]:
    """One preference pair per prompt of a round.

    Args:
        round_: scored responses.
        rule: "best_worst" takes the highest and the lowest reward (the first of equal ones); "bradley_terry" draws two
            responses and then their order, the first being chosen with probability sigmoid(r_first - r_second).
        seed: of the draws.

    Returns:
        Positions of (chosen, rejected) in `round_.scored`, prompts in order.

    Source: Guo et al. (2024), arXiv:2402.04792; Xiong et al. (2024), arXiv:2312.11456, for best against worst.
    """
    rewards = round_.rewards
    pairs = []
    for members in round_.by_prompt:
        if rule == "best_worst":
            pairs.append((max(members, key=lambda i: rewards[i]), min(members, key=lambda i: rewards[i])))
            continue
        rng = np.random.default_rng([seed, round_.index, len(pairs)])
        first, second = (int(position) for position in rng.choice(members, 2, replace=False))
        is_first = rng.random() < 1.0 / (1.0 + np.exp(np.clip(rewards[second] - rewards[first], -700, 700)))
        pairs.append((first, second) if is_first else (second, first))
    return pairs


def preference_batch(
    round_: Round,
    pairs: Sequence[tuple[int, int]],
    prompts: np.ndarray,
    *,
    reference: Literal["initial", "previous_round"],
) -> PairBatch:
    """The pairs of some prompts of a round, as the trainer of stored pairs takes them.

    A pair of equal rewards says nothing and weighs 0; it still counts in the batch's size.

    Args:
        round_: the pairs' responses.
        pairs: (chosen, rejected) of every prompt of the round, see `choose_pairs`.
        prompts: positions of the prompts wanted. Shape (B,).
        reference: "initial" uses the scored reference; "previous_round" the policy at the round's start.
    """
    chosen, rejected = ([pairs[prompt][side] for prompt in prompts] for side in (0, 1))
    rewards = round_.rewards

    def logps(positions: Sequence[int]) -> torch.Tensor:
        return torch.tensor([_reference_logp(round_, position, reference) for position in positions]).float()

    return PairBatch(
        tokens=[
            _pair(round_.scored[first], round_.scored[second]) for first, second in zip(chosen, rejected, strict=True)
        ],
        ref_chosen_logps=logps(chosen),
        ref_rejected_logps=logps(rejected),
        label_confidence=None,
        fold=torch.full((len(prompts),), -1),
        weight=torch.from_numpy((rewards[chosen] != rewards[rejected]).astype(np.float32)),
    )


@dataclass(frozen=True, kw_only=True)
class Couples:
    """Responses to the same prompt two by two, so that the prompt is computed once for both.

    Attributes:
        tokens: C couples as pairs; "chosen" and "rejected" mean first and second here.
        positions: (C, 2) positions of the responses in the round, int64.
        is_counted: (C, 2) bool; False where an odd response stands with itself and must count once only.
    """

    tokens: list[TokenizedPair]
    positions: np.ndarray
    is_counted: np.ndarray

    def token_index(self, round_: Round, indices: Sequence[int]) -> np.ndarray:
        """Positions among the round's N tokens of the tokens that a micro-batch of these couples scores, in order."""
        order = [self.positions[index, side] for side in (0, 1) for index in indices]
        return np.concatenate([np.arange(round_.offsets[i], round_.offsets[i + 1]) for i in order])

    def token_weight(self, round_: Round, indices: Sequence[int]) -> np.ndarray:
        """1 for each of these tokens that counts, else 0. float32."""
        lengths = np.diff(round_.offsets)
        order = [(self.positions[index, side], self.is_counted[index, side]) for side in (0, 1) for index in indices]
        return np.concatenate([np.full(lengths[i], is_counted, np.float32) for i, is_counted in order])


def couple_responses(round_: Round, prompts: np.ndarray | None = None) -> Couples:
    """Couple the responses to each prompt.

    Args:
        round_: responses.
        prompts: positions of the prompts wanted; None for all.
    """
    groups = round_.by_prompt if prompts is None else [round_.by_prompt[prompt] for prompt in prompts]
    positions: list[tuple[int, int]] = []
    is_counted: list[tuple[bool, bool]] = []
    for members in groups:
        for first, second in zip(members[::2], [*members[1::2], None], strict=False):
            positions.append((first, first if second is None else second))
            is_counted.append((True, second is not None))
    return Couples(
        tokens=[_pair(round_.scored[first], round_.scored[second]) for first, second in positions],
        positions=np.array(positions, np.int64).reshape(-1, 2),
        is_counted=np.array(is_counted, bool).reshape(-1, 2),
    )


def _pair(first: ScoredRollout, second: ScoredRollout) -> TokenizedPair:
    return TokenizedPair(
        prompt_ids=first.rollout.prompt_ids,
        chosen_ids=first.rollout.response_ids,
        rejected_ids=second.rollout.response_ids,
    )


def _reference_logp(round_: Round, position: int, reference: str) -> float:
    if reference == "initial":
        return float(round_.scored[position].reference_token_logps.sum(dtype=np.float64))
    assert round_.policy_logps is not None
    start, stop = round_.offsets[position], round_.offsets[position + 1]
    return float(round_.policy_logps[start:stop].sum(dtype=np.float64))
