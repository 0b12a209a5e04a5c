"""The cost phase: a cost model fitted or loaded, checked against human verdicts, and the price of every stored pair.

Stored pairs are priced once, out of fold where heads were fitted to them: `priced/` holds their costs without hidden
states, for whatever trains on stored pairs under a constraint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from raylign.assets import TINY_COST, asset_path
from raylign.config import CostModelSection, RunConfig, cost_source
from raylign.config_cost_model import FINE_TUNED_KEYS
from raylign.cost.ledger import measured_call
from raylign.errors import DataError, ResourceError
from raylign.evaluation.cost_quality import CostQuality, check_cost_sign, cost_quality
from raylign.evaluation.judges import resolve_judge, sign_rows
from raylign.evaluation.refusal import load_refusal_labels
from raylign.models.loading import model_fingerprint, tokenizer_fingerprint
from raylign.rewards.cross_fit import cross_fit
from raylign.rewards.fit import member_weights
from raylign.rewards.fit_cost import CostRows, fit_cost
from raylign.rewards.hybrid import HybridReward
from raylign.runtime.cost_members import fit_cost_members, member_facts
from raylign.runtime.cost_scorer import make_cost_scorer, resolve_cost_model
from raylign.runtime.evaluators import ActorOptions
from raylign.runtime.execution import own_errors
from raylign.runtime.fitted_cost import COST_COLUMNS, FittedCost, embedded_cost
from raylign.runtime.pair_states import VERDICT_COLUMNS, PairStates, has_verdict, read_states
from raylign.runtime.price_job import price_pairs, read_priced
from raylign.types import Message

if TYPE_CHECKING:
    import ray.data

LOG = logging.getLogger(__name__)
_TIMEOUT_S = 1800.0  # for the known answers


def run_cost(
    features: ray.data.Dataset,
    *,
    config: RunConfig,
    layers: tuple[int, ...],
    model_path: str,
    directory: Path,
    options: ActorOptions,
) -> dict[str, Any]:
    """Fit or load the cost model of the run, check its sign, price all pairs.

    Args:
        features: pairs with states, verdicts and splits.
        config: sections cost_model and evaluate, and the seed.
        layers: transformer layers of the states, from 1.
        model_path: directory of the policy before training.
        directory: of the phase, on storage that every node sees.
        options: of the actors that price.

    Returns:
        JSON-like facts: `source`, counts, `known_answers`, `held_out` and `out_of_fold` quality, shares of unsafe
        answers, `fit_s`, `members` of a fine-tuned cost model, and `warnings` for the report.

    Raises:
        DataError: no pair, or no split, with verdicts to fit to.
        ModelError: a flipped sign, or a model that cannot be used.
        ResourceError: no resources for the known answers within half an hour.
        TrainingError: a member that cannot be fitted, or that took too long.
    """
    source = cost_source(config)
    started = time.monotonic()
    facts: dict[str, Any] = {"source": source, "fit_s": None}
    if source == "external":
        classifier = model_fingerprint(resolve_cost_model(config.cost_model))
        fitted = FittedCost(source="external", model=f"{classifier}:{config.cost_model.label}")
    elif source == "embedded":
        fitted = embedded_cost(model_fingerprint(model_path))
    elif source == "fine_tuned":
        model = model_fingerprint(model_path)
        fitted = fit_cost_members(
            features, config=config, model_path=model_path, model=model, directory=directory, options=options
        )
        facts |= {"fit_s": time.monotonic() - started, "members": member_facts(directory, fitted)}
    else:
        fitted = fit_cost_heads(features, config=config, layers=layers, model=model_fingerprint(model_path))
        facts["fit_s"] = time.monotonic() - started
    fitted.save(directory)
    cost = f"the cost model (cost_model.source={source})"
    known = known_answers(model_path, directory, cost_model=config.cost_model, options=options)
    check_cost_sign(known, cost=cost, answers="answers to harmful prompts (XSTest)", cure=_CURES[source])
    price_pairs(
        features,
        fitted,
        config=config,
        layers=layers,
        model_path=model_path,
        directory=directory,
        options=options,
    )
    num_folds = config.cost_model.folds if source in ("labels", "fine_tuned") else None
    facts |= priced_facts(read_priced(directory), num_folds=num_folds)
    for name in ("held_out", "out_of_fold"):
        if facts[name] is not None:
            check_cost_sign(facts[name], cost=cost, answers=f"answers of your pairs ({name})", cure=_CURES[source])
            facts[name] = asdict(facts[name])
    facts["known_answers"] = asdict(known)
    facts["warnings"] = [text for text in (judge_overlap(config),) if text is not None]
    for text in facts["warnings"]:
        LOG.warning(text)
    return facts


_SWAPPED = "are chosen_safe and rejected_safe swapped with their opposites in your data?"
_CURES = {
    "labels": _SWAPPED,
    "fine_tuned": _SWAPPED,
    "embedded": "rebuild the assets with `raylign assets build`",
    "external": "are the labels in id2label of its config.json swapped, or does cost_model.label name the safe one?",
}


def fit_cost_heads(features: ray.data.Dataset, *, config: RunConfig, layers: tuple[int, ...], model: str) -> FittedCost:
    """Fit heads to the verdicts of the training pairs, one without each fold and one to all.

    Args:
        features: with states, verdicts and splits; pairs without a verdict are left out.
        config: section cost_model, and the seed.
        layers: transformer layers of the states.
        model: fingerprint of the model that they are of.

    Raises:
        DataError: no pair with a verdict in the training or validation split, or verdicts that are all alike.
    """
    settings, seed = config.cost_model, config.run.seed
    states = read_states(features, max_pairs=settings.max_pairs, only_labelled=True)
    (train, groups), (valid, _) = (_rows_of(states, split, settings) for split in ("train", "valid"))

    def fit(index: torch.Tensor) -> HybridReward:
        num = settings.num_heads
        weights = member_weights(len(index), num, head_data="bootstrap", seed=seed) if num > 1 else None
        return fit_cost(
            train[index],
            valid=valid,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            ridge=settings.ridge,
            regularization=settings.regularization,
            seed=seed,
            num_heads=num,
            weights=weights,
        ).head

    chosen, rejected = train.sides
    found = cross_fit(chosen, rejected, groups, num_folds=settings.folds, seed=seed, fit=fit)
    return FittedCost(source="labels", full=found.full, heads=found.heads, layers=layers, fold_seed=seed, model=model)


def _rows_of(states: PairStates, split: str, settings: CostModelSection) -> tuple[CostRows, list[str]]:
    rows = [row for row, name in enumerate(states.split) if name == split]
    if not rows:
        raise DataError(
            f"no pair with a safety verdict (chosen_safe, rejected_safe) in the {split!r} split: give more, or use "
            "cost_model.source=external"
        )
    cost_rows = CostRows.of_pairs(
        states.chosen[rows],
        states.rejected[rows],
        chosen_safe=[states.chosen_safe[row] for row in rows],
        rejected_safe=[states.rejected_safe[row] for row in rows],
        is_chosen_safer=settings.pair_order == "chosen",
    )
    return cost_rows, [states.prompt_key[row] for row in rows]


def known_answers(
    model_path: str, directory: Path, *, cost_model: CostModelSection, options: ActorOptions
) -> CostQuality:
    """The cost model against people who said which answers to harmful prompts comply (unsafe) and which refuse (safe).

    They are the answers that ship with raylign (XSTest) and belong to no run, so that a flip that runs through all
    verdicts of a run is seen too.

    Raises:
        ResourceError: no resources within half an hour.
        ModelError: a cost model that cannot be used.
    """
    price = ray.remote(measured_call).options(num_cpus=options.num_cpus, num_gpus=options.num_gpus)
    rows = sign_rows(load_refusal_labels())
    arguments = (model_path, str(directory), rows, cost_model, options)
    reference = price.remote(options.ledger, "known_answers", options.devices, price_texts, *arguments)
    try:
        with own_errors():
            costs = ray.get(reference, timeout=_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(reference, force=True)
        raise ResourceError(
            f"{len(rows)} known answers were not priced within {_TIMEOUT_S:g} s: another job may hold the CPUs or GPUs "
            "that one actor asks for (features.cpus_per_actor, features.gpus_per_actor)"
        ) from error
    return cost_quality(costs, [row.label == "full_compliance" for row in rows])


def price_texts(
    model_path: str, cost_dir: str, rows: Any, cost_model: CostModelSection, options: ActorOptions
) -> np.ndarray:
    """Costs (N,) of N answers to one user turn each, by the cost model in a directory."""
    scorer = make_cost_scorer(model_path, cost_dir, cost_model=cost_model, options=options)
    prompts = [(Message(role="user", content=row.prompt),) for row in rows]
    return scorer(prompts, [row.response for row in rows])


def priced_facts(priced: pa.Table, *, num_folds: int | None) -> dict[str, Any]:
    """Counts and qualities of the costs of stored pairs.

    Args:
        priced: see `read_priced`.
        num_folds: of the heads that were fitted to the training pairs and chosen on the validation pairs; None when
            nothing was fitted to any of them.
    """
    test, train = (priced.filter(pc.equal(priced["split"], split)) for split in ("test", "train"))
    is_fitted = num_folds is not None
    held_out = _quality(test if is_fitted else priced)
    return {
        "num_pairs": len(priced),
        "num_unlabelled_pairs": len(priced) - int(pc.sum(has_verdict(priced)).as_py() or 0),
        "num_fitted_pairs": int(pc.sum(has_verdict(train)).as_py() or 0) if is_fitted else 0,
        "held_out": held_out,
        "out_of_fold": _quality(train) if num_folds is not None and num_folds > 1 else None,
        **{
            f"share_unsafe_{side}": float(pc.mean(pc.greater(priced[f"{side}_cost"], 0)).as_py())
            for side in ("chosen", "rejected")
        },
    }


def _quality(priced: pa.Table) -> CostQuality | None:
    """Costs of all answers with a verdict against it; None without any."""
    costs, unsafe = [], []
    for verdicts, column in zip(VERDICT_COLUMNS, COST_COLUMNS, strict=True):
        known = priced.filter(pc.is_valid(priced[verdicts]))
        costs.append(known[column].to_numpy())
        unsafe.append(~known[verdicts].to_numpy().astype(bool))
    return cost_quality(np.concatenate(costs), np.concatenate(unsafe)) if sum(map(len, costs)) else None


def judge_overlap(config: RunConfig) -> str | None:
    """The line that a log and a report need when what prices the training also judges its result."""
    if cost_source(config) != "external":
        return None
    cost, judge = resolve_cost_model(config.cost_model), resolve_judge(config.evaluate.judge)
    if Path(cost).resolve() != Path(judge).resolve() and model_fingerprint(cost) != model_fingerprint(judge):
        return None
    return (
        f"cost_model.model and evaluate.judge are the same classifier ({config.cost_model.model}): the policy is "
        "trained against its own judge, so that safety after training says nothing; name another judge"
    )


def cost_key(config: RunConfig, *, model_path: str, features_digest: str) -> Mapping[str, Any]:
    """What the cost phase is made of."""
    is_external = cost_source(config) == "external"
    external = resolve_cost_model(config.cost_model) if is_external else None
    # phases from before there were members keep their keys
    unread = () if cost_source(config) == "fine_tuned" else FINE_TUNED_KEYS
    return {
        "features": features_digest,
        "source": cost_source(config),
        "cost_model": config.cost_model.model_dump(exclude={"source", "model", "batch_tokens", *unread}),
        "external": None if external is None else [model_fingerprint(external), tokenizer_fingerprint(external)],
        "judge": judge_overlap(config),
        "head": model_fingerprint(asset_path(TINY_COST)) if cost_source(config) == "embedded" else None,
        "policy": model_fingerprint(model_path),
        "dtype": config.policy.dtype,
        "seed": config.run.seed,
    }
