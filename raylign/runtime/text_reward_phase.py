"""The reward phase of rewards that read texts: members out of fold, all pairs scored, and judged as heads are.

Stored pairs are scored here once and not again when they are ranked: `scored/` holds them without hidden states, with
each member's rewards (and sigma, of members that state one) and the fold that was left out for them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import torch

from raylign.config import TOKEN_REWARDS, RunConfig
from raylign.config_effects import AVA
from raylign.cost.ledger import measured
from raylign.evaluation.layers import layer_curve
from raylign.models.loading import model_fingerprint, resolve_model, tokenizer_fingerprint
from raylign.rewards.cross_fit import checked_folds
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.execution import execution
from raylign.runtime.fitted_reward import FULL, FittedTexts, RewardFacts
from raylign.runtime.pair_states import read_states
from raylign.runtime.rank_job import pair_folds, scored_beliefs
from raylign.runtime.reward_job import Held, anchor_warnings, reward_facts
from raylign.runtime.text_reward_job import fit_members
from raylign.runtime.text_rewards import HEAD_REWARD_COLUMNS, HEAD_SCALE_COLUMNS, REWARD_FILE, read_facts, score_dataset

if TYPE_CHECKING:
    import ray.data

SCORED_DIR = "scored"

logger = logging.getLogger(__name__)


def text_key(config: RunConfig, model_path: str) -> dict[str, Any]:
    """What a reward of texts is made of, besides the pairs.

    What each token gets of a reward (`token_reward.credit`, `dense_weight`) does not change the fit.

    Args:
        config: of the run.
        model_path: directory of the policy.
    """
    section, kind = config.reward_model, config.reward.kind
    external = None if section.model is None else resolve_model(section.model, key="reward_model.model")
    return {
        "reward_model": section.model_dump(exclude={"model", "batch_tokens"}),
        "external": None if external is None else [model_fingerprint(external), tokenizer_fingerprint(external)],
        "policy": model_fingerprint(model_path),
        "dtype": config.policy.dtype,
        **({"score": config.token_reward.score} if kind in TOKEN_REWARDS else {}),
        **({"ava": config.ava.model_dump(exclude={"head_learning_rate"})} if kind in AVA else {}),
    }


def fit_text_reward(
    features: ray.data.Dataset, *, config: RunConfig, model_path: str, directory: Path, options: ActorOptions
) -> FittedTexts:
    """Fit the members, score every pair by members that did not see its prompt, and judge them on the test split.

    An external classifier saw none of the pairs: it scores them all. With reward.folds=1 members score the pairs that
    they were fitted to. Members that an interrupted call finished for a fold are kept; the caller promises that the
    directory is of the same inputs.

    Args:
        features: pairs with token ids; their states serve the per-layer curve of the report alone.
        config: of the run.
        model_path: directory of the policy.
        directory: of the phase, on storage that every node sees.
        options: of the actors that score; one member is fitted with the CPUs and GPUs of one of them.

    Returns:
        What `fit_reward` returns, for texts; saved by the caller. Its metrics also hold `members` (fold that was left
        out, validation accuracy and last loss of each; of kinds that reward tokens also the accuracy of every score,
        sigma and terms) and for reward.kind=warm `merged_valid_accuracy`.

    Raises:
        DataError: a split without pairs, or a fold with all prompts; before anything is fitted.
        ModelError: a classifier or tokenizer that cannot be used.
        TrainingError: a member that cannot be fitted.
    """
    is_external, num_folds = config.reward.kind == "external", config.reward.folds
    curve = _layers(features, config)
    fits = {} if is_external else {FULL: directory / "full"}
    if not is_external and num_folds > 1:
        fits |= {fold: directory / f"fold{fold}" for fold in range(num_folds)}
    for fold, members in fits.items():
        if not (members / REWARD_FILE).exists():
            fit_members(
                features,
                reward=config.reward,
                reward_model=config.reward_model,
                token_reward=config.token_reward,
                ava=config.ava,
                policy=config.policy,
                model_path=model_path,
                output_dir=members,
                seed=config.run.seed,
                excluded_folds=[] if fold == FULL else [fold],
                num_cpus=options.num_cpus,
                num_gpus=options.num_gpus,
                ledger=options.ledger,
            )
    scored = directory / SCORED_DIR
    shutil.rmtree(scored, ignore_errors=True)
    pairs = features.drop_columns(["chosen_states", "rejected_states"]).map_batches(
        _with_fold,
        batch_format="pyarrow",
        fn_kwargs={"num_folds": 0 if is_external else num_folds, "seed": config.run.seed},
    )
    parts: dict[int, Path | None] = {**fits} or {FULL: None}
    for fold, source in parts.items():
        # with one fold what was fitted to all pairs is all that there is
        own = pairs if len(parts) == 1 else pairs.map_batches(_only, batch_format="pyarrow", fn_kwargs={"fold": fold})
        rewarded = score_dataset(
            own, model_path=model_path, reward_model=config.reward_model, directory=source, options=options
        )
        with measured(options.ledger, "score_pairs", options.pool_devices), execution(rewarded):
            rewarded.write_parquet(str(scored / f"part{fold}"))
    facts = _judged(scored, config)
    facts.metrics["layers"] = curve
    facts.metrics.update(_member_metrics(fits))
    facts.metrics["warnings"] += floor_warnings(facts.metrics.get("members", []))
    for warning in facts.metrics["warnings"]:
        logger.warning("reward.kind=%s: %s", config.reward.kind, warning)
    return FittedTexts(**{field.name: getattr(facts, field.name) for field in fields(facts)}, directory=directory)


def _layers(features: ray.data.Dataset, config: RunConfig) -> list[dict[str, Any]]:
    """The per-layer curve; what is wrong with splits and folds is found here."""
    states = read_states(features, max_pairs=config.reward.max_pairs)
    chosen, rejected, groups = states.part("train")
    states.part("valid")
    test_chosen, test_rejected, _ = states.part("test")
    if config.reward.kind != "external":
        checked_folds(groups, config.reward.folds, config.run.seed)
    curve = layer_curve(chosen, rejected, test_chosen=test_chosen, test_rejected=test_rejected, ridge=_RIDGE)
    return [asdict(record) for record in curve]


def _judged(scored: Path, config: RunConfig) -> RewardFacts:
    dataset = pa.dataset.dataset(scored)
    found = [name for name in (*HEAD_REWARD_COLUMNS, *HEAD_SCALE_COLUMNS) if name in dataset.schema.names]
    table = dataset.to_table(columns=["row_id", "prompt_key", "split", "fold", *found])
    table = table.sort_by("row_id")
    held = {}
    for split in ("train", "valid", "test"):
        part = table.filter(pc.equal(table["split"], split))
        held[split] = (Held(*scored_beliefs(part)), torch.from_numpy(part["fold"].to_numpy().astype("int64")))
    is_out_of_fold = config.reward.kind == "external" or config.reward.folds > 1
    facts = reward_facts(
        *held["train"],
        valid=held["valid"][0],
        test=held["test"][0],
        test_groups=table.filter(pc.equal(table["split"], "test"))["prompt_key"].to_pylist(),
        is_out_of_fold=is_out_of_fold,
        config=config,
    )
    test = held["test"][0]
    facts.metrics["warnings"] = anchor_warnings(torch.cat([test.chosen.head_rewards, test.rejected.head_rewards]))
    return facts


def _member_metrics(fits: dict[int, Path]) -> dict[str, Any]:
    """How well each member of each fit learned; what an external classifier has none of."""
    metrics: dict[str, Any] = {"members": []}
    for fold, directory in fits.items():
        facts = read_facts(directory)
        metrics["members"] += [
            {
                "fold": None if fold == FULL else fold,
                **{name: record[name] for name in _OF_MEMBERS if name in record},
            }
            for record in facts["members"]
        ]
        if fold == FULL and "merged_valid_accuracy" in facts:
            metrics["merged_valid_accuracy"] = facts["merged_valid_accuracy"]
    return metrics if fits else {}


def floor_warnings(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """That sigma tells nothing, where it lies on its floor.

    Args:
        members: facts of members; those that state a sigma have `sigma`.
    """
    shares = [member["sigma"]["floor_share"] for member in members if "sigma" in member]
    if not shares or max(shares) <= 0.5:
        return []
    return [
        f"sigma lies on its floor for {max(shares):.0%} of the tokens of validation answers (variance collapse), "
        "so that it tells nothing of a reward, and TD errors weigh on the trunk without bound; use an ava.td_weight "
        "below 1"
    ]


_OF_MEMBERS = ("member", "valid_accuracy", "last_loss", "valid_accuracies", "sigma", "terms")
_RIDGE = 0.1  # of the per-layer curve; reward.ridge belongs to probes


def _with_fold(table: pa.Table, *, num_folds: int, seed: int) -> pa.Table:
    fold = pair_folds(table, num_folds=num_folds, seed=seed).tolist() if num_folds else [FULL] * len(table)
    return table.append_column("fold", pa.array(fold, pa.int16()))


def _only(table: pa.Table, *, fold: int) -> pa.Table:
    return table.filter(pc.equal(table["fold"], fold))
