"""Fitted rewards as the other phases use them, and their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raylign.config import ConfidenceSection
from raylign.errors import CheckpointError
from raylign.rewards.gaussian import GaussianHeads
from raylign.rewards.hybrid import HybridReward
from raylign.rewards.laplace import LaplaceReward
from raylign.rewards.posterior import RewardHead
from raylign.runtime.phases import write_json

HEADS_FILE = "heads.safetensors"
REWARD_FILE = "reward.json"

FULL = -1  # fold of pairs that nothing was fitted to: what was fitted to all training pairs scores them

_HEADS: dict[str, type[RewardHead]] = {
    "hybrid": HybridReward,
    "ensemble": HybridReward,
    "brme": GaussianHeads,
    "laplace": LaplaceReward,
}


@dataclass(frozen=True, kw_only=True)
class RewardFacts:
    """How the rewards of a fitted reward model become confidence.

    Attributes:
        kind: `reward.kind` of the configuration.
        centers: mean reward of fold k by what did not see it, reward units.
        full_center: mean reward of the validation pairs by what was fitted to all training pairs.
        temperature: calibrates the preference probability of out-of-fold pairs, reward units.
        fold_seed: seed of the fold partition.
        metrics: held-out quality, JSON-like; see `fit_reward`.
    """

    kind: str
    centers: tuple[float, ...]
    full_center: float
    temperature: float
    fold_seed: int
    metrics: dict[str, Any]

    def center_of(self, fold: torch.Tensor) -> torch.Tensor:
        """Center of the pairs of given folds, `FULL` among them. Shape of `fold`, float32."""
        return torch.tensor([*self.centers, self.full_center])[fold]

    def save(self, directory: Path) -> None:
        """Write `reward.json`."""
        facts = {field.name: getattr(self, field.name) for field in fields(RewardFacts)}
        write_json(directory / REWARD_FILE, {**facts, **self._more()})

    def _more(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class FittedTexts(RewardFacts):
    """A reward model that reads texts; its members lie beside it.

    Attributes:
        directory: of the reward phase: `full` and, with several folds, `fold0`, ... hold the members of
            `text_reward_job.fit_members`; nothing for an external classifier. `scored` holds the scored pairs.
    """

    directory: Path

    @property
    def members(self) -> Path | None:
        """Directory of the members fitted to all training pairs, None for an external classifier."""
        return None if self.kind == "external" else self.directory / "full"


@dataclass(frozen=True, kw_only=True)
class FittedReward(RewardFacts):
    """Heads of a fitted reward on hidden states.

    Attributes:
        heads: one per fold; head k saw no pair of fold k.
        full: head fitted on all training pairs, for every other answer.
        layers: transformer layers of the states, from 1, in the heads' order; None when unknown.
    """

    kind: str = "hybrid"
    heads: tuple[RewardHead, ...]
    full: RewardHead
    layers: tuple[int, ...] | None = None

    def save(self, directory: Path) -> None:
        """Write `heads.safetensors` and `reward.json`."""
        tensors = {f"fold{k}.{name}": value for k, head in enumerate(self.heads) for name, value in _state(head)}
        tensors |= {f"full.{name}": value for name, value in _state(self.full)}
        save_file(tensors, directory / HEADS_FILE)
        super().save(directory)

    def _more(self) -> dict[str, Any]:
        return {"layers": self.layers}

    @staticmethod
    def load(directory: Path) -> FittedReward:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the files are missing, do not belong together, or are of a reward of texts.
        """
        fitted = load_reward(directory)
        if isinstance(fitted, FittedReward):
            return fitted
        raise CheckpointError(f"{directory} holds a reward of texts (reward.kind={fitted.kind}), not heads on states")


def load_reward(directory: Path) -> FittedReward | FittedTexts:
    """Read a fitted reward of either sort.

    Raises:
        CheckpointError: the files are missing or do not belong together.
    """
    try:
        facts = json.loads((directory / REWARD_FILE).read_text(encoding="utf-8"))
        facts["centers"] = tuple(facts["centers"])
        if facts["kind"] not in _HEADS:
            return FittedTexts(**facts, directory=directory)
        facts["layers"] = None if facts["layers"] is None else tuple(facts["layers"])
        tensors = load_file(directory / HEADS_FILE)
        make = _HEADS[facts["kind"]].from_state
        heads = tuple(make(_part(tensors, f"fold{k}.")) for k in range(len(facts["centers"])))
        return FittedReward(**facts, heads=heads, full=make(_part(tensors, "full.")))
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} holds no complete fitted reward ({error}); rerun the reward phase"
        ) from error


def resolve_temperature(confidence: ConfidenceSection, fitted: RewardFacts) -> float:
    """The temperature in reward units, the fitted one unless the configuration names a number."""
    return fitted.temperature if confidence.temperature == "fitted" else float(confidence.temperature)


def _state(head: RewardHead) -> list[tuple[str, torch.Tensor]]:
    # copies, because with one fold two heads are one and safetensors refuses memory that is shared
    return [
        (name, value.detach().clone(memory_format=torch.contiguous_format)) for name, value in head.state_dict().items()
    ]


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
