"""The samples phase: several answers of every policy to the evaluation's prompts, priced by the run's cost model.

Only online methods sample rounds, and those are of training prompts. Here methods of every kind, and the policy before
training, answer the same held-out prompts, so that what a constraint reached is the same numbers for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylign.config import RunConfig
from raylign.evaluation.sampled_costs import ConstraintMeasures, PricedAnswers, measure_constraint
from raylign.models.loading import model_fingerprint
from raylign.report.sampled_data import SampledMeasures, SampledRun, SampledSettings
from raylign.runtime.cost_scorer import make_cost_scorer
from raylign.runtime.evaluate_job import FREE_KEYS, evaluation_inputs, sample_models
from raylign.runtime.run_phases import CostPhase, Phases, actor_options

SAMPLES_FILE = "samples.parquet"
SAMPLES_PHASE = "samples"
_OTHER_KEYS = ("drift_prompts", "drift_candidates", "bootstrap_samples", "best_of")  # of answers that are not sampled


def sample_policies(
    phases: Phases,
    models: Mapping[str, str | Path],
    *,
    seed: int,
    reward: Path,
    reward_key: str,
    cost: CostPhase,
    name: str = SAMPLES_PHASE,
) -> Path:
    """Sample, judge and price, unless that was done for the same policies.

    Args:
        phases: of the run that the answers belong to; its section evaluate says how many.
        models: name -> directory; what is compared with the others is called as the reader of the file expects.
        seed: of the choice of prompts and the sampling, that of the evaluation.
        reward: directory of the reward phase.
        reward_key: of all that the reward is made of.
        cost: what prices the answers.
        name: of the phase.

    Returns:
        The file with the `SAMPLE_COLUMNS`.

    Raises:
        ModelError: a policy or the judge cannot be loaded, or the judge's sign is flipped.
        DataError: the prompts cannot be used.
    """
    config = phases.config
    key = samples_key(models, config=config, seed=seed) | {"reward": reward_key, "cost": cost.key}
    phases.run.devices = {**phases.run.devices, name: phases.run.devices["evaluate"]}

    def work(directory: Path) -> dict[str, Any]:
        options = actor_options(config)
        scorers: dict[str, Any] = {
            "make_reward_fn": phases.reward_scorer(reward),
            "make_cost_fn": functools.partial(
                make_cost_scorer,
                phases.model,
                str(cost.directory),
                cost_model=config.cost_model,
                options=options,
            ),
        }
        answers = sample_models(
            models, config=config.evaluate, seed=seed, options=replace(options, ledger=phases.ledger), **scorers
        )
        pq.write_table(answers, directory / SAMPLES_FILE)
        return {"num_answers": len(answers)}

    directory, _ = phases.run.phase(name, key, work)
    return directory / SAMPLES_FILE


def samples_key(models: Mapping[str, str | Path], *, config: RunConfig, seed: int) -> dict[str, Any]:
    """What the answers are made of, besides what prices them."""
    section = config.evaluate
    return {
        "models": {name: model_fingerprint(model) for name, model in models.items()},
        "evaluate": section.model_dump(exclude={*FREE_KEYS, *_OTHER_KEYS}),
        "num_samples": section.constraint_samples,
        **evaluation_inputs(section),
        "robust": config.robust.model_dump(),
        "seed": seed,
    }


def read_samples(file: Path, *, costs: str) -> dict[str, PricedAnswers]:
    """Answers by policy.

    Args:
        file: of `sample_policies`.
        costs: "model_cost", by the cost model of the run, or "cost", by the judge.
    """
    table = pq.read_table(file)
    found = {}
    for name in pc.unique(table["policy"]).to_pylist():
        rows = table.filter(pc.equal(table["policy"], pa.scalar(name)))
        values: dict[str, np.ndarray] = {
            column: rows[column].to_numpy() for column in ("harmful", "is_refusal", "reward", costs)
        }
        found[name] = PricedAnswers(
            prompt=np.array(rows["prompt"].to_pylist()),
            is_harmful=values["harmful"].astype(bool),
            is_refusal=values["is_refusal"].astype(bool),
            reward=values["reward"],
            cost=values[costs],
        )
    return found


def measure_samples(
    files: Sequence[Path], policies: Sequence[str], *, prompt_safety: float, num_samples: int, seed: int
) -> dict[str, SampledMeasures]:
    """What several answers to every prompt say of policies, by name.

    Args:
        files: of `sample_policies`, one per training; a policy counts when all of them have it.
        policies: names, first that of the policy before training.
        prompt_safety: share of safe answers that makes a prompt safe.
        num_samples: bootstrap resamples of prompts.
        seed: of the resampling.
    """
    before, found = policies[0], dict[str, dict[str, ConstraintMeasures]]()
    for price, column in (("by_model", "model_cost"), ("by_judge", "cost")):
        answers = [read_samples(file, costs=column) for file in files]
        for name in policies:
            if answers and all(name in by_policy for by_policy in answers):
                found.setdefault(name, {})[price] = measure_constraint(
                    [by_policy[before] for by_policy in answers],
                    None if name == before else [by_policy[name] for by_policy in answers],
                    prompt_safety=prompt_safety,
                    num_samples=num_samples,
                    seed=seed,
                )
    return {name: SampledMeasures(**measures) for name, measures in found.items()}


def sampled_run(config: RunConfig, directory: Path) -> SampledRun | None:
    """What several answers to every prompt say of one run; None when they were not asked for.

    Args:
        config: of the run.
        directory: of the run.
    """
    if not config.evaluate.constraint_samples:
        return None
    measures = measure_samples(
        [directory / SAMPLES_PHASE / SAMPLES_FILE],
        ["before", "after"],
        prompt_safety=config.constraint.prompt_safety,
        num_samples=config.evaluate.bootstrap_samples,
        seed=config.run.seed,
    )
    settings = sampled_settings(config, prompt_safety=config.constraint.prompt_safety, before=measures["before"])
    return SampledRun(settings=settings, after=measures["after"])


def sampled_settings(config: RunConfig, *, prompt_safety: float, before: SampledMeasures) -> SampledSettings:
    """How the answers of a run came about."""
    return SampledSettings(
        num_answers=config.evaluate.constraint_samples,
        temperature=config.evaluate.temperature,
        prompt_safety=prompt_safety,
        before=before,
    )
