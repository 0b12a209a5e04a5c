"""The reward and rank phases: cached states to fitted heads, and heads to a label confidence for every pair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raylign.config import ConfidenceSection, RewardSection
from raylign.errors import CheckpointError, DataError
from raylign.evaluation.layers import layer_curve
from raylign.evaluation.metrics import bootstrap_mean, brier, expected_calibration_error
from raylign.evaluation.scoring import RewardScorer
from raylign.rewards.confidence import count_flips, fit_temperature, label_confidence, pair_confidence
from raylign.rewards.fit import FitOptions, cross_fit, grouped_folds, rewards
from raylign.rewards.hybrid import HybridReward
from raylign.runtime.features_job import states_from_column
from raylign.runtime.phases import write_json

if TYPE_CHECKING:
    import ray.data

    from raylign.runtime.evaluators import ActorOptions

HEADS_FILE = "heads.safetensors"
REWARD_FILE = "reward.json"
FULL = -1  # fold number of pairs that no head was fitted on: the head of all training pairs scores them


@dataclass(frozen=True, kw_only=True)
class PairStates:
    """Cached states of the pairs that heads are fitted and judged on.

    Attributes:
        chosen: (N, L, D), float16 or float32.
        rejected: likewise.
        prompt_key: N keys; pairs of one prompt share one.
        split: N names.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    prompt_key: list[str]
    split: list[str]

    def part(self, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Chosen, rejected and prompt keys of one split."""
        rows = [i for i, name in enumerate(self.split) if name == split]
        if not rows:
            raise DataError(f"no pair in the {split!r} split; give more prompts or larger data.{split}_fraction")
        return self.chosen[rows], self.rejected[rows], [self.prompt_key[i] for i in rows]


@dataclass(frozen=True, kw_only=True)
class FittedReward:
    """Heads of a fitted hybrid reward and how their rewards become confidence.

    Attributes:
        heads: one per fold; head k saw no pair of fold k.
        centers: mean reward of head k over fold k, reward units.
        full: head fitted on all training pairs, for every other answer.
        full_center: mean reward of `full` over the validation pairs.
        temperature: calibrates sigmoid(margin / temperature) on out-of-fold pairs, reward units.
        fold_seed: seed of the fold partition.
        metrics: held-out quality, JSON-like; see `fit_reward`.
        layers: transformer layers of the states, from 1, in the heads' order; None when unknown.
    """

    heads: tuple[HybridReward, ...]
    centers: tuple[float, ...]
    full: HybridReward
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
            heads = tuple(_head(tensors, f"fold{k}.") for k in range(facts["num_folds"]))
            full = _head(tensors, "full.")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory} holds no complete fitted reward ({error}); rerun the reward phase"
            ) from error
        return FittedReward(
            heads=heads,
            centers=tuple(facts["centers"]),
            full=full,
            full_center=facts["full_center"],
            temperature=facts["temperature"],
            fold_seed=facts["fold_seed"],
            metrics=facts["metrics"],
            layers=None if facts.get("layers") is None else tuple(facts["layers"]),
        )


def _state(head: HybridReward) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach().contiguous()) for name, value in head.state_dict().items()]


def _head(tensors: Mapping[str, torch.Tensor], prefix: str) -> HybridReward:
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    head = HybridReward(*state["probe_weight"].shape)
    head.load_state_dict(state)
    return head.requires_grad_(False)


def read_states(features: ray.data.Dataset, *, max_pairs: int) -> PairStates:
    """Collect states on the driver, at most `max_pairs` training pairs and as many held-out ones.

    Which pairs are taken depends on hashes of their ids alone.
    """
    names = ["row_id", "prompt_key", "split"]
    index = pa.concat_tables(features.select_columns(names).iter_batches(batch_format="pyarrow", batch_size=None))
    kept = _sample_ids(index, max_pairs)
    columns = [*names, "chosen_states", "rejected_states"]
    keep = pa.array(sorted(kept))
    tables = [
        batch.filter(pc.is_in(batch["row_id"], value_set=keep))
        for batch in features.select_columns(columns).iter_batches(batch_format="pyarrow", batch_size=1024)
    ]
    table = pa.concat_tables(tables)
    table = table.take(pc.sort_indices(table, sort_keys=[("row_id", "ascending")]))
    return PairStates(
        chosen=torch.from_numpy(states_from_column(table["chosen_states"]).copy()),
        rejected=torch.from_numpy(states_from_column(table["rejected_states"]).copy()),
        prompt_key=table["prompt_key"].to_pylist(),
        split=table["split"].to_pylist(),
    )


def _sample_ids(index: pa.Table, max_pairs: int) -> set[str]:
    kept: set[str] = set()
    for is_train in (True, False):
        mask = pc.equal(index["split"], "train")
        rows = index.filter(mask if is_train else pc.invert(mask))
        ids, keys = rows["row_id"].to_pylist(), rows["prompt_key"].to_pylist()
        # in the order of the prompts' keys, which are hashes already
        kept |= {row_id for _, row_id in sorted(zip(keys, ids, strict=True))[:max_pairs]}
    return kept


def fit_reward(
    features: ray.data.Dataset,
    *,
    config: RewardSection,
    confidence: ConfidenceSection,
    seed: int,
    layers: tuple[int, ...] | None = None,
) -> FittedReward:
    """Fit the hybrid reward on the training split and judge it on the test split.

    Args:
        features: with states and splits.
        config: folds, losses and steps.
        confidence: what the calibration metrics are of.
        seed: of folds and heads.
        layers: transformer layers of the states, remembered for confidence.source=live; None when unknown.

    Returns:
        Heads and metrics: `out_of_fold_accuracy`, `test_accuracy` (mean, low, high), `test_ece`, `test_brier` and
        `test_flips` of the label confidence, `test_ece_temperature` of sigmoid(margin / temperature), the per-layer
        `layers` curve, counts, and the chosen epochs.

    Raises:
        DataError: a split without pairs, or another number of layers than the states have.
    """
    states = read_states(features, max_pairs=config.max_pairs)
    if layers is not None and len(layers) != states.chosen.shape[1]:
        raise DataError(f"the states have {states.chosen.shape[1]} layers, layers={list(layers)} names {len(layers)}")
    chosen, rejected, groups = states.part("train")
    valid_chosen, valid_rejected, valid_groups = states.part("valid")
    test_chosen, test_rejected, test_groups = states.part("test")
    fit = cross_fit(
        chosen,
        rejected,
        groups,
        valid_chosen=valid_chosen,
        valid_rejected=valid_rejected,
        num_folds=config.folds,
        seed=seed,
        **_fit_options(config),
    )
    out_of_fold = torch.stack([fit.chosen_reward, fit.rejected_reward])
    valid_rewards = torch.stack([rewards(fit.full.head, part) for part in (valid_chosen, valid_rejected)])
    full_center = float(valid_rewards.mean())
    # One fold means in-sample rewards, which would calibrate to certainty.
    temperature = fit_temperature(-(out_of_fold if config.folds > 1 else valid_rewards).diff(dim=0)[0])
    fitted = FittedReward(
        heads=tuple(f.head for f in fit.heads),
        centers=tuple(_center(out_of_fold[:, fit.fold == k], full_center) for k in range(config.folds)),
        full=fit.full.head,
        full_center=full_center,
        temperature=temperature,
        fold_seed=seed,
        metrics={},
        layers=layers,
    )
    chosen_reward, rejected_reward = rewards(fitted.full, test_chosen), rewards(fitted.full, test_rejected)
    curve = layer_curve(chosen, rejected, test_chosen=test_chosen, test_rejected=test_rejected, ridge=config.ridge)
    metrics = {
        "num_train_pairs": len(groups),
        "num_valid_pairs": len(valid_groups),
        "num_test_pairs": len(test_groups),
        "best_epochs": [f.best_epoch for f in fit.heads],
        "out_of_fold_accuracy": _accuracy(fit.chosen_reward, fit.rejected_reward) if config.folds > 1 else None,
        "temperature": temperature,
        **held_out_metrics(chosen_reward, rejected_reward, fitted, confidence, seed=seed),
        "layers": [asdict(record) for record in curve],
    }
    return replace(fitted, metrics=metrics)


def _accuracy(chosen_reward: torch.Tensor, rejected_reward: torch.Tensor) -> float:
    return float((chosen_reward > rejected_reward).double().mean())


def _center(rewards_2N: torch.Tensor, fallback: float) -> float:
    """Mean reward of a fold; a fold may be empty when there are few prompts."""
    return float(rewards_2N.mean()) if rewards_2N.numel() else fallback


def held_out_metrics(
    chosen_reward: torch.Tensor,
    rejected_reward: torch.Tensor,
    fitted: FittedReward,
    confidence: ConfidenceSection,
    *,
    seed: int,
) -> dict[str, Any]:
    """Accuracy and calibration of the full head on pairs it never saw."""
    gamma = label_confidence(
        chosen_reward,
        rejected_reward,
        alpha=confidence.alpha,
        floor=0.0,  # calibration is of the belief, not of what the floor allows
        center=fitted.full_center if confidence.center == "ema" else 0.0,
        level="pair",
        squash=confidence.squash,
        temperature=resolve_temperature(confidence, fitted),
    )
    calibrated = torch.sigmoid((chosen_reward - rejected_reward) / fitted.temperature)
    correct = (chosen_reward > rejected_reward).double().numpy()
    accuracy = bootstrap_mean(correct, num_samples=1000, generator=np.random.default_rng(seed))
    return {
        "test_accuracy": {"mean": accuracy.mean, "low": accuracy.low, "high": accuracy.high},
        "test_ece": expected_calibration_error(gamma.numpy()),
        "test_brier": brier(gamma.numpy()),
        "test_ece_temperature": expected_calibration_error(calibrated.numpy()),
        "test_flips": int(count_flips(gamma)),
        "test_mean_chosen_reward": float(chosen_reward.mean()),
        "test_mean_rejected_reward": float(rejected_reward.mean()),
    }


def resolve_temperature(confidence: ConfidenceSection, fitted: FittedReward) -> float:
    """The temperature in reward units, the fitted one unless the configuration names a number."""
    return fitted.temperature if confidence.temperature == "fitted" else float(confidence.temperature)


def _fit_options(config: RewardSection) -> FitOptions:
    return {
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "ridge": config.ridge,
        "bce_weight": config.bce_weight,
        "margin_target": config.margin_target,
        "train_probes": config.train_probes,
    }


def rank_pairs(features: ray.data.Dataset, *, reward: FittedReward, confidence: ConfidenceSection) -> ray.data.Dataset:
    """Add `types.RANK_COLUMNS` to every pair and drop the states, lazily, one block at a time."""
    import ray

    shared = ray.put((reward, confidence))
    return features.map_batches(rank_table, batch_format="pyarrow", batch_size=1024, fn_kwargs={"shared": shared})


def rank_table(table: pa.Table, *, shared: Any) -> pa.Table:
    """Score one block: training pairs by the head of their fold, all others by the full head."""
    import ray

    reward, confidence = ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared
    chosen = torch.from_numpy(states_from_column(table["chosen_states"]).copy())
    rejected = torch.from_numpy(states_from_column(table["rejected_states"]).copy())
    fold = grouped_folds(table["prompt_key"].to_pylist(), len(reward.heads), reward.fold_seed)
    fold[torch.tensor([split != "train" for split in table["split"].to_pylist()], dtype=torch.bool)] = FULL
    columns = _score(chosen, rejected, fold, reward, confidence)
    table = table.drop_columns(["chosen_states", "rejected_states"])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def _score(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    fold: torch.Tensor,
    reward: FittedReward,
    confidence: ConfidenceSection,
) -> dict[str, np.ndarray]:
    names = ("chosen_reward", "rejected_reward", "margin_mean", "margin_variance", "label_confidence")
    out = {name: np.zeros(len(fold), np.float32) for name in names}
    temperature = resolve_temperature(confidence, reward)
    for k in fold.unique().tolist():
        rows = (fold == k).nonzero()[:, 0]
        head = reward.full if k == FULL else reward.heads[k]
        center = reward.full_center if k == FULL else reward.centers[k]
        r_chosen, r_rejected = rewards(head, chosen[rows]), rewards(head, rejected[rows])
        belief = pair_confidence(
            r_chosen,
            r_rejected,
            torch.zeros_like(r_chosen),  # the hybrid probe is a point estimate
            alpha=confidence.alpha,
            floor=confidence.floor,
            center=center if confidence.center == "ema" else 0.0,
            level="pair",
            squash=confidence.squash,
            temperature=temperature,
        )
        values = (r_chosen, r_rejected, belief.margin_mean, belief.margin_variance, belief.label_confidence)
        for name, value in zip(names, values, strict=True):
            out[name][rows.numpy()] = value.numpy()
    return {**out, "fold": fold.numpy().astype(np.int16), "weight": np.ones(len(fold), np.float32)}


def make_reward_scorer(
    model_path: str, reward_dir: str, layers: tuple[int, ...], options: ActorOptions | None = None
) -> RewardScorer:
    """The run's reward of texts: the head of all training pairs on the reference model's states.

    Args:
        model_path: directory of the reference.
        reward_dir: what `FittedReward.save` wrote.
        layers: transformer layers that the heads were fitted on.
        options: the actor that scores; its number types must be those of the features.
    """
    from raylign.models.loading import load_tokenizer, resolve_layout
    from raylign.models.numerics import actor_device, load_reference
    from raylign.runtime.evaluators import ActorOptions

    options = options or ActorOptions()
    device = actor_device(options.num_gpus)
    forward = load_reference(model_path, options.policy, device, parallel=options.parallel)
    return RewardScorer(
        forward,
        load_tokenizer(model_path, trust_remote_code=options.trust_remote_code),
        FittedReward.load(Path(reward_dir)).full.to(device),
        layers=layers,
        layout=resolve_layout("auto", forward.causal_lm.config),
    )


def confidence_facts(gamma: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Counts and a histogram of the label confidence of the training pairs, for the manifest and the report."""
    values = np.asarray(gamma, np.float64)
    counts, edges = np.histogram(values, bins=20, range=(0, 1))
    return {
        "num_pairs": len(values),
        "num_flips": int((values < 0.5).sum()),
        "mean": float(values.mean()) if len(values) else None,
        "histogram": counts.tolist(),
        "edges": edges.tolist(),
    }
