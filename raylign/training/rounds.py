"""One round of the online methods: what was sampled and scored, kept on disk so that it is never sampled twice.

A round is a function of the weights at its start. Its responses are written before the first update of the round, and
the trainer's own log-probabilities of them (and values) beside them, so that a run that is killed between two updates
goes on with exactly the numbers it had.

Shape letters: n responses of a round, N their tokens, H value heads.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylign.errors import CheckpointError, TrainingError
from raylign.training.order import DataOrder
from raylign.types import Rollout, ScoredRollout

_FACTS = b"raylign.facts"
_CURE = "restore it from a backup, or start under a new run.name"
_TOKENS = ("prompt_ids", "response_ids")
_LOGPS = ("sampler_logps", "reference_token_logps")
_OPTIONAL = ("token_rewards", "head_rewards", "head_scales")  # float32 lists of a response that may be missing


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSchedule:
    """Which prompts a round takes, and which of them an update.

    Attributes:
        num_prompts: prompts there are.
        prompts_per_round: prompts of a round, all of them when there are fewer.
        num_rounds: rounds of the run.
        batch_size: prompts of an update over all workers.
        round_epochs: passes over a round.
        seed: of the run.
    """

    num_prompts: int
    prompts_per_round: int
    num_rounds: int
    batch_size: int
    round_epochs: int
    seed: int

    @property
    def round_size(self) -> int:
        """Prompts of a round; the last round before the prompts run out may hold fewer and is topped up."""
        return min(self.prompts_per_round, self.num_prompts)

    @property
    def updates_per_round(self) -> int:
        """Updates of a round."""
        return self.round_epochs * -(-self.round_size // self.batch_size)

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.num_rounds * self.updates_per_round

    def prompts(self, index: int) -> np.ndarray:
        """Rows of the prompts of round `index`, from 0. Shape (round_size,), int64, no row twice.

        Rounds walk through one permutation of all prompts after the other. A prompt that a round already holds, where
        one permutation meets the next, waits for the next round, so that no prompt comes a third time before all came
        twice.
        """
        walk = self._walk()
        waiting: list[int] = []
        for _ in range(index + 1):
            chosen: dict[int, None] = {}  # in order, and found at once
            queue, waiting = deque(waiting), []
            while len(chosen) < self.round_size:
                row = queue.popleft() if queue else next(walk)
                if row in chosen:
                    waiting.append(row)
                else:
                    chosen[row] = None
            waiting += queue
        return np.array(list(chosen), np.int64)

    def _walk(self) -> Iterator[int]:
        for epoch in itertools.count():
            yield from np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_prompts).tolist()

    def batch(self, update: int) -> np.ndarray:
        """Positions in its round of the prompts of one update. Shape (B,), int64."""
        index, position = divmod(update, self.updates_per_round)
        order = DataOrder(
            num_pairs=self.round_size,
            batch_size=self.batch_size,
            # another stream for every round, so that positions are not always visited in one order
            seed=self.seed * 1_000_003 + index + 1,
            epochs=self.round_epochs,
        )
        return order.batch(position)


@dataclass(frozen=True, kw_only=True)
class Round:
    """Scored responses of one round, prompts in a row, samples in a row.

    Attributes:
        index: number of the round, from 0.
        scored: n responses, sorted by prompt_index and sample_index.
        facts: numbers about sampling and scoring for the metrics (floats by metric name).
        policy_logps: (N,) float32, log-probability of every response token under the trainer's weights at the start of
            the round, responses in order, or None when nothing reads it.
        values: (N, H) float32 predictions of the value heads at that time, or None.
    """

    index: int
    scored: tuple[ScoredRollout, ...]
    facts: Mapping[str, float]
    policy_logps: np.ndarray | None = None
    values: np.ndarray | None = None

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n + 1,) position of each response's first token among the N."""
        lengths = [len(item.rollout.response_ids) for item in self.scored]
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @cached_property
    def by_prompt(self) -> list[list[int]]:
        """Positions in `scored` of the responses to each prompt of the round."""
        groups: dict[int, list[int]] = {}
        for position, item in enumerate(self.scored):
            groups.setdefault(item.rollout.prompt_index, []).append(position)
        return [groups[index] for index in sorted(groups)]

    @property
    def rewards(self) -> np.ndarray:
        """(n,) float64."""
        return np.array([item.reward for item in self.scored])

    @property
    def costs(self) -> np.ndarray:
        """(n,) float64, > 0 unsafe; nan without a cost model."""
        return np.array([item.cost for item in self.scored])

    @property
    def token_rewards(self) -> np.ndarray:
        """(N,) float64, responses in order.

        Raises:
            TrainingError: a response without rewards of its tokens.
        """
        found = [item.token_rewards for item in self.scored if item.token_rewards is not None]
        if len(found) < len(self.scored):
            raise TrainingError(
                f"policy_gradient.credit=token needs a reward of every token; {len(self.scored) - len(found)} of the "
                f"{len(self.scored)} responses of round {self.index + 1} have none: use a reward of tokens "
                "(reward.kind=ava_p, ava_d or token_bt), or policy_gradient.credit=sequence"
            )
        lengths = [len(rewards) for rewards in found]
        if lengths != np.diff(self.offsets).tolist():
            raise TrainingError(
                f"round {self.index + 1} holds {sum(lengths)} rewards of tokens for {self.offsets[-1]} tokens; {_CURE}"
            )
        rewards: np.ndarray = np.concatenate(found)
        return rewards.astype(np.float64)

    def with_rewards(self, rewards: np.ndarray) -> Round:
        """The round with other rewards, (n,), for example penalised ones; last tokens get the difference."""
        scored = (_with_reward(item, float(value)) for item, value in zip(self.scored, rewards, strict=True))
        return replace(self, scored=tuple(scored))

    def with_policy(self, policy_logps: np.ndarray, values: np.ndarray | None) -> Round:
        """The round with what the trainer says of it at its start."""
        return replace(self, policy_logps=policy_logps, values=values)


class RoundStore:
    """Rounds as files in one directory that all workers see.

    Args:
        directory: created when missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def has(self, index: int) -> bool:
        """Whether the responses of a round are there."""
        return self._file(index).is_file()

    def write(self, index: int, scored: Sequence[ScoredRollout], facts: Mapping[str, float]) -> None:
        """Store a round, whole or not at all."""
        self._directory.mkdir(parents=True, exist_ok=True)
        rows = [_to_row(item) for item in sorted(scored, key=_place)]
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        table = table.replace_schema_metadata({_FACTS: json.dumps(dict(facts)).encode()})
        temporary = self._file(index).with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(table, temporary)
        temporary.replace(self._file(index))

    def read(self, index: int) -> Round:
        """Load a round, with what the trainer said of it when that was stored.

        Raises:
            CheckpointError: the files cannot be read or do not belong together.
        """
        file, extra = self._file(index), self._policy_file(index)
        try:
            table = pq.read_table(file)
            facts = json.loads(table.schema.metadata[_FACTS])
            if self._facts_file(index).is_file():
                facts |= json.loads(self._facts_file(index).read_text(encoding="utf-8"))
            found = Round(index=index, scored=tuple(_from_row(row) for row in table.to_pylist()), facts=facts)
            if not extra.is_file():
                return found
            with np.load(extra, allow_pickle=False) as arrays:
                logps = arrays["policy_logps"]
                values = arrays.get("values")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise CheckpointError(
                f"round {index + 1}: {file} or {extra.name} cannot be read ({error}); {_CURE}"
            ) from error
        if len(logps) != found.offsets[-1]:
            raise CheckpointError(
                f"{extra} holds {len(logps)} log-probabilities for {found.offsets[-1]} tokens; {_CURE}"
            )
        return found.with_policy(logps, values)

    def write_policy(self, index: int, policy_logps: np.ndarray, values: np.ndarray | None) -> None:
        """Store what the trainer says of a round at its start."""
        arrays: dict[str, Any] = {"policy_logps": policy_logps}
        if values is not None:
            arrays["values"] = values
        temporary = self._directory / f".{os.getpid()}.npz"
        np.savez(temporary, **arrays)
        temporary.replace(self._policy_file(index))

    def add_facts(self, index: int, facts: Mapping[str, float]) -> None:
        """Store further numbers about a round, found after it was written."""
        temporary = self._directory / f".{os.getpid()}.json"
        temporary.write_text(json.dumps(dict(facts)), encoding="utf-8")
        temporary.replace(self._facts_file(index))

    def _file(self, index: int) -> Path:
        return self._directory / f"round_{index + 1:05d}.parquet"

    def _policy_file(self, index: int) -> Path:
        return self._directory / f"round_{index + 1:05d}.policy.npz"

    def _facts_file(self, index: int) -> Path:
        return self._directory / f"round_{index + 1:05d}.facts.json"


_SCHEMA = pa.schema(
    [
        ("prompt_index", pa.int32()),
        ("sample_index", pa.int32()),
        *((name, pa.list_(pa.int32())) for name in _TOKENS),
        *((name, pa.list_(pa.float32())) for name in _LOGPS),
        ("reached_end", pa.bool_()),
        ("weight_version", pa.int64()),
        ("reward", pa.float64()),
        ("reward_variance", pa.float64()),
        ("cost", pa.float64()),
        *((name, pa.list_(pa.float32())) for name in _OPTIONAL),
    ]
)


def _place(item: ScoredRollout) -> tuple[int, int]:
    return item.rollout.prompt_index, item.rollout.sample_index


def _with_reward(item: ScoredRollout, reward: float) -> ScoredRollout:
    tokens = item.token_rewards
    if tokens is not None:
        tokens = tokens.copy()
        tokens[-1] += reward - item.reward
    return replace(item, reward=reward, token_rewards=tokens)


def _to_row(item: ScoredRollout) -> dict[str, Any]:
    rollout = item.rollout
    return {
        **{name: getattr(rollout, name) for name in ("prompt_index", "sample_index", "reached_end", "weight_version")},
        **{name: getattr(rollout, name) for name in (*_TOKENS, "sampler_logps")},
        "reference_token_logps": item.reference_token_logps,
        "reward": item.reward,
        "reward_variance": item.reward_variance,
        "cost": item.cost,
        **{name: getattr(item, name) for name in _OPTIONAL},
    }


def _from_row(row: dict[str, Any]) -> ScoredRollout:
    optional = {name: None if row[name] is None else np.array(row[name], np.float32) for name in _OPTIONAL}
    return ScoredRollout(
        rollout=Rollout(
            prompt_index=row["prompt_index"],
            sample_index=row["sample_index"],
            prompt_ids=np.array(row["prompt_ids"], np.int32),
            response_ids=np.array(row["response_ids"], np.int32),
            sampler_logps=np.array(row["sampler_logps"], np.float32),
            reached_end=row["reached_end"],
            weight_version=row["weight_version"],
        ),
        reward=row["reward"],
        reward_variance=row["reward_variance"],
        reference_token_logps=np.array(row["reference_token_logps"], np.float32),
        cost=row["cost"],
        **optional,
    )
