"""A fitted reward as the other phases use it, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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

_HEADS: dict[str, type[RewardHead]] = {
    "hybrid": HybridReward,
    "ensemble": HybridReward,
    "brme": GaussianHeads,
    "laplace": LaplaceReward,
}


@dataclass(frozen=True, kw_only=True)
class FittedReward:
    """Heads of a fitted reward and how their rewards become confidence.

    Attributes:
        kind: `reward.kind` of the configuration.
        heads: one per fold; head k saw no pair of fold k.
        centers: mean reward of head k over fold k, reward units.
        full: head fitted on all training pairs, for every other answer.
        full_center: mean reward of `full` over the validation pairs.
        temperature: calibrates the preference probability of out-of-fold pairs, reward units.
        fold_seed: seed of the fold partition.
        metrics: held-out quality, JSON-like; see `fit_reward`.
        layers: transformer layers of the states, from 1, in the heads' order; None when unknown.
    """

    kind: str = "hybrid"
    heads: tuple[RewardHead, ...]
    centers: tuple[float, ...]
    full: RewardHead
    full_center: float
    temperature: float
    fold_seed: int
    metrics: dict[str, Any]
    layers: tuple[int, ...] | None = None

    def save(self, directory: Path) -> None:
        """Write `heads.safetensors` and `reward.json`."""
        tensors = {f"fold{k}.{name}": value for k, head in enumerate(self.heads) for name, value in _state(head)}
        tensors |= {f"full.{name}": value for name, value in _state(self.full)}
        save_file(tensors, directory / HEADS_FILE)
        facts = {
            "kind": self.kind,
            "num_folds": len(self.heads),
            "centers": list(self.centers),
            "full_center": self.full_center,
            "temperature": self.temperature,
            "fold_seed": self.fold_seed,
            "layers": None if self.layers is None else list(self.layers),
            "metrics": self.metrics,
        }
        write_json(directory / REWARD_FILE, facts)

    @staticmethod
    def load(directory: Path) -> FittedReward:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the files are missing or do not belong together.
        """
        try:
            facts = json.loads((directory / REWARD_FILE).read_text(encoding="utf-8"))
            tensors = load_file(directory / HEADS_FILE)
            make = _HEADS[facts["kind"]].from_state
            heads = tuple(make(_part(tensors, f"fold{k}.")) for k in range(facts["num_folds"]))
            full = make(_part(tensors, "full."))
            return FittedReward(
                kind=facts["kind"],
                heads=heads,
                centers=tuple(facts["centers"]),
                full=full,
                full_center=facts["full_center"],
                temperature=facts["temperature"],
                fold_seed=facts["fold_seed"],
                metrics=facts["metrics"],
                layers=None if facts["layers"] is None else tuple(facts["layers"]),
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} holds no complete fitted reward ({error}); rerun the reward phase"
            ) from error


def resolve_temperature(confidence: ConfidenceSection, fitted: FittedReward) -> float:
    """The temperature in reward units, the fitted one unless the configuration names a number."""
    return fitted.temperature if confidence.temperature == "fitted" else float(confidence.temperature)


def _state(head: RewardHead) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach().contiguous()) for name, value in head.state_dict().items()]


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
