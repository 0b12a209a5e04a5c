"""Fitted cost models as the other phases use them, their files, and the head that ships.

Cost > 0 is unsafe, cost <= 0 is safe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raylign.assets import TINY_COST, asset_path
from raylign.errors import CheckpointError, ModelError
from raylign.rewards.hybrid import HybridReward
from raylign.runtime.phases import write_json

COST_COLUMNS = ("chosen_cost", "rejected_cost")
HEAD_COST_COLUMNS = ("chosen_head_costs", "rejected_head_costs")  # by each member, where there are several
HEADS_FILE = "heads.safetensors"
COST_FILE = "cost.json"

CostSource = Literal["labels", "fine_tuned", "embedded", "external"]


@dataclass(frozen=True, kw_only=True)
class FittedCost:
    """What prices responses.

    Attributes:
        source: `cost_source` of the configuration.
        full: head for every answer that no fold saw; None for what reads texts.
        heads: one per fold; head k saw no pair of fold k. () when no head was fitted to this run's pairs.
        members: names of the fine-tuned members, which lie beside the files, see `cost_members`.
        num_folds: fits of members that each left a fold out.
        layers: transformer layers of the states that heads read, from 1, in their order.
        fold_seed: seed of the fold partition.
        model: fingerprint of the model whose states the heads read, or of the classifier of texts and its label.
    """

    source: CostSource
    full: HybridReward | None = None
    heads: tuple[HybridReward, ...] = ()
    members: tuple[str, ...] = ()
    num_folds: int = 0
    layers: tuple[int, ...] = ()
    fold_seed: int = 0
    model: str | None = None

    def positions(self, layers: Sequence[int]) -> list[int]:
        """Where the layers that heads read lie among layers of states.

        Raises:
            ModelError: some are not there.
        """
        missing = [layer for layer in self.layers if layer not in layers]
        if missing:
            raise ModelError(
                f"the cost head reads layers {list(self.layers)}, the states have {list(layers)} "
                "(config key features.layers)"
            )
        return [list(layers).index(layer) for layer in self.layers]

    def save(self, directory: Path) -> None:
        """Write `cost.json` and `heads.safetensors`, which only names what reads texts."""
        heads = {} if self.full is None else {"full": self.full}
        heads |= {f"fold{k}": head for k, head in enumerate(self.heads)}
        # copies, because with one fold two heads are one and safetensors refuses memory that is shared
        tensors = {
            f"{name}.{key}": value.detach().clone(memory_format=torch.contiguous_format)
            for name, head in heads.items()
            for key, value in head.state_dict().items()
        }
        save_file(tensors, directory / HEADS_FILE, metadata={"model": self.model or ""})
        facts = {"source": self.source, "num_folds": len(self.heads) or self.num_folds, "layers": self.layers}
        members = {"members": self.members} if self.members else {}
        write_json(directory / COST_FILE, {**facts, "fold_seed": self.fold_seed, "model": self.model, **members})

    @staticmethod
    def load(directory: Path) -> FittedCost:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the files are missing or do not belong together.
        """
        try:
            facts = json.loads((directory / COST_FILE).read_text(encoding="utf-8"))
            num_folds, facts["layers"] = facts.pop("num_folds"), tuple(facts["layers"])
            if facts["source"] == "external":
                return FittedCost(**facts)
            if facts["source"] == "fine_tuned":
                return FittedCost(**{**facts, "members": tuple(facts["members"])}, num_folds=num_folds)
            tensors = load_file(directory / HEADS_FILE)
            heads = tuple(HybridReward.from_state(_part(tensors, f"fold{k}.")) for k in range(num_folds))
            return FittedCost(**facts, heads=heads, full=HybridReward.from_state(_part(tensors, "full.")))
        except (OSError, TypeError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} holds no complete cost model ({error}); rerun the cost phase"
            ) from error


def embedded_cost(model: str) -> FittedCost:
    """The head that ships for the embedded model.

    Args:
        model: fingerprint of the policy before training.

    Raises:
        ModelError: another model, whose states mean something else.
        AssetNotFoundError: the head is not part of this installation.
    """
    fitted = FittedCost.load(asset_path(TINY_COST))
    if fitted.model != model:
        raise ModelError(
            f"the embedded cost head reads states of the model with fingerprint {fitted.model}, policy.model has "
            f"{model}: use cost_model.source=labels or external, or build both with `raylign assets build`"
        )
    return fitted


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
